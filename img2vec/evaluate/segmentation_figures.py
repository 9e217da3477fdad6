"""Images beside their ground truth, prediction and errors, in fixed colors."""

import colorsys
import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from img2vec.evaluate.confusion import IGNORED
from tokdiv.figures.style import PALETTE, STYLE, fit_name

COLUMNS = ("image", "ground truth", "prediction", "error")
RIGHT, WRONG, UNLABELED = (222, 226, 228), "#E8000B", (255, 255, 255)
LONGEST = 480  # pixels of a panel's longer side: more cannot be seen
LEGEND = 24  # at most so many classes


def class_colors(num_classes: int) -> NDArray[np.uint8]:
    """The color of each class, (num_classes, 3), the same for any number of classes; none is white or gray.

    Hues turn by the golden angle; every three classes, saturation and value change.
    """
    shades = ((0.75, 0.85), (0.55, 0.95), (0.9, 0.6))
    colors = [
        colorsys.hsv_to_rgb(0.58 + number * 0.618034, *shades[number // 3 % len(shades)])
        for number in range(num_classes)
    ]
    return np.round(255 * np.array(colors).reshape(-1, 3)).astype(np.uint8)


def paint(labels: NDArray[np.integer], colors: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) -> (H, W, 3); IGNORED is white."""
    return np.where(
        (labels == IGNORED)[..., None], np.array(UNLABELED, np.uint8), colors[np.maximum(labels, 0)]
    )


def paint_errors(labels: NDArray[np.integer], predicted: NDArray[np.integer]) -> NDArray[np.uint8]:
    """(H, W) -> (H, W, 3): red where the prediction is wrong, gray where it is right, white where IGNORED."""
    red = tuple(int(WRONG[start : start + 2], 16) for start in (1, 3, 5))
    painted = np.where(
        (labels == predicted)[..., None], np.array(RIGHT, np.uint8), np.array(red, np.uint8)
    )
    return np.where((labels == IGNORED)[..., None], np.array(UNLABELED, np.uint8), painted)


def predictions_figure(
    images: Sequence[NDArray[np.uint8]],
    labels: Sequence[NDArray[np.integer]],
    predicted: Sequence[NDArray[np.integer]],
    classes: Sequence[str],
    width: float = 6.5,
) -> Figure:
    """A row per image: the image, its mask, the prediction, and where that is wrong.

    Args:
        images: (H, W, 3). labels: (H, W), or IGNORED. predicted: (H, W). classes: names, by number.
        width: in inches.
    """
    colors = class_colors(len(classes))
    shown = sorted({int(v) for part in (*labels, *predicted) for v in np.unique(part)} - {IGNORED})
    legend_columns = max(1, int(width / 1.3))
    legend_rows = math.ceil(min(len(shown), LEGEND) / legend_columns)
    panel = width / len(COLUMNS)
    heights = [panel * image.shape[0] / image.shape[1] for image in images]
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(width, sum(heights) + 0.3 + 0.2 * legend_rows), layout="constrained"
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots(
            len(images), len(COLUMNS), squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        for row, image, mask, guess in zip(axes, images, labels, predicted):
            step = max(1, math.ceil(max(mask.shape) / LONGEST))
            panels = (image, paint(mask, colors), paint(guess, colors), paint_errors(mask, guess))
            for cell, picture in zip(row, panels):
                cell.imshow(picture[::step, ::step], interpolation="nearest")
                cell.set_axis_off()
        for cell, title in zip(axes[0], COLUMNS):
            cell.set_title(title)
        named = [
            Patch(color=colors[number] / 255.0, label=fit_name(classes[number], 22, lines=1))
            for number in shown[:LEGEND]
        ]
        if len(shown) > LEGEND:
            named.append(Patch(alpha=0, label=f"and {len(shown) - LEGEND} more"))
        figure.legend(handles=named, loc="outside lower center", ncols=legend_columns)
    return figure


def loss_figure(history: Sequence[dict[str, float]], width: float = 6.5) -> Figure:
    """The loss over the steps.

    Args:
        history: with `step` and `loss`. width: in inches.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, 2.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot(
            [line["step"] for line in history], [line["loss"] for line in history], color=PALETTE[0]
        )
        axes.set(xlabel="step", ylabel="cross-entropy", ylim=(0, None))
        axes.grid(axis="y")
    return figure
