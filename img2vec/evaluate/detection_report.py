"""DIR/predictions.png and DIR/report.html of a detection: what was found, beside the ground truth."""

import logging
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from img2vec.evaluate.coco import CocoData
from img2vec.evaluate.detection_data import read_sample
from img2vec.evaluate.results import Results
from tokdiv.errors import first_line
from tokdiv.figures.style import PALETTE, STYLE, save_figure
from tokdiv.report.page import NARROW, inline_figure, render
from tokdiv.run_dir import write_atomic

log = logging.getLogger(__name__)

PICTURE, REPORT = "predictions.png", "report.html"
SCORE = 0.5  # detections below it are not drawn
MASK_OPACITY = 0.45
METRIC_NAMES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
}


def write_report(
    folder: Path, results: Results, data: CocoData, detections: dict[int, dict[str, Tensor]]
) -> None:
    """Write both files. A failure here is only a warning: the results are complete.

    Args:
        data: the val data. detections: by index of the image, as `evaluate_detector` returns them.
    """
    try:
        figure = predictions_figure(data, detections)
        save_figure(figure, folder / PICTURE)
        page = render(
            "detection.html",
            "img2vec",
            results=results,
            names=METRIC_NAMES,
            losses=_losses(results.history),
            pictures=inline_figure(
                figure,
                f"{len(detections)} images of val with their objects on the left and what was found on the right.",
                f"Left: ground truth. Right: detections of a score of at least {SCORE:g}.",
                narrow=predictions_figure(data, detections, NARROW),
                image_format="png",
            ),
        )
        # A name that is no Unicode is shown with its bytes spelled out.
        write_atomic(folder / REPORT, page.encode("utf-8", "backslashreplace"))
    except Exception as error:
        log.warning("the report was not written (%s: %s)", type(error).__name__, first_line(error))


def predictions_figure(
    data: CocoData, detections: dict[int, dict[str, Tensor]], width: float = 6.5
) -> Figure:
    """A row per image: its objects, and the detections of a score of at least SCORE.

    Args:
        detections: by index of the image: boxes, labels, scores, masks. width: inches.
    """
    samples = [read_sample(data, index) for index in sorted(detections)]
    ratios = [s.image.shape[1] / s.image.shape[2] for s in samples if s.image is not None]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, 0.3 + width / 2 * sum(ratios)), layout="constrained")
        panels = figure.subplots(len(samples), 2, squeeze=False, height_ratios=ratios)
        for row, sample in zip(panels, samples):
            found = detections[sample.position]
            kept = found["scores"] >= SCORE
            shown = {name: values[kept] for name, values in found.items()}
            for axes, objects in zip(row, (sample.target, shown)):
                _draw_objects(axes, sample.image, objects, data.classes)
        for axes, title in zip(panels[0], ("ground truth", "detections")):
            axes.set_title(title)
    return figure


def _draw_objects(axes: Axes, image: Any, objects: dict[str, Tensor], classes: list[str]) -> None:
    """An image with boxes, masks, and class names, with scores where there are any."""
    pixels = image.permute(1, 2, 0).numpy() / 255
    scores = objects.get("scores")
    for number, (box, label, mask) in enumerate(
        zip(objects["boxes"].tolist(), objects["labels"].tolist(), objects["masks"].numpy())
    ):
        color = np.array(mpl.colors.to_rgb(PALETTE[(label - 1) % len(PALETTE)]))
        inside = mask.astype(bool)
        pixels[inside] = (1 - MASK_OPACITY) * pixels[inside] + MASK_OPACITY * color
        x1, y1, x2, y2 = box
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linewidth=0.8)
        )
        text = (
            classes[label - 1] if scores is None else f"{classes[label - 1]} {scores[number]:.2f}"
        )
        axes.text(
            x1, y1, text.replace("$", r"\$"), fontsize=4.5, color="white", va="bottom", clip_on=True,
            bbox={"facecolor": color, "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    axes.imshow(pixels)
    axes.set_axis_off()


def _losses(history: list[dict[str, Any]]) -> Any:
    """The loss and its five parts over the steps, as an inline figure."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 2.8), layout="constrained")
        axes = figure.add_subplot()
        steps = [entry["step"] for entry in history]
        parts = [name for name in history[0] if name.startswith("loss_")]
        for name, color in zip(["loss", *parts], ["#222222", *PALETTE]):
            values = [entry[name] for entry in history]
            axes.plot(steps, values, color=color, marker="." if len(steps) < 30 else "", label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.grid(axis="y")
        axes.legend(ncols=3)
        first, last = history[0]["loss"], history[-1]["loss"]
        return inline_figure(
            figure,
            f"Losses over the steps: from {first:.3f} to {last:.3f}.",
            "Means over the steps of each epoch.",
        )
