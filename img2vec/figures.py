"""Figures of a pretraining: its curves, and what teacher and student make of a few images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from tokdiv.figures.style import INK, PALETTE, save_figure, styled

Lines = Sequence[dict[str, Any]]  # of metrics.jsonl

MAX_POINTS = 400  # per curve: more cannot be told apart at a page's width
# Key in metrics.jsonl -> label, color, dashes.
LOSSES: dict[str, tuple[str, str, Any]] = {
    "loss": ("loss", INK, "-"),
    "patch_loss": ("patch loss", PALETTE[0], (0, (5, 1.5))),
    "global_loss": ("global loss", PALETTE[1], (0, (1.5, 1.2))),
}
MASKED_GRAY = 0.72  # in place of what the student does not see
NO_PREDICTION = 1.0  # white, where the student saw the image


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a line cut short by a crash is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def plot_loss(metrics: Path, path: Path) -> None:
    """Draw metrics.jsonl into a file with `loss_figure`; without a finite loss nothing is drawn."""
    lines = read_metrics(metrics)
    if any(line.get("loss") is not None for line in lines):
        save_figure(loss_figure(lines), path)


@styled
def loss_figure(lines: Lines, width: float = 6.5) -> Figure:
    """The losses over the steps, and below them the k-NN accuracy where it was measured.

    Args:
        lines: of metrics.jsonl. width: inches.
    """
    steps, accuracies = _series(lines, "knn_accuracy")
    figure = Figure(figsize=(width, 4.4 if len(steps) else 3.0), layout="constrained")
    if len(steps):
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        _draw_accuracy(below, steps, accuracies)
    else:
        axes = below = figure.add_subplot()
    _draw_losses(axes, lines)
    below.set_xlabel("step")
    figure.align_ylabels()
    return figure


@styled
def watch_figure(lines: Lines, width: float = 6.5) -> Figure:
    """The learning rate, the throughput, and the similarity of the student's own tokens over the steps.

    Args:
        lines: of metrics.jsonl. width: inches.
    """
    similarity = _series(lines, "token_similarity")
    rows = 3 if len(similarity[0]) else 2
    figure = Figure(figsize=(width, 0.5 + 1.35 * rows), layout="constrained")
    panels = figure.subplots(rows, 1, sharex=True)
    _curve(panels[0], *_series(lines, "lr"), PALETTE[0], "-")
    panels[0].set_ylabel("learning rate")
    panels[0].set_ylim(bottom=0)
    panels[0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    _curve(panels[1], *_series(lines, "images_per_second"), PALETTE[2], "-")
    panels[1].set_ylabel("images/s")
    panels[1].set_ylim(bottom=0)
    if rows == 3:
        _curve(panels[2], *similarity, PALETTE[1], "-")
        panels[2].axhline(1, color="#666666", linewidth=0.8, linestyle=(0, (4, 2)))
        panels[2].text(
            0.01, 0.96, "1: all tokens of an image alike", va="top", color="#444444",
            fontsize=7.5, transform=panels[2].get_yaxis_transform(),
        )  # fmt: skip
        panels[2].set_ylim(min(0.0, 1.1 * float(similarity[1].min())), 1.06)
        panels[2].set_ylabel("token similarity")
    for axes in panels:
        _add_grid(axes)
    panels[-1].set_xlabel("step")
    figure.align_ylabels()
    return figure


@styled
def predictions_figure(
    views: NDArray[np.uint8],
    seen: NDArray[np.bool_],
    targets: NDArray[Any],
    predictions: NDArray[Any],
    width: float = 6.5,
) -> Figure:
    """A row per image: the view, what the student saw of it, the teacher's tokens, the predicted ones.

    Args:
        views: uint8 (n, S, S, 3).
        seen: bool (n, rows, columns) on the grid of mask units, True where the student saw the image.
        targets: float (n, rows, columns, 3), colors in [0, 1].
        predictions: the same, NaN where nothing was predicted.
        width: inches; below 5 the headings take two lines.
    """
    titles = ["image", "what the student sees", "teacher's tokens", "predicted tokens"]
    if width < 5:
        titles = ["image", "seen", "teacher's\ntokens", "predicted\ntokens"]
    height = width / 4 * len(views) + (0.4 if width < 5 else 0.3)
    tight = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(width, height), layout=tight)
    panels = figure.subplots(len(views), 4, squeeze=False)
    for row, (view, mask, target, prediction) in enumerate(zip(views, seen, targets, predictions)):
        unit = len(view) // len(mask)
        shown = np.kron(mask, np.ones((unit, unit), dtype=bool))[..., None]
        pictures = [
            view,
            np.where(shown, view / 255, MASKED_GRAY),
            target,
            np.where(np.isnan(prediction), NO_PREDICTION, prediction),
        ]
        for axes, picture in zip(panels[row], pictures):
            axes.imshow(picture, interpolation="nearest", extent=(0, 1, 0, 1))
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(True)
    for axes, title in zip(panels[0], titles):
        axes.set_title(title)
    return figure


def _draw_losses(axes: Axes, lines: Lines) -> None:
    for key, (label, color, dash) in LOSSES.items():
        steps, values = _series(lines, key)
        if not len(steps) or (key != "loss" and not values.any()):
            continue  # a global loss that is turned off is 0 throughout
        _curve(axes, steps, values, color, dash, label, smooth=True)
    axes.set_ylabel("smooth L1 loss")
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper right", ncols=3)
        axes.set_ylim(top=1.12 * axes.get_ylim()[1])  # room for the legend
    _add_grid(axes)


def _draw_accuracy(axes: Axes, steps: NDArray[Any], values: NDArray[Any]) -> None:
    axes.plot(steps, 100 * values, color=PALETTE[2], marker="o", markersize=4)
    axes.annotate(
        f"{100 * values[-1]:.1f}%", (steps[-1], 100 * values[-1]), xytext=(0, 6), ha="right",
        textcoords="offset points", color="#00543C", fontsize=7.5,
    )  # fmt: skip
    axes.margins(y=0.3)
    axes.set_ylabel("k-NN accuracy (%)")
    _add_grid(axes)


def _add_grid(axes: Axes) -> None:
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _series(lines: Lines, key: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps and values of one quantity, where it was measured."""
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    steps, values = zip(*found) if found else ((), ())
    return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)


def _curve(
    axes: Axes,
    steps: NDArray[np.int64],
    values: NDArray[np.float64],
    color: str,
    dash: Any,
    label: str = "",
    smooth: bool = False,
) -> None:
    """Draw a line; of more than MAX_POINTS points their local means, over a band of their range.

    Args:
        smooth: draw the line pale, and its running mean over it.
    """
    if not len(steps):
        return
    chunks = np.array_split(np.arange(len(steps)), min(MAX_POINTS, len(steps)))
    x = np.array([steps[c].mean() for c in chunks])
    means = np.array([values[c].mean() for c in chunks])
    if len(chunks) < len(steps):
        low, high = (np.array([f(values[c]) for c in chunks]) for f in (np.min, np.max))
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    if len(chunks) == 1:
        axes.plot(x, means, color=color, marker="o", markersize=4, linestyle="", label=label)
        return
    if smooth:
        axes.plot(x, means, color=color, alpha=0.3, linewidth=0.7)
        means = _running_mean(means)
    axes.plot(x, means, color=color, linestyle=dash, label=label)


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential moving average over about a fiftieth of the curve, which shows the trend through the noise."""
    weight = 2 / (1 + max(1.0, len(values) / 50))
    result, mean = [], float(values[0])
    for value in values.tolist():
        mean += weight * (value - mean)
        result.append(mean)
    return np.array(result)
