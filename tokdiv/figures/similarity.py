"""Teachers with their intervals and per-image distributions, as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from tokdiv.figures.style import (
    _check_lengths,
    _key,
    _looks,
    _new_figure,
    _styled,
    fit_name,
)


def _densities(
    scores: NDArray[Any], num_bins: int = 1024, tail: float = 5e-4
) -> tuple[NDArray[np.float64], list[NDArray[np.float64] | None], tuple[float, float]]:
    """Smoothed histograms of each column of scores (n, T) on one grid, each with maximum 1.

    Returns the grid (num_bins,), the densities (None where a column has under 5 scores or they are
    all equal) and the range that holds all but a share `tail` of each column at either end. A
    histogram smoothed with a Gaussian of Silverman's width is a kernel density estimate up to the
    bin's width, in one pass over the scores.
    """
    finite = [column[np.isfinite(column)] for column in scores.T]
    filled = [column for column in finite if column.size]
    low = min((float(column.min()) for column in filled), default=0.0)
    high = max((float(column.max()) for column in filled), default=1.0)
    if high - low < 1e-9:
        low, high = low - 0.5e-3, high + 0.5e-3
    edges = np.linspace(low, high, num_bins + 1)
    grid, step = (edges[:-1] + edges[1:]) / 2, (high - low) / num_bins
    densities: list[NDArray[np.float64] | None] = []
    shown = [high, low]
    for column in finite:
        if column.size == 0:
            densities.append(None)
            continue
        counts = np.histogram(column, bins=num_bins, range=(low, high))[0].astype(np.float64)
        share = np.cumsum(counts) / column.size
        shown[0] = min(shown[0], float(edges[int(np.searchsorted(share, tail, side="right"))]))
        shown[1] = max(
            shown[1], float(edges[min(int(np.searchsorted(share, 1 - tail)) + 1, num_bins)])
        )
        mean = float((counts * grid).sum() / column.size)
        deviation = math.sqrt(float((counts * (grid - mean) ** 2).sum() / column.size))
        if column.size < 5 or deviation < step / 2:
            densities.append(None)
            continue
        quartiles = np.interp([0.25, 0.75], share, grid)
        spread = min(deviation, float(quartiles[1] - quartiles[0]) / 1.349) or deviation
        sigma = max(0.9 * spread * column.size**-0.2 / step, 0.8)
        reach = math.ceil(4 * sigma)
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        smooth = np.convolve(np.pad(counts, reach), kernel, mode="same")[reach:-reach]
        densities.append(smooth / smooth.max())
    return grid, densities, (shown[0], shown[1])


@_styled
def similarity_figure(
    names: Sequence[str],
    scores: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    baselines: Sequence[bool] | NDArray[np.bool_],
    *,
    best: str | None = None,
    colors: Mapping[str, str] | None = None,
    confidence: float | None = None,
    width: float = 6.5,
) -> Figure:
    """Each teacher's per-image token similarity and its mean with an interval, best on top.

    Args:
        names: The T teachers.
        scores: (n, T) token similarity of each image, NaN where it was not measured.
        low, high: (T,) interval of each mean similarity; NaN draws none.
        baselines: (T,) True for a baseline: a hollow marker and '(baseline)'.
        best: The winner's name, marked with a star; None marks none.
        colors: From `teacher_colors`; by default made from `names`.
        confidence: Of the intervals, in (0, 1), for their label.
        width: Inches; 3.3 fits one column of a paper.

    Raises:
        ValueError: `scores`, `low`, `high` or `baselines` do not match `names`.
    """
    values = np.asarray(scores)
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"scores have shape {values.shape}, expected (images, teachers)")
    num_teachers = len(names)
    _check_lengths(
        num_teachers, scores=values.shape[1], low=len(low), high=len(high), baselines=len(baselines)
    )
    known, _, _ = _looks(names, colors)
    measured = np.isfinite(values).sum(axis=0)
    sums = np.nansum(values, axis=0, dtype=np.float64)
    means = np.where(measured > 0, sums / np.maximum(measured, 1), np.nan)
    order = np.argsort(means, kind="stable")  # NaN, a teacher without scores, comes last.
    grid, densities, (left, right) = _densities(values)
    interval = np.concatenate([low[np.isfinite(low)], high[np.isfinite(high)]])
    left, right = min([left, *interval]), max([right, *interval])
    margin = 0.04 * (right - left)

    narrow = width < 5
    name_width, name_lines = (16, 3) if narrow else (30, 2)
    labels = [_row_label(names[i], bool(baselines[i]), name_width, name_lines) for i in order]
    row = 0.32 + 0.05 * max(label.count("\n") + 1 for label in labels)
    figure = _new_figure(width, (1.75 if narrow else 1.35) + row * num_teachers)
    axes = figure.add_subplot()
    axes.set_xlim(left - margin, right + margin)
    axes.set_ylim(num_teachers - 0.45, -0.85)
    digits = _digits(high - low)
    texts = []
    for place, i in enumerate(order):
        color = known[names[i]]
        column = values[:, i]
        if names[i] == best:
            axes.axhspan(place - 0.71, place + 0.3, color="#F1F1EA", zorder=0, linewidth=0)
        axes.axhline(place, color="#DDDDDD", linewidth=0.6, zorder=0.5)
        _draw_distribution(axes, place, grid, densities[i], column, color, bool(baselines[i]))
        if measured[i] == 0:
            texts.append("not measured")
            continue
        if np.isfinite(low[i]) and np.isfinite(high[i]):
            axes.hlines(place, low[i], high[i], color="#222222", linewidth=1.8, zorder=4)
        face = "white" if baselines[i] else color
        edge = color if baselines[i] else "#222222"
        axes.plot(means[i], place, "o", ms=4.5, mfc=face, mec=edge, mew=1.0, zorder=5)
        texts.append(_value_label(means[i], low[i], high[i], digits, narrow))
    axes.set_yticks(range(num_teachers), [])
    axes.tick_params(axis="y", length=0)
    axes.set_yticklabels(
        [("★ " if names[i] == best else "") + label for i, label in zip(order, labels)]
    )
    axes.set_xlabel("mean token similarity (lower = more diverse)")
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 7))
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    top = axes.secondary_xaxis("top", functions=(_complement, _complement))
    top.set_xlabel("token diversity = 1 - similarity")
    top.xaxis.set_major_locator(MaxNLocator(4 if narrow else 7))
    side = axes.secondary_yaxis("right")
    side.set_yticks(range(num_teachers), texts)
    side.tick_params(axis="y", length=0)
    side.spines["right"].set_visible(False)
    for place, i in enumerate(order):
        if names[i] == best:
            axes.get_yticklabels()[place].set_fontweight("bold")
            side.get_yticklabels()[place].set_fontweight("bold")
    num_images = int(measured.max(initial=0))
    images = f"{num_images:,} image" + ("" if num_images == 1 else "s")
    _similarity_legend(figure, baselines, best, confidence, images, narrow)
    return figure


def _complement(values: Any) -> Any:
    """Similarity to diversity and back."""
    return 1 - values


def _row_label(name: str, baseline: bool, width: int, lines: int) -> str:
    label = fit_name(name, width, lines)
    if not baseline:
        return label
    last = label.rsplit("\n", 1)[-1]
    return label + (" " if len(last) + 11 <= width else "\n") + "(baseline)"


def _digits(widths: NDArray[np.float64]) -> int:
    """Decimals that still show the narrowest interval: 3 to 5."""
    positive = widths[np.isfinite(widths) & (widths > 0)]
    if positive.size == 0:
        return 3
    return int(np.clip(math.ceil(-math.log10(float(positive.min()) / 2)), 3, 5))


def _value_label(mean: float, low: float, high: float, digits: int, narrow: bool) -> str:
    label = f"{mean:.{digits}f}"
    if np.isfinite(low) and np.isfinite(high):
        label += ("\n" if narrow else "  ") + f"[{low:.{digits}f}, {high:.{digits}f}]"
    return label.replace("-", "\N{MINUS SIGN}")


def _draw_distribution(
    axes: Axes,
    place: int,
    grid: NDArray[np.float64],
    density: NDArray[np.float64] | None,
    column: NDArray[Any],
    color: str,
    baseline: bool,
) -> None:
    """The half violin above a row's line, and a tick an image where there are few."""
    column = column[np.isfinite(column)]
    if density is not None:
        inside = density > 1e-3
        first, last = np.flatnonzero(inside)[[0, -1]]
        part = slice(max(first - 1, 0), last + 2)
        top = place - 0.66 * density[part]
        axes.fill_between(
            grid[part],
            place,
            top,
            color=color,
            alpha=0.0 if baseline else 0.35,
            linewidth=0,
            zorder=2,
        )
        axes.plot(grid[part], top, color=color, linewidth=0.9, zorder=3)
    if column.size <= 100 or density is None:
        ticks = np.unique(column)[:: max(1, column.size // 100)]
        axes.vlines(ticks, place + 0.12, place + 0.25, color=color, linewidth=0.8, zorder=2)


def _similarity_legend(
    figure: Figure,
    baselines: Sequence[bool] | NDArray[np.bool_],
    best: str | None,
    confidence: float | None,
    images: str,
    narrow: bool,
) -> None:
    percent = "" if confidence is None else f"{100 * confidence:.6g}% "
    handles: list[Any] = [
        Patch(facecolor="#BBBBBB", edgecolor="#777777", label=f"distribution over {images}"),
        _key(f"mean and its {percent}interval", "#222222", marker="o", mfc="#777777", ms=5, lw=1.2),
    ]
    if any(baselines):
        handles.append(_key("baseline", "none", marker="o", mfc="white", mec="#777777"))
    if best is not None:
        handles.append(_key("best", "none", marker="*", ms=8, mfc="#222222", mec="none"))
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if narrow else len(handles))
