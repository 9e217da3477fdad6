"""Average precision of a detector's boxes and masks, as COCO defines it, on one process or many."""

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from img2vec.evaluate.coco import CocoData
from img2vec.evaluate.detection_data import Sample, evaluation_batches
from tokdiv.dist import Processes
from tokdiv.errors import RunError, UsageError
from tokdiv.progress import progress_bar

KINDS = {"box": "bbox", "mask": "segm"}  # ours, and pycocotools'
AREAS = {
    "ap": "map",
    "ap50": "map_50",
    "ap75": "map_75",
    "ap_small": "map_small",
    "ap_medium": "map_medium",
    "ap_large": "map_large",
}
Detections = dict[str, Tensor]  # boxes (N, 4), labels (N,), scores (N,), masks bool (N, H, W)


def check_installed() -> None:
    """Raise UsageError where pycocotools is missing."""
    if importlib.util.find_spec("pycocotools") is None:
        raise UsageError(
            "img2vec detect needs pycocotools: install it with pip install 'tokdiv[dense]'"
        )


@torch.no_grad()
def evaluate_detector(
    detector: nn.Module,
    data: CocoData,
    *,
    batch_size: int,
    dtype: str,
    workers: int,
    group: Processes,
    shown: tuple[int, ...] = (),
) -> tuple[dict[str, float | None], list[dict[str, Any]], dict[int, str], dict[int, Detections]]:
    """Run the detector on all images, each once.

    Args:
        detector: on `group.device`; it is left in eval mode.
        shown: indices of images whose detections are returned.

    Returns:
        Average precisions by name (box_ap, box_ap50, ..., mask_ap_large), None where no object has that size; the
        same by class; the images that cannot be used, with the reason; the detections of `shown`. All of it on
        the first process; the others get the first and third alone.

    Raises:
        RunError: no image can be used.
    """
    detector.eval()
    metric = _metric()
    indices: list[int] = []
    skipped: dict[int, str] = {}
    kept: dict[int, Detections] = {}
    device = group.device
    bar = progress_bar(
        total=len(range(group.rank, len(data), group.world)),
        desc="evaluate",
        unit="img",
        show=group.rank == 0,
    )
    with bar:
        for samples in evaluation_batches(
            data, batch_size=batch_size, workers=workers, group=group
        ):
            bar.update(len(samples))
            skipped |= {s.position: s.reason or "" for s in samples if s.image is None}
            usable = [s for s in samples if s.image is not None]
            for sample, found in zip(usable, _detect(detector, usable, device, dtype)):
                metric.update([found], [sample.target])
                indices.append(sample.position)
                if sample.position in shown:
                    kept[sample.position] = found
    gathered = group.gather((indices, metric.metric_state, skipped, kept))
    for *_, other_skipped, other_kept in gathered or []:
        skipped |= other_skipped
        kept |= other_kept
    skipped = group.broadcast(skipped)
    if len(skipped) == len(data):
        raise RunError(
            f"'{data.name}': none of its {len(data)} images can be used, as "
            f"'{data.record(0)['file']}': {skipped[0]}"
        )
    metrics: dict[str, float | None] = {}
    by_class: list[dict[str, Any]] = []
    if gathered is not None:
        merged = _merged([(found, state) for found, state, *_ in gathered])
        metrics, by_class = _precisions(merged.compute(), data.classes)
    return group.broadcast(metrics), by_class, skipped, kept


def _detect(
    detector: nn.Module, samples: list[Sample], device: torch.device, dtype: str
) -> list[Detections]:
    """Detections of usable samples, on the CPU, in pixels of the image."""
    if not samples:
        return []
    images = [as_input(sample, device) for sample in samples]
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        found = detector(images)
    return [
        {
            "boxes": one["boxes"].float().cpu(),
            "labels": one["labels"].cpu(),
            "scores": one["scores"].float().cpu(),
            "masks": (one["masks"][:, 0] > 0.5).cpu(),
        }
        for one in found
    ]


def as_input(sample: Sample, device: torch.device) -> Tensor:
    """The image as torchvision's detectors take it: float (3, H, W) in [0, 1]."""
    assert sample.image is not None
    return sample.image.to(device, non_blocking=True).float() / 255


def _metric() -> Any:
    from torchmetrics.detection import MeanAveragePrecision

    faster = importlib.util.find_spec("faster_coco_eval") is not None
    return MeanAveragePrecision(
        iou_type=tuple(KINDS.values()),
        # pycocotools' own: torchmetrics' are float32, and a recall of 3/5 would miss the threshold 0.6.
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        extended_summary=True,
        backend="faster_coco_eval" if faster else "pycocotools",
        sync_on_compute=False,
    )


def _merged(parts: list[tuple[list[int], dict[str, Any]]]) -> Any:
    """One metric of all processes' images, in the order of the data, so that ties in score resolve alike.

    torchmetrics' own gathering of masks takes it that all processes have equally many images.
    """
    order = sorted(
        (index, part, row)
        for part, (found, _) in enumerate(parts)
        for row, index in enumerate(found)
    )
    metric = _metric()
    metric.update([], [])  # else it warns of a metric without data
    for name, values in metric.metric_state.items():
        values.extend(parts[part][1][name][row] for _, part, row in order)
    return metric


def _precisions(
    computed: dict[str, Tensor], classes: list[str]
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """Overall and by class, in [0, 1]; None where COCO says -1, for want of objects."""

    def known(value: Tensor) -> float | None:
        return float(value) if float(value) > -1 else None

    metrics = {
        f"{kind}_{name}": known(computed[f"{prefix}_{theirs}"])
        for kind, prefix in KINDS.items()
        for name, theirs in AREAS.items()
    }
    by_class = [{"class": classes[label - 1]} for label in computed["classes"].reshape(-1).tolist()]
    for kind, prefix in KINDS.items():
        # thresholds 0.5:0.95, recalls, classes, areas (all first), detections per image (100 last)
        precision = computed[f"{prefix}_precision"][:, :, :, 0, -1]
        for number, entry in enumerate(by_class):
            entry[f"{kind}_ap"] = known(precision[:, :, number].mean())
            entry[f"{kind}_ap50"] = known(precision[0, :, number].mean())
    return metrics, by_class
