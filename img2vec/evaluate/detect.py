"""Detection: Mask R-CNN fine-tuned from any model, after ViTDet (arXiv 2203.16527), and its average precision."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.models.detection import MaskRCNN

from img2vec.evaluate.coco import LEFT_OUT, CocoData, open_coco
from img2vec.evaluate.detection_eval import Detections, check_installed, evaluate_detector
from img2vec.evaluate.detection_report import write_report
from img2vec.evaluate.detection_train import CHECKPOINT, NOT_RECORDED, train_detector
from img2vec.evaluate.detector import build_detector, save_detector
from img2vec.evaluate.encoder import load_encoder
from img2vec.evaluate.results import Results
from img2vec.evaluate.settings import DetectRecipe, DetectSettings, peak_lr
from tokdiv.dist import (
    Processes,
    choose_device,
    choose_dtype,
    current_processes,
    default_workers,
)
from tokdiv.errors import UsageError
from tokdiv.run_dir import locked_folder
from tokdiv.teachers.teacher import Teacher

log = logging.getLogger(__name__)

NUM_SHOWN = 6  # val images in predictions.png


def detect(
    model: str | Path | Teacher,
    train: str,
    val: str,
    out: str | Path | None = None,
    **options: Any,
) -> Results:
    """Average precision of boxes and masks after training a Mask R-CNN on `train`.

    The whole network is trained. The state is saved after each epoch; the same call goes on from there.

    Args:
        model: see `load_encoder`; a timm model.
        train, val: COCO data, as IMAGES_FOLDER:annotations=FILE.json.
        out: folder for results.json, results.csv, predictions.png, report.html, TensorBoard events, model/ (see
            `load_detector`) and, until it is done, checkpoint.pt; None writes nothing.
        options: fields of `DetectSettings`. With bfloat16 the forward pass is autocast; weights are float32.

    Returns:
        box_ap, box_ap50, box_ap75, box_ap_small, box_ap_medium, box_ap_large, and the same of masks, on `val` at
        the end of the schedule; each in [0, 1], or None where `val` has no such object.

    Raises:
        UsageError, RunError: see `load_encoder` and `open_coco`; a model without feature maps; a loss that is not
            finite.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 came; only with `out`.
    """
    check_installed()
    given = DetectSettings(**options)
    train_data = open_coco(train)
    val_data = open_coco(val, train_data.classes)
    device = choose_device(given.device)
    group = current_processes(device)
    recipe = _decide(given, train_data, group)
    teacher = load_encoder(model, image_size="native", device="cpu", dtype="float32")
    shown = _shown(val_data)
    with ExitStack() as stack:
        folder = None
        if out is not None:
            folder = group.on_first(lambda: stack.enter_context(locked_folder(out)))
        cuda = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        torch.manual_seed(recipe.seed)
        detector, notes = build_detector(teacher, len(train_data.classes), recipe)
        detector.to(device)
        notes += _data_notes(train_data, val_data, recipe, given)
        for note in notes:
            log.info("%s", note)
        trained, progress = train_detector(
            detector, teacher, train_data, val_data, recipe, group, folder
        )
        metrics, by_class, skipped, found = evaluate_detector(
            trained,
            val_data,
            batch_size=recipe.micro_batch_size,
            dtype=recipe.dtype,
            workers=recipe.workers,
            group=group,
            shown=shown,
        )
        results = Results(
            task="detect",
            model=teacher.name,
            metrics=metrics,
            settings={k: v for k, v in vars(recipe).items() if k not in NOT_RECORDED},
            data={
                "train": _describe(train_data, progress.skipped),
                "val": _describe(val_data, skipped),
                "classes": len(train_data.classes),
            },
            notes=notes,
            history=progress.history,
            by_class=by_class,
        )
        if folder is not None:
            group.on_first(
                lambda: _write(
                    folder, trained, teacher, train_data.classes, recipe, results, val_data, found
                )
            )
    return results


def _write(
    folder: Path,
    detector: MaskRCNN,
    teacher: Teacher,
    classes: list[str],
    recipe: DetectRecipe,
    results: Results,
    val_data: CocoData,
    detections: dict[int, Detections],
) -> None:
    save_detector(detector, folder / "model", teacher, classes, recipe)
    results.write(folder)
    write_report(folder, results, val_data, detections)
    (folder / CHECKPOINT).unlink(missing_ok=True)


def _decide(given: DetectSettings, train_data: CocoData, group: Processes) -> DetectRecipe:
    """Decide the batch, learning rate, length, dtype and workers that were left open."""
    num_images = len(train_data.training_indices())
    if not train_data.num_objects.sum():
        left_out = "; ".join(f"{n} left out: {LEFT_OUT[k]}" for k, n in train_data.left_out.items())
        raise UsageError(
            f"'{train_data.name}' has no objects to learn from"
            + (f" ({left_out})" if left_out else "")
        )
    batch_size = min(given.batch_size, num_images)
    batch_size -= batch_size % group.world
    if not batch_size:
        raise UsageError(f"{num_images} training images for {group.world} processes: use fewer")
    steps_per_epoch = num_images // batch_size
    decided = {
        "batch_size": batch_size,
        "lr": peak_lr(given, batch_size),
        "max_steps": given.max_steps or given.epochs * steps_per_epoch,
        "save_every": given.save_every or steps_per_epoch,
        "dtype": choose_dtype(given.dtype, group.device),
        "workers": default_workers() if given.workers is None else given.workers,
    }
    return DetectRecipe(**{**vars(given), **decided})


# Results -----------------------------------------------------------------------------------------


def _shown(data: CocoData) -> tuple[int, ...]:
    """Indices of the images in predictions.png: with objects, evenly spaced."""
    with_objects = np.flatnonzero(data.num_objects)
    count = min(NUM_SHOWN, len(with_objects))
    return tuple(with_objects[np.arange(count) * len(with_objects) // max(count, 1)].tolist())


def _describe(data: CocoData, skipped: dict[int, str]) -> dict[str, Any]:
    return {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "images": len(data) - len(skipped),
        "skipped": len(skipped) + len(data.missing),
        "objects": int(data.num_objects.sum()),
        "crowds": int(data.num_crowds.sum()),
        "left_out": data.left_out,
    }


def _data_notes(
    train_data: CocoData, val_data: CocoData, recipe: DetectRecipe, given: DetectSettings
) -> list[str]:
    notes = []
    if recipe.batch_size < given.batch_size:
        notes.append(f"batch of {recipe.batch_size}: there are no more training images")
    if recipe.warmup_steps >= recipe.max_steps:
        notes.append(
            f"the warm-up of {recipe.warmup_steps} steps takes up all {recipe.max_steps}: give --warmup-steps"
        )
    for side, data in (("train", train_data), ("val", val_data)):
        notes += [
            f"{count} objects of {side} are left out: {LEFT_OUT[key]}"
            for key, count in data.left_out.items()
        ]
        if data.missing:
            notes.append(
                f"{len(data.missing)} images of {side} are not in '{data.folder}', such as '{data.missing[0]}'"
            )
    if untrained := sorted(val_data.used_classes - train_data.used_classes):
        more = f" and {len(untrained) - 3} more" if len(untrained) > 3 else ""
        notes.append(
            f"no training image has objects of {', '.join(untrained[:3])}{more}, which val has"
        )
    return notes
