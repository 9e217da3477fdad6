"""Diversity against accuracy, as a figure (Figure 1 of arXiv 2304.12535)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from tokdiv.figures.similarity import _row_label
from tokdiv.figures.style import _ink, _looks, _new_figure, _styled


@_styled
def diversity_accuracy_figure(
    table: pd.DataFrame,
    *,
    colors: Mapping[str, str] | None = None,
    accuracy_label: str = "accuracy of the pretrained student",
    width: float = 5.5,
) -> Figure:
    """Token diversity of each teacher against the accuracy of the student it taught.

    After figure 1 of Pan et al., arXiv 2304.12535.

    Args:
        table: Columns `name`, `diversity`, `accuracy`, and if known `baseline` (bool, hollow
            markers), `accuracy_low` and `accuracy_high` (error bars). Rows without diversity or
            accuracy are left out.
        colors: From `teacher_colors`; by default made from the names.
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
    known, markers, _ = _looks(names, colors)
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
    colors: Sequence[str],
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
    centers = [axes.transData.transform(point) for point in points]
    half = 4.5 * pixels_per_point
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in centers]
    thin = pixels_per_point
    drawn = axes.transData.transform(np.reshape(paths, (-1, 2))) if len(paths) else np.empty((0, 2))
    frame = axes.get_window_extent(renderer)
    crowding = [sum(math.dist(c, d) < 80 * pixels_per_point for d in centers) for c in centers]

    def leader(center: NDArray[np.float64], box: Bbox) -> NDArray[np.float64]:
        """Points (n, 2) of the line from a marker to its text; none where the text is near enough."""
        end = np.clip(center, box.min, box.max)
        length = math.dist(end, center)
        if length <= 16 * pixels_per_point:
            return np.empty((0, 2))
        return np.linspace(center + (end - center) * half / length, end, 20)

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
            color=colors[i],
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
                line = leader(centers[i], box)
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
        line = leader(centers[i], box)
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
