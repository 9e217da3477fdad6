"""Similarity maps: the cosine of every token to one query token (Figure 3 of arXiv 2304.12535)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokdiv.data import UnusableImage, centre_view, decode_image
from tokdiv.dist import choose_device, choose_dtype
from tokdiv.errors import UsageError
from tokdiv.plots import maps_figure, save_figure
from tokdiv.similarity import cosine_map, token_similarity
from tokdiv.spec import TeacherSpec
from tokdiv.teacher import Teacher, load_teachers


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
        query: (row, column) in units of the view, 0 to 1; None for the patch nearest the centre.

    Raises:
        UsageError: a file that is no image, a teacher that cannot be loaded, an unknown suffix.
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
    row, column = query or (0.5, 0.5)
    views, maps, tokens, rectangles, similarities = [], [], [], [], []
    for teacher in loaded:
        teacher.prepare(place, choose_dtype(dtype, place))
    for picture in pictures:
        cosines, places, scores = [], [], []
        for teacher in loaded:
            view = centre_view(picture, teacher.size)
            found = teacher(view[None].to(place))
            rows, columns = teacher.grid
            cell = min(int(row * rows), rows - 1), min(int(column * columns), columns - 1)
            cosines.append(
                cosine_map(found, cell[0] * columns + cell[1])[0].view(rows, columns).cpu().numpy()
            )
            places.append(cell)
            scores.append(float(token_similarity(found)[0]))
        views.append(centre_view(picture, loaded[0].size).permute(1, 2, 0).numpy())
        maps.append(cosines)
        tokens.append(places)
        similarities.append(scores)
        # The patch outlined in the image is that of the finest grid: the others' hold it.
        finest = max(range(len(loaded)), key=lambda n: loaded[n].num_tokens)
        rows, columns = loaded[finest].grid
        top, left = places[finest]
        rectangles.append((top / rows, left / columns, (top + 1) / rows, (left + 1) / columns))
    figure = maps_figure(
        views, [t.name for t in loaded], maps, rectangles, similarities, tokens=tokens
    )
    return save_figure(figure, out)


def _open(path: str | Path) -> torch.Tensor:
    try:
        return decode_image(Path(path).read_bytes())
    except UnusableImage as unusable:
        raise UsageError(f"'{path}' is no usable image: {unusable.reason}") from None
    except OSError as error:
        raise UsageError(f"'{path}': {error.strerror}; expected an image file") from None
