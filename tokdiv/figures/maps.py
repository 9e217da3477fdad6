"""Similarity maps as a figure (Figure 3 of arXiv 2304.12535)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike, NDArray

from tokdiv.figures.style import (
    COLOR_MAP,
    QUERY_COLOR,
    _check_lengths,
    _looks,
    _new_figure,
    _styled,
    fit_name,
)


@_styled
def maps_figure(
    views: Sequence[NDArray[np.uint8]],
    names: Sequence[str],
    maps: Sequence[Sequence[NDArray[Any]]],
    queries: Sequence[tuple[float, float, float, float]],
    similarities: ArrayLike,
    *,
    tokens: Sequence[Sequence[tuple[int, int]]] | None = None,
    colors: Mapping[str, str] | None = None,
    lowest: float | None = None,
) -> Figure:
    """Similarity maps: an image a row, its query patch in red, and a panel a teacher.

    After figure 3 of Pan et al., arXiv 2304.12535.

    Args:
        views: N images, uint8 (H, W, 3), as the teachers saw them.
        names: The T teachers.
        maps: maps[i][t], (h, w): the cosine, in [-1, 1], of each token of image i under teacher t
            to its query token; NaN is drawn gray.
        queries: N rectangles (row0, column0, row1, column1) in fractions of the view, in [0, 1].
        similarities: (N, T) token similarity S(x) of each image.
        tokens: tokens[i][t], (row, column) of the query token in the teacher's own grid; by
            default the token that holds the rectangle's center.
        colors: From `teacher_colors`; by default made from `names`.
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
    known, _, _ = _looks(names, colors)
    # One scale for all panels; its upper end is a token's cosine with itself.
    scale = Normalize(lowest_cosine(maps) if lowest is None else lowest, 1.0)
    color_map = mpl.colormaps[COLOR_MAP].with_extremes(bad="#BDBDBD")

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
                cmap=color_map,
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
        (left, top), right - left, bottom - top, fill=False, ec=QUERY_COLOR, linewidth=1.3
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
