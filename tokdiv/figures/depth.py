"""Token similarity by block depth, as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from tokdiv.figures.diversity_accuracy import _place_labels
from tokdiv.figures.style import _ink, _key, _looks, _new_figure, _styled, fit_name


@_styled
def depth_figure(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]],
    *,
    colors: Mapping[str, str] | None = None,
    width: float = 6.5,
) -> Figure:
    """Token similarity by block depth, the most diverse block of each teacher marked.

    Args:
        curves: name -> (depth, mean, low, high), each (blocks,). Integer depths are zero-based
            block numbers; floating ones are fractions of the network's depth, in [0, 1]. NaN in
            low and high draws no band.
        colors: From `teacher_colors`; by default made from the names.
        width: Inches.

    Raises:
        ValueError: No curve, or a curve whose arrays differ in length.
    """
    if not curves:
        raise ValueError("no curve to draw, expected at least one teacher")
    names = list(curves)
    known, markers, dashes = _looks(names, colors)
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
        color, marker = known[name], markers[name]
        axes.fill_between(depth, low, high, color=color, alpha=0.18, linewidth=0)
        style: dict[str, Any] = {"linestyle": dashes[name], "marker": marker, "ms": 3.5, "mew": 0}
        axes.plot(depth, mean, color=color, **style)
        label = fit_name(name, 32, 1)
        if np.isfinite(mean).any():
            lowest = int(np.nanargmin(mean))
            axes.plot(depth[lowest], mean[lowest], marker, ms=8, mfc=color, mec="#222222")
            where = f"block {depth[lowest]:.0f}" if by_block else f"{depth[lowest]:.2f}"
            label += f": {mean[lowest]:.3f} at {where}".replace("-", "\N{MINUS SIGN}")
            points.append((float(depth[lowest]), float(mean[lowest])))
            texts.append(where)
            inks.append(_ink(color))
        handles.append(_key(label, color, **style))
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
