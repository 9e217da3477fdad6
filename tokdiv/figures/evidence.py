"""Figure: how the evidence for the order of each pair of teachers grew with the images."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator
from numpy.typing import ArrayLike, NDArray

from tokdiv.figures.style import (
    DASHES,
    INK,
    MARKERS,
    fit_name,
    legend_entry,
    new_figure,
    styled,
)

UNNAMED = "#BBBBBB"


@styled
def evidence_figure(
    images: ArrayLike,
    evidence: ArrayLike,
    labels: Sequence[str],
    tied: Sequence[bool],
    threshold: float,
    colors: Mapping[str, str],
    *,
    width: float = 6.5,
    num_named: int = 7,
) -> Figure:
    """Draw the evidence of each pair against the images seen.

    Args:
        images: (m,) counts of images seen, ascending.
        evidence: (m, P) the pair's evidence after as many images: the value of a test martingale, positive or
            infinite; NaN where the pair was not followed.
        labels: the P pairs, such as 'a < b': both sides of ' < ' are shortened alike.
        tied: the P pairs, True for one that ended as a tie: it is settled though never decided.
        threshold: the evidence at which a pair is decided, 1 / (its share of delta).
        colors: from `teacher_colors`: a pair's line takes its first teacher's color, and its marker is filled with
            the second's.
        width: inches.
        num_named: how many pairs are named and colored: open ones first, then ties, then those decided last; the
            rest is gray.

    Raises:
        ValueError: the lengths do not match, or the threshold is not positive.
    """
    counts = np.asarray(images, dtype=np.float64)
    values = np.asarray(evidence, dtype=np.float64)
    if values.shape != (len(counts), len(labels)):
        raise ValueError(
            f"evidence has shape {values.shape}, expected {(len(counts), len(labels))}: "
            "one row per count of images, one column per pair"
        )
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}, expected a positive number")
    reached = values >= threshold
    first = np.where(reached.any(axis=0), reached.argmax(axis=0), len(counts))
    final = [float(np.nanmax(column, initial=0.0)) for column in values.T]
    is_open = (first == len(counts)) & ~np.asarray(tied, bool)
    # The pairs that held up the certificate first: open ones by how little they have, then ties.
    order = sorted(range(len(labels)), key=lambda p: (not is_open[p], -first[p], final[p]))
    # Decided pairs run off to astronomical values: two decades above the threshold are enough.
    ceiling = threshold * 1e2
    positive = values[np.isfinite(values) & (values > 0)]
    floor = max(min(float(positive.min(initial=1.0)), 1.0), 1e-2) / 1.5
    columns = 2 if width >= 5 and max(map(len, labels), default=0) <= 36 else 1
    legend_rows = math.ceil(min(len(labels), num_named + 1) / columns)
    figure = new_figure(width, float(np.clip(0.48 * width, 2.4, 3.4)) + 0.17 * legend_rows)
    axes = figure.add_subplot()
    handles: list[Line2D] = []
    # From the last to the first, so that the named pairs lie on top.
    for position, p in reversed(list(enumerate(order))):
        sides = labels[p].split(" < ")
        look = _look(position if position < num_named else None, sides, colors)
        line = np.clip(values[:, p], floor, 10 * ceiling)
        _draw_pair(axes, counts, line, int(first[p]), ceiling, look)
        if position < num_named:
            unsettled = "open" if is_open[p] else "tie"
            state = f"{counts[first[p]]:,.0f} images" if first[p] < len(counts) else unsettled
            room = (70 if width >= 5 else 34) // len(sides)
            label = " < ".join(fit_name(side, room, 1) for side in sides) + f" ({state})"
            handles.insert(0, legend_entry(label, **(look | {"ms": 5})))
    _label_axes(axes, counts, (floor, ceiling), threshold)
    rest = order[num_named:]
    if rest:
        label = f"{len(rest)} more pair{'s' * (len(rest) > 1)} ({int(is_open[rest].sum())} open)"
        handles.append(legend_entry(label, UNNAMED, linewidth=0.9))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


def _look(position: int | None, sides: list[str], colors: Mapping[str, str]) -> dict[str, Any]:
    """How the line of a pair and its marker are drawn; None for a pair that is not named."""
    if position is None:
        return {"color": UNNAMED, "linestyle": "-", "lw": 0.7, "zorder": 2, "marker": "o", "ms": 2.5,
                "mfc": UNNAMED, "mec": UNNAMED, "mew": 0.5}  # fmt: skip
    # A name that holds ' < ' splits wrongly, and has no color.
    color, fill = (colors.get(side, INK) for side in (sides[0], sides[-1]))
    return {"color": color, "linestyle": DASHES[position % len(DASHES)], "lw": 1.4, "zorder": 3,
            "marker": MARKERS[position % len(MARKERS)], "ms": 5.5,
            "mfc": fill, "mec": color, "mew": 1.2 if fill != color else 0.5}  # fmt: skip


def _draw_pair(
    axes: Axes,
    counts: NDArray[np.float64],
    line: NDArray[np.float64],
    first: int,
    ceiling: float,
    look: dict[str, Any],
) -> None:
    """Draw a line, and a marker where the pair was decided, or where an open pair stands now."""
    axes.plot(counts, line, **(look | {"marker": ""}))
    followed = np.flatnonzero(~np.isnan(line))
    if followed.size:
        at = first if first < len(counts) else followed[-1]
        axes.plot(counts[at], min(line[at], ceiling / 1.15), **(look | {"linestyle": ""}))


def _label_axes(
    axes: Axes, counts: NDArray[np.float64], limits: tuple[float, float], threshold: float
) -> None:
    axes.set_xscale("log", subs=())
    axes.set_yscale("log")
    span = counts.max(initial=1) / max(counts.min(initial=np.inf), 1)
    if span < 30:  # too short for powers of ten alone
        steps = (1, 2, 5) if span > 5 else (1, 1.5, 2, 3, 4, 6, 8)
        axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.set_ylim(limits)
    axes.axhline(threshold, color=INK, linestyle="--", linewidth=1.0, zorder=4)
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
