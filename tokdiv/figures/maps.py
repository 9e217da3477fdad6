"""Figure: similarity maps, after figure 3 of Pan et al. (arXiv 2304.12535)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike, NDArray

from tokdiv.figures.style import check_lengths, fit_name, new_figure, styled, teacher_looks

COLOR_MAP = "viridis"
QUERY_COLOR = "#E8000B"

Box = tuple[float, float, float, float]  # top, left, bottom, right


@styled
def maps_figure(
    views: Sequence[NDArray[np.uint8]],
    names: Sequence[str],
    maps: Sequence[Sequence[NDArray[Any]]],
    queries: Sequence[Box],
    tokens: Sequence[Sequence[tuple[int, int]]],
    similarities: ArrayLike,
    *,
    colors: Mapping[str, str] | None = None,
    lowest: float | None = None,
) -> Figure:
    """Draw a row per image: its query patch in red, and a panel per teacher with the cosine of every token to it.

    Args:
        views: N images, uint8 (H, W, 3), as the teachers saw them.
        names: the T teachers.
        maps: maps[i][t], (h, w): the cosine, in [-1, 1], of each token of image i under teacher t to its query
            token; NaN is drawn gray.
        queries: N rectangles (top, left, bottom, right) in fractions of the view, in [0, 1].
        tokens: tokens[i][t], (row, column) of the query token in the teacher's own grid.
        similarities: (N, T) token similarity S(x) of each image.
        colors: from `teacher_colors`; by default made from `names`.
        lowest: the lower end of the scale, for several figures on one scale; by default what the maps need.

    Raises:
        ValueError: the lengths do not match.
    """
    num_images, num_teachers = len(views), len(names)
    values = np.asarray(similarities, dtype=np.float64).reshape(num_images, -1)
    if num_images == 0 or not num_images == len(maps) == len(queries):
        raise ValueError(
            f"{num_images} views, {len(maps)} rows of maps and {len(queries)} queries: "
            "expected one of each per image, and at least one"
        )
    for row in maps:
        check_lengths(num_teachers, maps=len(row), similarities=values.shape[1])
    known, _, _ = teacher_looks(names, colors)
    # One scale for all panels; its upper end is a token's cosine with itself.
    scale = Normalize(lowest_cosine(maps) if lowest is None else lowest, 1.0)
    color_map = mpl.colormaps[COLOR_MAP].with_extremes(bad="#BDBDBD")

    # Panels large enough to read, then a page of 6.2 x 8 inches.
    panel = float(np.clip(min(6.2 / (num_teachers + 1), 8 / num_images), 1.1, 1.9))
    titles = [fit_name(name, max(10, int(panel * 72 / 4.6)), 3) for name in names]
    header = 0.12 * max(title.count("\n") + 1 for title in titles)
    aspect = max(view.shape[0] / view.shape[1] for view in views)
    height = 0.15 + header + num_images * (panel * aspect + 0.24)
    figure = new_figure(max(panel * (num_teachers + 1) + 0.75, 3.3), max(height, 1.6))
    grid = figure.subplots(num_images, num_teachers + 1, squeeze=False)
    grid[0, 0].set_title("image and query\n", fontsize=7)
    for i, (view, query) in enumerate(zip(views, queries)):
        size = view.shape[:2]
        _draw_panel(grid[i, 0], view, size, query, "#666666")
        for t, name in enumerate(names):
            cosines = np.ma.masked_invalid(np.asarray(maps[i][t], dtype=np.float64))
            box = _box_of(tokens[i][t], cosines.shape)
            axes = grid[i, t + 1]
            _draw_panel(axes, cosines, size, box, known[name], cmap=color_map, norm=scale)
            similarity = f"S(x) = {values[i, t]:.3f}".replace("-", "\N{MINUS SIGN}")
            axes.set_title(f"{titles[t]}\n{similarity}" if i == 0 else similarity, fontsize=7)
    if num_teachers:
        _add_color_bar(figure, grid, ScalarMappable(scale, color_map), num_images, panel)
    return figure


def lowest_cosine(maps: Sequence[Sequence[NDArray[Any]]]) -> float:
    """The lower end of a scale for all these maps: at most 0, rounded down to 0.05."""
    finite = [float(np.nanmin(m)) for row in maps for m in row if np.isfinite(m).any()]
    return min(0.0, math.floor(min(finite, default=0.0) * 20) / 20)


def _box_of(token: tuple[int, int], shape: tuple[int, ...]) -> Box:
    """A token's part of the view, in fractions of it."""
    (row, column), (rows, columns) = token, shape
    return row / rows, column / columns, (row + 1) / rows, (column + 1) / columns


def _draw_panel(
    axes: Axes,
    pixels: NDArray[Any],
    size: tuple[int, ...],
    box: Box,
    frame: str,
    **options: Any,
) -> None:
    """Draw pixels over a view of `size` (height, width), and outline `box` in red."""
    height, width = size
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest", **options)
    top, left, bottom, right = box[0] * height, box[1] * width, box[2] * height, box[3] * width
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


def _add_color_bar(
    figure: Figure, grid: NDArray[Any], colors: ScalarMappable, num_images: int, panel: float
) -> None:
    bar = figure.colorbar(
        colors,
        ax=list(grid.flat),
        shrink=min(1.0, 2.6 / (num_images * panel)) if num_images > 1 else 0.9,
        aspect=18 if num_images > 1 else 12,
        pad=0.015,
    )
    bar.set_label("cosine similarity" + ("\n" if num_images == 1 else " ") + "to the query token")
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=7)
