"""How the evidence for each pair's order grew, as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator
from numpy.typing import ArrayLike

from tokdiv.figures.style import (
    DASHES,
    MARKERS,
    PALETTE,
    _key,
    _new_figure,
    _styled,
    fit_name,
)


@_styled
def evidence_figure(
    images: ArrayLike,
    evidence: ArrayLike,
    labels: Sequence[str],
    threshold: float,
    *,
    tied: Sequence[bool] | None = None,
    colors: Mapping[str, str] | None = None,
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
        colors: From `teacher_colors`: a pair's line takes its first teacher's color and its marker
            is filled with the second's; by default pairs get colors of their own.
        width: Inches.
        num_named: As many pairs are named and colored: the open ones, the ties, those decided last;
            the rest is gray.

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
        color = PALETTE[place % len(PALETTE)] if is_named else "#BBBBBB"
        fill, dash = color, DASHES[place // len(PALETTE) % len(DASHES)] if is_named else "-"
        if is_named and colors is not None:
            color, fill = colors.get(sides[0], color), colors.get(sides[-1], color)
            dash = DASHES[place % len(DASHES)]  # several pairs may begin with one teacher
        marker = MARKERS[place % len(MARKERS)] if is_named else "o"
        line_width, size = (1.4, 5.5) if is_named else (0.7, 2.5)
        followed = np.flatnonzero(~np.isnan(values[:, p]))
        style: dict[str, Any] = {"color": color, "zorder": 3 if is_named else 2}
        filling: dict[str, Any] = {
            "mfc": fill,
            "mec": color,
            "mew": 1.2 if fill != color else 0.5,
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
            handles.insert(0, _key(label, color, linestyle=dash, marker=marker, ms=5, **filling))
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
