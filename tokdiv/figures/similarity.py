"""Figure: each teacher's distribution of token similarity over the images, and its mean with an interval."""

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
    INK,
    check_lengths,
    fit_name,
    legend_entry,
    new_figure,
    styled,
    teacher_looks,
)

NUM_BINS = 1024  # of the histogram that a density is smoothed from
TAIL = 5e-4  # share of a teacher's scores that may lie outside of the figure, at either end
MAX_TICKS = 100  # a tick per image, for up to so many images


@styled
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
    """Draw a row per teacher, the lowest mean similarity on top.

    Args:
        names: the T teachers.
        scores: floating (n, T), token similarity of each image, NaN where it was not measured.
        low, high: (T,) interval of each mean similarity; NaN draws none.
        baselines: (T,) True for a baseline: a hollow marker and '(baseline)'.
        best: the winner's name, marked with a star; None marks none.
        colors: from `teacher_colors`; by default made from `names`.
        confidence: of the intervals, in (0, 1), for their label.
        width: inches; 3.3 fits one column of a paper.

    Raises:
        ValueError: `scores`, `low`, `high` or `baselines` do not match `names`.
    """
    values = np.asarray(scores)
    low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"scores have shape {values.shape}, expected (images, teachers)")
    num_teachers = len(names)
    check_lengths(
        num_teachers, scores=values.shape[1], low=len(low), high=len(high), baselines=len(baselines)
    )
    known, _, _ = teacher_looks(names, colors)
    measured = np.isfinite(values).sum(axis=0)
    sums = np.nansum(values, axis=0, dtype=np.float64)
    means = np.where(measured > 0, sums / np.maximum(measured, 1), np.nan)
    order = np.argsort(means, kind="stable")  # NaN, a teacher without scores, comes last
    grid, densities, (left, right) = _densities(values)
    ends = np.concatenate([low[np.isfinite(low)], high[np.isfinite(high)]])
    left, right = min([left, *ends]), max([right, *ends])
    margin = 0.04 * (right - left)

    narrow = width < 5
    name_width, name_lines = (16, 3) if narrow else (30, 2)
    labels = [row_label(names[i], bool(baselines[i]), name_width, name_lines) for i in order]
    row_height = 0.32 + 0.05 * max(label.count("\n") + 1 for label in labels)
    figure = new_figure(width, (1.75 if narrow else 1.35) + row_height * num_teachers)
    axes = figure.add_subplot()
    axes.set_xlim(left - margin, right + margin)
    axes.set_ylim(num_teachers - 0.45, -0.85)
    digits = _digits(high - low)
    texts = []
    for row, i in enumerate(order):
        if names[i] == best:
            axes.axhspan(row - 0.71, row + 0.3, color="#F1F1EA", zorder=0, linewidth=0)
        axes.axhline(row, color="#DDDDDD", linewidth=0.6, zorder=0.5)
        color = known[names[i]]
        _draw_distribution(axes, row, grid, densities[i], values[:, i], color, bool(baselines[i]))
        if measured[i]:
            _draw_mean(axes, row, means[i], low[i], high[i], color, bool(baselines[i]))
            texts.append(_value_label(means[i], low[i], high[i], digits, narrow))
        else:
            texts.append("not measured")
    stars = [names[i] == best for i in order]
    _label_axes(axes, labels, texts, stars, num_ticks=4 if narrow else 7)
    _add_legend(figure, any(baselines), best is not None, confidence, measured, narrow)
    return figure


def row_label(name: str, baseline: bool, width: int, lines: int) -> str:
    """A name broken into lines, with '(baseline)' behind it where it is one."""
    label = fit_name(name, width, lines)
    if not baseline:
        return label
    last = label.rsplit("\n", 1)[-1]
    return label + (" " if len(last) + 11 <= width else "\n") + "(baseline)"


def _densities(
    scores: NDArray[Any],
) -> tuple[NDArray[np.float64], list[NDArray[np.float64] | None], tuple[float, float]]:
    """Kernel density estimates of each column of scores (n, T) on one grid, each with maximum 1.

    A histogram smoothed with a Gaussian of Silverman's width is a kernel density estimate up to the bin's width, in
    one pass over the scores.

    Returns:
        The grid (NUM_BINS,); the densities, None where a column has under 5 scores or they are all equal; and the
        range that holds all but a share TAIL of each column at either end.
    """
    finite = [column[np.isfinite(column)] for column in scores.T]
    filled = [column for column in finite if column.size]
    low = min((float(column.min()) for column in filled), default=0.0)
    high = max((float(column.max()) for column in filled), default=1.0)
    if high - low < 1e-9:
        low, high = low - 0.5e-3, high + 0.5e-3
    edges = np.linspace(low, high, NUM_BINS + 1)
    grid, step = (edges[:-1] + edges[1:]) / 2, (high - low) / NUM_BINS
    densities: list[NDArray[np.float64] | None] = []
    shown = [high, low]
    for column in finite:
        if column.size == 0:
            densities.append(None)
            continue
        counts = np.histogram(column, bins=NUM_BINS, range=(low, high))[0].astype(np.float64)
        share = np.cumsum(counts) / column.size
        first = int(np.searchsorted(share, TAIL, side="right"))
        last = min(int(np.searchsorted(share, 1 - TAIL)) + 1, NUM_BINS)
        shown = [min(shown[0], float(edges[first])), max(shown[1], float(edges[last]))]
        mean = float((counts * grid).sum() / column.size)
        deviation = math.sqrt(float((counts * (grid - mean) ** 2).sum() / column.size))
        if column.size < 5 or deviation < step / 2:
            densities.append(None)
            continue
        quartiles = np.interp([0.25, 0.75], share, grid)
        spread = min(deviation, float(quartiles[1] - quartiles[0]) / 1.349) or deviation
        sigma = max(0.9 * spread * column.size**-0.2 / step, 0.8)  # in bins
        reach = math.ceil(4 * sigma)
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        smooth = np.convolve(np.pad(counts, reach), kernel, mode="same")[reach:-reach]
        densities.append(smooth / smooth.max())
    return grid, densities, (shown[0], shown[1])


def _draw_distribution(
    axes: Axes,
    row: int,
    grid: NDArray[np.float64],
    density: NDArray[np.float64] | None,
    column: NDArray[Any],
    color: str,
    baseline: bool,
) -> None:
    """Draw the half violin above a row's line, and ticks below it where there are few images."""
    column = column[np.isfinite(column)]
    if density is not None:
        inside = density > 1e-3
        first, last = np.flatnonzero(inside)[[0, -1]]
        part = slice(max(first - 1, 0), last + 2)
        top = row - 0.66 * density[part]
        alpha = 0.0 if baseline else 0.35
        axes.fill_between(grid[part], row, top, color=color, alpha=alpha, linewidth=0, zorder=2)
        axes.plot(grid[part], top, color=color, linewidth=0.9, zorder=3)
    if column.size <= MAX_TICKS or density is None:
        ticks = np.unique(column)[:: max(1, column.size // MAX_TICKS)]
        axes.vlines(ticks, row + 0.12, row + 0.25, color=color, linewidth=0.8, zorder=2)


def _draw_mean(
    axes: Axes, row: int, mean: float, low: float, high: float, color: str, baseline: bool
) -> None:
    if np.isfinite(low) and np.isfinite(high):
        axes.hlines(row, low, high, color=INK, linewidth=1.8, zorder=4)
    face, edge = ("white", color) if baseline else (color, INK)
    axes.plot(mean, row, "o", ms=4.5, mfc=face, mec=edge, mew=1.0, zorder=5)


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


def _label_axes(
    axes: Axes, labels: list[str], texts: list[str], stars: list[bool], num_ticks: int
) -> None:
    """Names on the left, values on the right, similarity below, diversity above; the winner's row in bold."""
    axes.set_yticks(range(len(labels)), [])
    axes.tick_params(axis="y", length=0)
    axes.set_yticklabels([("★ " if star else "") + label for star, label in zip(stars, labels)])
    axes.set_xlabel("mean token similarity (lower = more diverse)")
    axes.xaxis.set_major_locator(MaxNLocator(num_ticks))
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    top = axes.secondary_xaxis("top", functions=(_complement, _complement))
    top.set_xlabel("token diversity = 1 - similarity")
    top.xaxis.set_major_locator(MaxNLocator(num_ticks))
    side = axes.secondary_yaxis("right")
    side.set_yticks(range(len(labels)), texts)
    side.tick_params(axis="y", length=0)
    side.spines["right"].set_visible(False)
    for row, star in enumerate(stars):
        if star:
            axes.get_yticklabels()[row].set_fontweight("bold")
            side.get_yticklabels()[row].set_fontweight("bold")


def _complement(values: Any) -> Any:
    """Similarity to diversity, and back."""
    return 1 - values


def _add_legend(
    figure: Figure,
    has_baselines: bool,
    has_best: bool,
    confidence: float | None,
    measured: NDArray[np.int64],
    narrow: bool,
) -> None:
    num_images = int(measured.max(initial=0))
    images = f"{num_images:,} image" + ("" if num_images == 1 else "s")
    percent = "" if confidence is None else f"{100 * confidence:.6g}% "
    mean = f"mean and its {percent}interval"
    handles: list[Any] = [
        Patch(facecolor="#BBBBBB", edgecolor="#777777", label=f"distribution over {images}"),
        legend_entry(mean, INK, marker="o", mfc="#777777", ms=5, lw=1.2),
    ]
    if has_baselines:
        handles.append(legend_entry("baseline", "none", marker="o", mfc="white", mec="#777777"))
    if has_best:
        handles.append(legend_entry("best", "none", marker="*", ms=8, mfc=INK, mec="none"))
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if narrow else len(handles))
