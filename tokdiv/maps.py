"""Similarity maps: the cosine of every token to one query token (Figure 3 of arXiv 2304.12535)."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tokdiv.config import Settings
from tokdiv.data.decode import UnusableImage, center_view, decode_image
from tokdiv.dist import choose_device, choose_dtype
from tokdiv.errors import RunError, UsageError, first_line
from tokdiv.figures.maps import maps_figure
from tokdiv.figures.style import save_figure
from tokdiv.measure import load_measurable
from tokdiv.similarity import cosine_map, token_similarity
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher

CENTER = (0.5, 0.5)  # the query where none is given, in units of the view


def draw_maps(
    images: Sequence[str | os.PathLike[str]],
    teachers: Sequence[str | TeacherSpec | Teacher],
    out: str | os.PathLike[str],
    *,
    query: tuple[float, float] | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    image_size: int | Literal["native"] | None = None,
) -> Path:
    """Draw each image with its query patch, and per teacher the cosine of every token to the query token.

    Args:
        images: files, a row each.
        teachers: SPECs, TeacherSpecs or Teachers, a column each.
        out: .png, .svg or .pdf.
        query: two ints are the (row, column) of a patch in the finest grid, counted from 0; two floats are
            a point in units of the view, 0 to 1. None is the center.

    Raises:
        UsageError: a file that is no image, a teacher that cannot be loaded, an unknown suffix, a query
            outside the grid.
        RunError: a teacher that yields NaN.
    """
    Settings(dtype=dtype, image_size=image_size)  # checks them
    picture = Path(out)
    if picture.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"-o {out}: expected a name that ends in .png, .svg or .pdf")
    if not picture.parent.is_dir():
        raise UsageError(f"-o {out}: there is no folder '{picture.parent}'")
    decoded = [_open(image) for image in images]
    chosen = choose_device(device)
    loaded = load_measurable(teachers, image_size, chosen, choose_dtype(dtype, chosen))
    found = measure_maps(decoded, loaded, chosen, _in_view(query or CENTER, loaded))
    for image, similarities in zip(images, found.similarities):
        for teacher, similarity in zip(loaded, similarities):
            if math.isnan(similarity):
                raise RunError(
                    f"{teacher.name} gives NaN tokens for '{image}': its weights are damaged"
                )
    figure = maps_figure(
        found.views,
        [t.name for t in loaded],
        found.maps,
        found.rectangles,
        found.tokens,
        found.similarities,
    )
    return save_figure(figure, picture)


def parse_query(text: str) -> tuple[float, float]:
    """The query of `draw_maps` from `ROW,COL`: 7,3 is a patch, 0.5,0.25 a point in the view.

    Raises:
        UsageError: it is neither.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 2 and all(part.isdecimal() for part in parts):
        return int(parts[0]), int(parts[1])
    try:
        row, column = (float(part) for part in parts)
    except ValueError:
        raise UsageError(
            f"--query {text}: expected ROW,COL, as 7,3 (a patch) or 0.5,0.25 (a point in the view)"
        ) from None
    if not (0 <= row <= 1 and 0 <= column <= 1):
        raise UsageError(
            f"--query {text}: expected ROW,COL from 0 (top, left) to 1 (bottom, right)"
        )
    return row, column


@dataclass(frozen=True)
class Maps:
    """What `maps_figure` draws, of N images and T teachers.

    Attributes:
        views: N arrays (H, W, 3) uint8, as the first teacher sees them.
        maps: maps[i][t], (rows, columns): the cosine of each token to the query token.
        rectangles: N (top, left, bottom, right) of the query in units of the view: its patch in the finest grid.
        similarities: [i][t], the token similarity of the image.
        tokens: [i][t], (row, column) of the query token.
    """

    views: list[NDArray[np.uint8]]
    maps: list[list[NDArray[Any]]]
    rectangles: list[tuple[float, float, float, float]]
    similarities: list[list[float]]
    tokens: list[list[tuple[int, int]]]


def measure_maps(
    pictures: Sequence[torch.Tensor],
    teachers: Sequence[Teacher],
    device: torch.device,
    query: tuple[float, float] = CENTER,
) -> Maps:
    """The cosine of every token to the query token.

    Args:
        pictures: decoded images, uint8 (3, H, W).
        teachers: T of them, prepared on `device`.
        query: (row, column) in units of the view, 0 to 1.
    """
    row, column = query
    found = Maps([], [], [], [], [])
    finest = max(range(len(teachers)), key=lambda n: teachers[n].num_tokens)
    for picture in pictures:
        cosines, cells, scores = [], [], []
        for teacher in teachers:
            tokens = teacher(center_view(picture, teacher.size)[None].to(device))
            rows, columns = teacher.grid
            top, left = min(int(row * rows), rows - 1), min(int(column * columns), columns - 1)
            cosine = cosine_map(tokens, top * columns + left)[0]
            cosines.append(cosine.view(rows, columns).cpu().numpy())
            cells.append((top, left))
            scores.append(float(token_similarity(tokens)[0]))
        found.views.append(center_view(picture, teachers[0].size).permute(1, 2, 0).numpy())
        found.maps.append(cosines)
        found.tokens.append(cells)
        found.similarities.append(scores)
        # The patch outlined in the image is that of the finest grid; those of the others contain it.
        (rows, columns), (top, left) = teachers[finest].grid, cells[finest]
        found.rectangles.append(
            (top / rows, left / columns, (top + 1) / rows, (left + 1) / columns)
        )
    return found


def _in_view(query: tuple[float, float], teachers: Sequence[Teacher]) -> tuple[float, float]:
    """A query in units of the view; of a patch, its center."""
    if not all(isinstance(number, int) for number in query):
        return query
    rows, columns = max((teacher.grid for teacher in teachers), key=math.prod)
    row, column = query
    if not (0 <= row < rows and 0 <= column < columns):
        raise UsageError(
            f"--query {row},{column}: the finest grid has {rows} x {columns} patches; expected ROW,COL from "
            f"0,0 to {rows - 1},{columns - 1}"
        )
    return (row + 0.5) / rows, (column + 0.5) / columns


def _open(path: str | os.PathLike[str]) -> torch.Tensor:
    try:
        return decode_image(Path(path).read_bytes())
    except UnusableImage as unusable:
        raise UsageError(f"'{path}' is no usable image: {unusable.reason}") from None
    except OSError as error:
        raise UsageError(f"'{path}': {first_line(error)}; expected an image file") from None
