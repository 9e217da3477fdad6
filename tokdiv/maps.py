"""Similarity maps: the cosine of every token to one query token (Figure 3 of arXiv 2304.12535)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokdiv.data.loader import UnusableImage, center_view, decode_image
from tokdiv.dist import choose_device, choose_dtype
from tokdiv.errors import RunError, UsageError
from tokdiv.figures.maps import maps_figure
from tokdiv.figures.style import save_figure
from tokdiv.similarity import cosine_map, token_similarity
from tokdiv.teachers.load import load_teachers
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher

CENTER = (0.5, 0.5)  # the query where none is given, in units of the view


def draw_maps(
    images: Sequence[str | Path],
    teachers: Sequence[str | TeacherSpec | Teacher],
    out: str | Path,
    *,
    query: tuple[float, float] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    image_size: Any = None,
) -> Path:
    """Draw each image with its query patch, and per teacher the cosine of every token to the query token.

    Args:
        images: files, a row each.
        teachers: SPECs, TeacherSpecs or Teachers, a column each.
        out: .png, .svg or .pdf.
        query: two whole numbers are the (row, column) of a patch in the finest grid, counted from 0; other
            two are a place in units of the view, 0 to 1. None is the center.

    Raises:
        UsageError: a file that is no image, a teacher that cannot be loaded, an unknown suffix, a query
            outside of the grid.
        RunError: a teacher that yields NaN.
    """
    if Path(out).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"-o {out}: expected a name that ends in .png, .svg or .pdf")
    if not Path(out).parent.is_dir():
        raise UsageError(f"-o {out}: there is no folder '{Path(out).parent}'")
    pictures = [_open(image) for image in images]
    place = choose_device(device)
    loaded = load_teachers(teachers, image_size=image_size)
    for teacher in loaded:
        if teacher.num_tokens < 2:
            raise UsageError(
                f"{teacher.name} gives K = 1 token at {teacher.size} px: there is no other one to compare it "
                f"with; use a larger --image-size or an earlier block (:blocks=N)"
            )
    for teacher in loaded:
        teacher.prepare(place, choose_dtype(dtype, place))
    found = measure_maps(pictures, loaded, place, _in_view(query or CENTER, loaded))
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
        found.similarities,
        tokens=found.tokens,
    )
    return save_figure(figure, out)


@dataclass(frozen=True)
class Maps:
    """Of N images and T teachers, what `plots.maps_figure` draws.

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
    for picture in pictures:
        cosines, places, scores = [], [], []
        for teacher in teachers:
            view = center_view(picture, teacher.size)
            tokens = teacher(view[None].to(device))
            rows, columns = teacher.grid
            cell = min(int(row * rows), rows - 1), min(int(column * columns), columns - 1)
            cosines.append(
                cosine_map(tokens, cell[0] * columns + cell[1])[0].view(rows, columns).cpu().numpy()
            )
            places.append(cell)
            scores.append(float(token_similarity(tokens)[0]))
        found.views.append(center_view(picture, teachers[0].size).permute(1, 2, 0).numpy())
        found.maps.append(cosines)
        found.tokens.append(places)
        found.similarities.append(scores)
        # The patch outlined in the image is that of the finest grid: the others' hold it.
        finest = max(range(len(teachers)), key=lambda n: teachers[n].num_tokens)
        rows, columns = teachers[finest].grid
        top, left = places[finest]
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


def _open(path: str | Path) -> torch.Tensor:
    try:
        return decode_image(Path(path).read_bytes())
    except UnusableImage as unusable:
        raise UsageError(f"'{path}' is no usable image: {unusable.reason}") from None
    except OSError as error:
        raise UsageError(f"'{path}': {error.strerror}; expected an image file") from None
