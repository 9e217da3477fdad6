"""Arrays to matplotlib figures: everything that tokdiv draws, in one style.

Figures are built with matplotlib's object-oriented interface (no pyplot, no global state), so they
can be drawn on a cluster without a display and in threads that do not share figures. A teacher has
one colour, from `teacher_colours`, in every figure that is given the same dict.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike, NDArray

from tokdiv.errors import UsageError

# Okabe and Ito's palette (2008), told apart under the three common colour-vision deficiencies.
# Its yellow is left out, as it cannot be seen on white, and its black is a grey, as black is text.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "h")
DASHES: Any = ("-", "--", ":", "-.")
QUERY_COLOUR = "#E8000B"
COLOUR_MAP = "viridis"
METADATA: dict[str, dict[str, Any]] = {  # of each kind of file, what would change from run to run
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "axes.unicode_minus": True,
    "grid.color": "#E2E2E2",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "text.usetex": False,
    "svg.hashsalt": "tokdiv",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
}

Parameters = ParamSpec("Parameters")


def _styled(draw: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """Draw under STYLE and give the caller's own settings back afterwards."""

    @wraps(draw)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def _new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def teacher_colours(names: Collection[str]) -> dict[str, str]:
    """One colour a teacher, as '#rrggbb', the same whatever the order of `names`.

    The first seven names (alphabetically) get the seven colours of PALETTE, the next seven the
    same hues darkened, the next lightened, and so on; from the 29th name on, colours repeat.
    Line plots and scatters tell teachers apart by marker too.
    """
    shades = ((0.0, 0.0), (0.0, 0.5), (1.0, 0.5), (0.0, 0.75))  # (towards: 0 black, 1 white; share)
    colours = {}
    for index, name in enumerate(sorted(set(names))):
        towards, share = shades[index // len(PALETTE) % len(shades)]
        rgb = np.array(to_rgb(PALETTE[index % len(PALETTE)]))
        colours[name] = to_hex(tuple(rgb * (1 - share) + towards * share))
    return colours


def _looks(
    names: Sequence[str], colours: Mapping[str, str] | None
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Colour, marker and dash of each name; markers and dashes follow the colours' order."""
    known = {**teacher_colours(names), **(colours or {})}
    order = sorted(known)
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(order)}
    dashes = {name: DASHES[index // len(PALETTE) % len(DASHES)] for index, name in enumerate(order)}
    return known, markers, dashes


def _ink(colour: str) -> str:
    """`colour` darkened until small text in it can be read on white."""
    return to_hex(tuple(0.6 * np.array(to_rgb(colour))))


def _key(label: str, colour: str, **style: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=colour, label=label, **style)


def fit_name(name: str, width: int, lines: int = 2) -> str:
    """Break `name` into at most `lines` lines of `width` characters, its middle elided if need be.

    Lines break after '/', ':', '@', '_', '.', '-', '=' or a space where one is near the end. Dollar
    signs are escaped, so that matplotlib does not read formulas into names.
    """
    name = re.sub(r"\s+", " ", name).strip()
    capacity = width * lines
    while True:
        rest, wrapped = name, []
        if len(name) > capacity:
            head = math.ceil((capacity - 1) / 2)
            rest = name[:head] + "…" + name[len(name) - (capacity - 1 - head) :]
        while len(rest) > width:
            breaks = [m.end() for m in re.finditer(r"[/:@_.\-= …]", rest[:width])]
            cut = breaks[-1] if breaks and breaks[-1] > width // 2 else width
            wrapped.append(rest[:cut])
            rest = rest[cut:]
        wrapped.append(rest)
        if len(wrapped) <= lines:
            return "\n".join(line.strip() for line in wrapped).replace("$", r"\$")
        capacity -= 1  # Breaking at separators left room unused: elide a little more.


def _check_lengths(num_teachers: int, **lengths: int) -> None:
    for argument, length in lengths.items():
        if length != num_teachers:
            raise ValueError(
                f"{argument} has {length} entries, expected {num_teachers}, one a teacher"
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
    colours: Mapping[str, str] | None = None,
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
        colours: From `teacher_colours`; by default made from `names`.
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
    known, _, _ = _looks(names, colours)
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
        colour = known[names[i]]
        column = values[:, i]
        if names[i] == best:
            axes.axhspan(place - 0.71, place + 0.3, color="#F1F1EA", zorder=0, linewidth=0)
        axes.axhline(place, color="#DDDDDD", linewidth=0.6, zorder=0.5)
        _draw_distribution(axes, place, grid, densities[i], column, colour, bool(baselines[i]))
        if measured[i] == 0:
            texts.append("not measured")
            continue
        if np.isfinite(low[i]) and np.isfinite(high[i]):
            axes.hlines(place, low[i], high[i], color="#222222", linewidth=1.8, zorder=4)
        face = "white" if baselines[i] else colour
        edge = colour if baselines[i] else "#222222"
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
    colour: str,
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
            color=colour,
            alpha=0.0 if baseline else 0.35,
            linewidth=0,
            zorder=2,
        )
        axes.plot(grid[part], top, color=colour, linewidth=0.9, zorder=3)
    if column.size <= 100 or density is None:
        ticks = np.unique(column)[:: max(1, column.size // 100)]
        axes.vlines(ticks, place + 0.12, place + 0.25, color=colour, linewidth=0.8, zorder=2)


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


@_styled
def maps_figure(
    views: Sequence[NDArray[np.uint8]],
    names: Sequence[str],
    maps: Sequence[Sequence[NDArray[Any]]],
    queries: Sequence[tuple[float, float, float, float]],
    similarities: ArrayLike,
    *,
    tokens: Sequence[Sequence[tuple[int, int]]] | None = None,
    colours: Mapping[str, str] | None = None,
    lowest: float | None = None,
) -> Figure:
    """Similarity maps: an image a row, its query patch in red, and a panel a teacher.

    After figure 3 of Pan et al., arXiv 2304.12535.

    Args:
        views: N images, uint8 (H, W, 3), as the teachers saw them.
        names: The T teachers.
        maps: maps[i][t], (h, w): the cosine, in [-1, 1], of each token of image i under teacher t
            to its query token; NaN is drawn grey.
        queries: N rectangles (row0, column0, row1, column1) in fractions of the view, in [0, 1].
        similarities: (N, T) token similarity S(x) of each image.
        tokens: tokens[i][t], (row, column) of the query token in the teacher's own grid; by
            default the token that holds the rectangle's centre.
        colours: From `teacher_colours`; by default made from `names`.
        lowest: The lower end of the scale, for several figures of one scale; by default what the
            maps need.

    Raises:
        ValueError: The lengths do not match.
    """
    num_images, num_teachers = len(views), len(names)
    values = np.asarray(similarities, dtype=np.float64).reshape(num_images, -1)
    if num_images == 0 or not num_images == len(maps) == len(queries):
        raise ValueError(
            f"{num_images} views, {len(maps)} rows of maps and {len(queries)} queries: "
            "expected one each an image, and at least one"
        )
    for row in maps:
        _check_lengths(num_teachers, maps=len(row), similarities=values.shape[1])
    known, _, _ = _looks(names, colours)
    # One scale for all panels; its upper end is a token's cosine with itself.
    scale = Normalize(lowest_cosine(maps) if lowest is None else lowest, 1.0)
    colour_map = mpl.colormaps[COLOUR_MAP].with_extremes(bad="#BDBDBD")

    # Readable panels first, then a page: 6.2 inches wide, 8 high.
    panel = float(np.clip(min(6.2 / (num_teachers + 1), 8 / num_images), 1.1, 1.9))
    characters = max(10, int(panel * 72 / 4.6))
    titles = [fit_name(name, characters, 3) for name in names]
    header = 0.12 * max(title.count("\n") + 1 for title in titles)
    aspect = max(view.shape[0] / view.shape[1] for view in views)
    height = 0.15 + header + num_images * (panel * aspect + 0.24)
    figure = _new_figure(max(panel * (num_teachers + 1) + 0.75, 3.3), max(height, 1.6))
    grid = figure.subplots(num_images, num_teachers + 1, squeeze=False)
    image = None
    for i, view in enumerate(views):
        height, width = view.shape[:2]
        row0, column0, row1, column1 = queries[i]
        box = (row0 * height, column0 * width, row1 * height, column1 * width)
        _draw_panel(grid[i, 0], view, (height, width), box, "#666666")
        if i == 0:
            grid[i, 0].set_title("image and query\n", fontsize=7)
        for t, name in enumerate(names):
            cosines = np.ma.masked_invalid(np.asarray(maps[i][t], dtype=np.float64))
            rows, columns = cosines.shape
            if tokens is None:
                token = (
                    min(int((row0 + row1) / 2 * rows), rows - 1),
                    min(int((column0 + column1) / 2 * columns), columns - 1),
                )
            else:
                token = tokens[i][t]
            box = (
                token[0] / rows * height,
                token[1] / columns * width,
                (token[0] + 1) / rows * height,
                (token[1] + 1) / columns * width,
            )
            image = _draw_panel(
                grid[i, t + 1],
                cosines,
                (height, width),
                box,
                known[name],
                cmap=colour_map,
                norm=scale,
            )
            similarity = f"S(x) = {values[i, t]:.3f}".replace("-", "\N{MINUS SIGN}")
            title = f"{titles[t]}\n{similarity}" if i == 0 else similarity
            grid[i, t + 1].set_title(title, fontsize=7)
    if image is not None:
        bar = figure.colorbar(
            image,
            ax=list(grid.flat),
            shrink=min(1.0, 2.6 / (num_images * panel)) if num_images > 1 else 0.9,
            aspect=18 if num_images > 1 else 12,
            pad=0.015,
        )
        line_end = "\n" if num_images == 1 else " "
        bar.set_label(f"cosine similarity{line_end}to the query token")
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(labelsize=7)
    return figure


def lowest_cosine(maps: Sequence[Sequence[NDArray[Any]]]) -> float:
    """The lower end of a scale for all these maps: at most 0, rounded down to 0.05."""
    finite = [float(np.nanmin(m)) for row in maps for m in row if np.isfinite(m).any()]
    return min(0.0, math.floor(min(finite, default=0.0) * 20) / 20)


def _draw_panel(
    axes: Axes,
    pixels: NDArray[Any],
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    frame: str,
    **options: Any,
) -> Any:
    """Draw pixels over a view of `size` (rows, columns) and outline `box` (row0, column0, ...)."""
    height, width = size
    image = axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest", **options)
    top, left, bottom, right = box
    outline = Rectangle(
        (left, top), right - left, bottom - top, fill=False, ec=QUERY_COLOUR, linewidth=1.3
    )
    outline.set_path_effects([withStroke(linewidth=2.6, foreground="white")])
    axes.add_patch(outline)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, color=frame, linewidth=1.6)
    return image


@_styled
def depth_figure(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]],
    *,
    colours: Mapping[str, str] | None = None,
    width: float = 6.5,
) -> Figure:
    """Token similarity by block depth, the most diverse block of each teacher marked.

    Args:
        curves: name -> (depth, mean, low, high), each (blocks,). Integer depths are zero-based
            block numbers; floating ones are fractions of the network's depth, in [0, 1]. NaN in
            low and high draws no band.
        colours: From `teacher_colours`; by default made from the names.
        width: Inches.

    Raises:
        ValueError: No curve, or a curve whose arrays differ in length.
    """
    if not curves:
        raise ValueError("no curve to draw, expected at least one teacher")
    names = list(curves)
    known, markers, dashes = _looks(names, colours)
    by_block = all(np.asarray(curve[0]).dtype.kind in "iu" for curve in curves.values())
    columns = 2 if width >= 5 else 1
    legend_rows = math.ceil((len(names) + 1) / columns)
    figure = _new_figure(width, float(np.clip(0.5 * width, 2.4, 3.6)) + 0.17 * legend_rows)
    axes = figure.add_subplot()
    points, texts, inks = [], [], []
    handles: list[Line2D] = []
    paths: list[tuple[float, float]] = []
    for name, curve in curves.items():
        depth, mean, low, high = (np.asarray(array, dtype=np.float64) for array in curve)
        if not len(depth) == len(mean) == len(low) == len(high) > 0:
            raise ValueError(
                f"{name}: depth, mean, low and high have {len(depth)}, {len(mean)}, {len(low)} and "
                f"{len(high)} entries, expected equal lengths of at least 1"
            )
        colour, marker = known[name], markers[name]
        axes.fill_between(depth, low, high, color=colour, alpha=0.18, linewidth=0)
        style: dict[str, Any] = {"linestyle": dashes[name], "marker": marker, "ms": 3.5, "mew": 0}
        axes.plot(depth, mean, color=colour, **style)
        label = fit_name(name, 32, 1)
        if np.isfinite(mean).any():
            lowest = int(np.nanargmin(mean))
            axes.plot(depth[lowest], mean[lowest], marker, ms=8, mfc=colour, mec="#222222")
            where = f"block {depth[lowest]:.0f}" if by_block else f"{depth[lowest]:.2f}"
            label += f": {mean[lowest]:.3f} at {where}".replace("-", "\N{MINUS SIGN}")
            points.append((float(depth[lowest]), float(mean[lowest])))
            texts.append(where)
            inks.append(_ink(colour))
        handles.append(_key(label, colour, **style))
        fine = np.linspace(depth[0], depth[-1], 100)
        paths.extend(zip(fine, np.interp(fine, depth, mean)))
    axes.set_xlabel("block (zero-based)" if by_block else "depth (fraction of the network)")
    axes.set_ylabel("mean token similarity\n(lower = more diverse)")
    if by_block:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.dataLim.width == 0:
            axes.set_xlim(axes.dataLim.x0 - 1, axes.dataLim.x0 + 1)
    axes.margins(x=0.06, y=0.14)
    axes.grid(axis="y")
    handles.append(
        _key("large: the most diverse block", "none", marker="o", ms=7, mfc="#BBB", mec="#222222")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    _place_labels(figure, axes, points, texts, inks, paths)
    return figure


@_styled
def diversity_accuracy_figure(
    table: pd.DataFrame,
    *,
    colours: Mapping[str, str] | None = None,
    accuracy_label: str = "accuracy of the pretrained student",
    width: float = 5.5,
) -> Figure:
    """Token diversity of each teacher against the accuracy of the student it taught.

    After figure 1 of Pan et al., arXiv 2304.12535.

    Args:
        table: Columns `name`, `diversity`, `accuracy`, and if known `baseline` (bool, hollow
            markers), `accuracy_low` and `accuracy_high` (error bars). Rows without diversity or
            accuracy are left out.
        colours: From `teacher_colours`; by default made from the names.
        accuracy_label: What the accuracy is, for the axis.
        width: Inches.

    Raises:
        ValueError: A column is missing, or no row has both values.
    """
    for column in ("name", "diversity", "accuracy"):
        if column not in table:
            raise ValueError(f"no column {column!r} in {list(table)}: name, diversity and accuracy")
    rows = table.dropna(subset=["diversity", "accuracy"])
    if rows.empty:
        raise ValueError("no row with a diversity and an accuracy, expected at least one")
    names = [str(name) for name in rows["name"]]
    known, markers, _ = _looks(names, colours)
    diversity = rows["diversity"].to_numpy(dtype=np.float64)
    accuracy = rows["accuracy"].to_numpy(dtype=np.float64)
    baseline = (
        rows["baseline"].fillna(False).to_numpy(dtype=bool)
        if "baseline" in rows
        else np.zeros(len(rows), dtype=bool)
    )
    figure = _new_figure(width, max(0.72 * width, 2.8))
    axes = figure.add_subplot()
    paths: list[tuple[float, float]] = []
    if "accuracy_low" in rows and "accuracy_high" in rows:
        low = rows["accuracy_low"].to_numpy(dtype=np.float64)
        high = rows["accuracy_high"].to_numpy(dtype=np.float64)
        bars = [known[name] for name in names]
        axes.vlines(diversity, low, high, colors=bars, linewidth=1.1, alpha=0.8, zorder=2)
        for x, bottom, top in zip(diversity, low, high):
            if np.isfinite(bottom) and np.isfinite(top):
                paths.extend((x, y) for y in np.linspace(bottom, top, 20))
    points, texts, inks = [], [], []
    for i, name in enumerate(names):
        face = "white" if baseline[i] else known[name]
        edge = known[name] if baseline[i] else "#222222"
        axes.plot(
            diversity[i], accuracy[i], markers[name], ms=7, mfc=face, mec=edge, mew=1.0, zorder=3
        )
        points.append((float(diversity[i]), float(accuracy[i])))
        texts.append(_row_label(name, bool(baseline[i]), 24 if width >= 5 else 18, 2))
        inks.append(_ink(known[name]))
    axes.set_xlabel("token diversity (1 - mean token similarity)")
    axes.set_ylabel(accuracy_label)
    axes.margins(0.14)
    axes.grid()
    _place_labels(figure, axes, points, texts, inks, paths)
    return figure


def _place_labels(
    figure: Figure,
    axes: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    colours: Sequence[str],
    paths: Sequence[tuple[float, float]] = (),
) -> None:
    """Label points without overlap: each text takes the nearest free place around its point.

    `paths` are points of drawn lines, which texts keep off too where they can. Greedy, from the most
    crowded point on; a thin line leads to a text that had to move away, past the others. Where nothing is
    free (dozens of labels), the place with the least overlap is taken.
    """
    figure.draw_without_rendering()  # type: ignore[no-untyped-call]
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixels_per_point = figure.dpi / 72
    centres = [axes.transData.transform(point) for point in points]
    half = 4.5 * pixels_per_point
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in centres]
    thin = pixels_per_point
    drawn = axes.transData.transform(np.reshape(paths, (-1, 2))) if len(paths) else np.empty((0, 2))
    frame = axes.get_window_extent(renderer)
    crowding = [sum(math.dist(c, d) < 80 * pixels_per_point for d in centres) for c in centres]

    def leader(centre: NDArray[np.float64], box: Bbox) -> NDArray[np.float64]:
        """Points (n, 2) of the line from a marker to its text; none where the text is near enough."""
        end = np.clip(centre, box.min, box.max)
        length = math.dist(end, centre)
        if length <= 16 * pixels_per_point:
            return np.empty((0, 2))
        return np.linspace(centre + (end - centre) * half / length, end, 20)

    def crossings(lines: NDArray[np.float64], box: Bbox) -> int:
        inside = (lines >= np.subtract(box.min, thin)) & (lines <= np.add(box.max, thin))
        return int(inside.all(axis=1).sum())

    for i in sorted(range(len(points)), key=lambda i: -crowding[i]):
        label = axes.annotate(
            texts[i],
            points[i],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=7,
            color=colours[i],
            ha="center",
            va="center",
            zorder=6,
            linespacing=1.05,
        )
        # The layout must not move after the places were chosen.
        label.set_in_layout(False)
        label.set_path_effects([withStroke(linewidth=2.0, foreground="white")])
        size = label.get_window_extent(renderer)
        choice: tuple[float, float, float, Bbox] | None = None
        for distance in (3, 8, 15, 24, 36, 50, 70, 95, 125):
            for turn in range(32):
                angle = math.pi / 16 * turn
                reach = half + distance * pixels_per_point
                x = math.cos(angle) * (reach + size.width / 2)
                y = math.sin(angle) * (reach + size.height / 2)
                box = size.translated(x, y)
                spill = size.width * size.height - _shared_area(box, frame)
                cost = 3 * spill + sum(_shared_area(box, other) for other in taken)
                line = leader(centres[i], box)
                crossed = crossings(drawn, box)
                crossed += sum(crossings(line, other) for n, other in enumerate(taken) if n != i)
                cost += 4 * thin**2 * crossed
                if choice is None or cost < choice[0] - 1e-6:
                    choice = (cost, x, y, box)
            if choice is not None and choice[0] < 1e-6:
                break
        assert choice is not None
        _, x, y, box = choice
        label.set_position((x / pixels_per_point, y / pixels_per_point))
        taken.append(box.padded(1.5 * pixels_per_point))
        line = leader(centres[i], box)
        if len(line):
            drawn = np.concatenate([drawn, line])
            axes.annotate(
                "",
                points[i],
                xytext=tuple(axes.transData.inverted().transform(line[-1])),
                arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkB": 5},
                zorder=2.5,
            ).set_in_layout(False)


def _shared_area(first: Bbox, second: Bbox) -> float:
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return max(width, 0.0) * max(height, 0.0)


@_styled
def evidence_figure(
    images: ArrayLike,
    evidence: ArrayLike,
    labels: Sequence[str],
    threshold: float,
    *,
    tied: Sequence[bool] | None = None,
    colours: Mapping[str, str] | None = None,
    width: float = 6.5,
    num_named: int = 7,
) -> Figure:
    """How the certificate came about: the evidence of each pair against the images seen.

    Args:
        images: (m,) counts of images seen, ascending.
        evidence: (m, P) the pair's evidence after as many images (a test martingale's value,
            positive, or infinite); NaN where the pair was not followed.
        labels: The P pairs, such as 'a < b': both sides of ' < ' are shortened alike.
        threshold: The evidence at which a pair is decided, 1 / (its share of delta).
        tied: The P pairs, True for one that ended as a tie: it is settled though never decided.
        colours: From `teacher_colours`: a pair's line takes its first teacher's colour and its marker
            is filled with the second's; by default pairs get colours of their own.
        width: Inches.
        num_named: As many pairs are named and coloured: the open ones, the ties, those decided last;
            the rest is grey.

    Raises:
        ValueError: The lengths do not match, or the threshold is not positive.
    """
    counts = np.asarray(images, dtype=np.float64)
    values = np.asarray(evidence, dtype=np.float64)
    if values.shape != (len(counts), len(labels)):
        raise ValueError(
            f"evidence has shape {values.shape}, expected {(len(counts), len(labels))}: "
            "one row a count of images, one column a pair"
        )
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}, expected a positive number")
    reached = values >= threshold
    first = np.where(reached.any(axis=0), reached.argmax(axis=0), len(counts))
    final = [float(np.nanmax(column, initial=0.0)) for column in values.T]
    ties = np.zeros(len(labels), bool) if tied is None else np.asarray(tied, bool)
    is_open = (first == len(counts)) & ~ties
    # The pairs that held up the certificate first: open ones by how little they have, then ties.
    order = sorted(range(len(labels)), key=lambda p: (not is_open[p], -first[p], final[p]))
    # Decided pairs run off to astronomical values: a few decades above the threshold are enough.
    ceiling = threshold * 1e2
    positive = values[np.isfinite(values) & (values > 0)]
    floor = max(min(float(positive.min(initial=1.0)), 1.0), 1e-2) / 1.5
    columns = 2 if width >= 5 and max(map(len, labels), default=0) <= 36 else 1
    legend_rows = math.ceil(min(len(labels), num_named + 1) / columns)
    figure = _new_figure(width, float(np.clip(0.48 * width, 2.4, 3.4)) + 0.17 * legend_rows)
    axes = figure.add_subplot()
    handles: list[Line2D] = []
    for place, p in reversed(list(enumerate(order))):
        is_named = place < num_named
        sides = labels[p].split(" < ")
        colour = PALETTE[place % len(PALETTE)] if is_named else "#BBBBBB"
        fill, dash = colour, DASHES[place // len(PALETTE) % len(DASHES)] if is_named else "-"
        if is_named and colours is not None:
            colour, fill = colours.get(sides[0], colour), colours.get(sides[-1], colour)
            dash = DASHES[place % len(DASHES)]  # several pairs may begin with one teacher
        marker = MARKERS[place % len(MARKERS)] if is_named else "o"
        line_width, size = (1.4, 5.5) if is_named else (0.7, 2.5)
        followed = np.flatnonzero(~np.isnan(values[:, p]))
        style: dict[str, Any] = {"color": colour, "zorder": 3 if is_named else 2}
        filling: dict[str, Any] = {
            "mfc": fill,
            "mec": colour,
            "mew": 1.2 if fill != colour else 0.5,
        }
        line = np.clip(values[:, p], floor, 10 * ceiling)
        axes.plot(counts, line, dash, linewidth=line_width, **style)
        if followed.size:
            # Where it was decided; where an open pair stands now.
            at = first[p] if first[p] < len(counts) else followed[-1]
            axes.plot(
                counts[at], min(line[at], ceiling / 1.15), marker, ms=size, **style, **filling
            )
        if is_named:
            unsettled = "open" if is_open[p] else "tie"
            state = f"{counts[first[p]]:,.0f} images" if first[p] < len(counts) else unsettled
            room = (70 if width >= 5 else 34) // len(sides)
            label = " < ".join(fit_name(side, room, 1) for side in sides) + f" ({state})"
            handles.insert(0, _key(label, colour, linestyle=dash, marker=marker, ms=5, **filling))
    axes.set_xscale("log", subs=())
    axes.set_yscale("log")
    span = counts.max(initial=1) / max(counts.min(initial=np.inf), 1)
    if span < 30:  # too short for powers of ten alone
        steps = (1, 2, 5) if span > 5 else (1, 1.5, 2, 3, 4, 6, 8)
        axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.set_ylim(floor, ceiling)
    axes.axhline(threshold, color="#222222", linestyle="--", linewidth=1.0, zorder=4)
    axes.annotate(
        f"decided\nat {threshold:,.4g}",
        (1.0, threshold),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_xlabel("images seen")
    axes.set_ylabel("evidence for the order of a pair")
    axes.grid()
    rest = order[num_named:]
    if rest:
        num_open = int(is_open[rest].sum())
        label = f"{len(rest)} more pair" + ("s" if len(rest) > 1 else "")
        handles.append(_key(f"{label} ({num_open} open)", "#BBBBBB", linewidth=0.9))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


def encode_figure(figure: Figure, image_format: str, dpi: int = 200) -> bytes:
    """`figure` as a file of `image_format`: "png", "svg" or "pdf".

    No date or version is written into it, so equal figures give equal bytes.
    """
    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format=image_format, dpi=dpi, metadata=METADATA[image_format])
    return file.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write `figure` to `path` as its suffix says: .png (200 dpi), .svg or .pdf.

    The file appears whole or not at all: it is written beside its place under a temporary name and
    then renamed.

    Raises:
        UsageError: Another suffix.
    """
    path = Path(path)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in METADATA:
        raise UsageError(
            f"cannot write a figure to {str(path)!r}: expected a name that ends in .png, .svg or"
            " .pdf; rename it"
        )
    encoded = encode_figure(figure, suffix)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(encoded)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
