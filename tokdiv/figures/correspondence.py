"""Figure: token diversity of the teachers against their correspondence."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from tokdiv.figures.similarity import row_label
from tokdiv.figures.style import (
    INK,
    check_lengths,
    legend_entry,
    new_figure,
    styled,
    teacher_looks,
)


@styled
def correspondence_figure(
    names: Sequence[str],
    diversity: Sequence[tuple[float, float, float]],
    correspondence: Sequence[tuple[float, float, float]],
    pixels: Sequence[float],
    baselines: Sequence[bool],
    *,
    colors: Mapping[str, str] | None = None,
    width: float = 5.5,
) -> Figure:
    """Draw a marker with both intervals per teacher; good ones are at the top right.

    Args:
        names: T labels.
        diversity, correspondence: (mean, low, high) of each teacher.
        pixels: correspondence of raw pixels on each teacher's grid; the highest is drawn as a line.
        baselines: hollow markers.
        colors: from `teacher_colors`; by default made from the names.
        width: inches.
    """
    check_lengths(
        len(names),
        diversity=len(diversity),
        correspondence=len(correspondence),
        pixels=len(pixels),
        baselines=len(baselines),
    )
    known, markers, _ = teacher_looks(names, colors)
    columns = 2 if width >= 5 else 1
    legend_rows = math.ceil((len(names) + 1) / columns)
    figure = new_figure(width, max(0.6 * width, 2.6) + 0.17 * legend_rows)
    axes = figure.add_subplot()
    level = max(pixels)
    axes.axhline(level, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
    handles = []
    for name, (x, left, right), (y, low, high), baseline in zip(
        names, diversity, correspondence, baselines
    ):
        face, edge = ("white", known[name]) if baseline else (known[name], INK)
        style: dict[str, Any] = {
            "marker": markers[name],
            "ms": 7,
            "mfc": face,
            "mec": edge,
            "mew": 1.0,
        }
        axes.vlines(x, low, high, colors=known[name], linewidth=1.1, alpha=0.8)
        axes.hlines(y, left, right, colors=known[name], linewidth=1.1, alpha=0.8)
        axes.plot(x, y, linestyle="", **style)
        handles.append(legend_entry(row_label(name, baseline, 48, 1), "none", **style))
    label = f"raw pixels ({level:.3f})"
    handles.append(legend_entry(label, INK, linewidth=0.9, linestyle=(0, (4, 2))))
    axes.set_xlabel("token diversity (1 - mean token similarity)")
    axes.set_ylabel("correspondence (share of tokens found again)")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1)
    axes.grid()
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure
