"""Figure: token similarity by block depth."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from tokdiv.figures.style import INK, fit_name, legend_entry, new_figure, styled, teacher_looks


@styled
def depth_figure(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    *,
    colors: Mapping[str, str] | None = None,
    width: float = 6.5,
) -> Figure:
    """Draw a curve per teacher; a large marker shows its most diverse block, which the legend names.

    Args:
        curves: name -> (mean, low, high), each (blocks,): the similarity of each block, and its interval.
        colors: from `teacher_colors`; by default made from the names.
        width: inches.

    Raises:
        ValueError: no curve, or a curve whose arrays differ in length.
    """
    if not curves:
        raise ValueError("no curve to draw, expected at least one teacher")
    names = list(curves)
    known, markers, dashes = teacher_looks(names, colors)
    columns = 2 if width >= 5 else 1
    legend_rows = math.ceil((len(names) + 1) / columns)
    figure = new_figure(width, float(np.clip(0.5 * width, 2.4, 3.6)) + 0.17 * legend_rows)
    axes = figure.add_subplot()
    handles: list[Line2D] = []
    for name, curve in curves.items():
        mean, low, high = (np.asarray(array, dtype=np.float64) for array in curve)
        if not len(mean) == len(low) == len(high) > 0:
            raise ValueError(
                f"{name}: mean, low and high have {len(mean)}, {len(low)} and {len(high)} entries, expected "
                f"equal lengths of at least 1"
            )
        blocks = np.arange(len(mean))
        color, marker = known[name], markers[name]
        axes.fill_between(blocks, low, high, color=color, alpha=0.18, linewidth=0)
        style: dict[str, Any] = {"linestyle": dashes[name], "marker": marker, "ms": 3.5, "mew": 0}
        axes.plot(blocks, mean, color=color, **style)
        label = fit_name(name, 32, 1)
        if np.isfinite(mean).any():
            lowest = int(np.nanargmin(mean))
            axes.plot(lowest, mean[lowest], marker, ms=8, mfc=color, mec=INK)
            label += f": {mean[lowest]:.3f} at block {lowest}".replace("-", "\N{MINUS SIGN}")
        handles.append(legend_entry(label, color, **style))
    axes.set_xlabel("block (zero-based)")
    axes.set_ylabel("mean token similarity\n(lower = more diverse)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.dataLim.width == 0:
        axes.set_xlim(-1, 1)
    axes.margins(x=0.06, y=0.14)
    axes.grid(axis="y")
    large = {"marker": "o", "ms": 7, "mfc": "#BBB", "mec": INK}
    handles.append(legend_entry("large: the most diverse block", "none", **large))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure
