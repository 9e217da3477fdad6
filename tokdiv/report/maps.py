"""Similarity maps of the images with the lowest, the median and the highest similarity under the winner."""

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray

from tokdiv.data.decode import decode_image
from tokdiv.data.loader import permutation
from tokdiv.data.open import open_source
from tokdiv.data.source import Source
from tokdiv.dist import choose_device
from tokdiv.errors import RunError, UsageError, first_line
from tokdiv.figures.maps import lowest_cosine, maps_figure
from tokdiv.maps import Maps, measure_maps
from tokdiv.ranking import RankedTeacher, Ranking
from tokdiv.report.page import inline_figure
from tokdiv.scores import UsableScores
from tokdiv.teachers.cache import is_cached
from tokdiv.teachers.load import load_teacher
from tokdiv.teachers.teacher import Teacher

MAX_TEACHERS = 10  # whose maps are on the page: the first of the ranking, the winner among them
PER_FIGURE = 5  # teachers side by side
NO_INDEX = "a stream of shards has no index to find single images by"


def similarity_maps(
    ranking: Ranking,
    scores: UsableScores,
    source: Source | None,
    teachers: Sequence[Teacher] | None,
    device: str,
    colors: dict[str, str],
) -> tuple[dict[str, Any] | None, str]:
    """The figures and the images they show, or None where they cannot be drawn; and a sentence on what is left out.

    Args:
        source, teachers: by default, what the ranking names is opened again.
        device: where teachers that are loaded here compute.
    """
    similarity = scores.values[:, [t.name for t in ranking.teachers].index(ranking.best_name)]
    chosen = _spread(similarity)
    try:
        pictures = _read_images(ranking, scores.positions[list(chosen)], source)
        loaded, without = _load_teachers(ranking, teachers, device)
        found = measure_maps(pictures, loaded, loaded[0].mean.device)
    except (UsageError, RunError) as error:
        return None, f"The page has no similarity maps: {error}."
    except Exception as error:  # of a user's own module, of a device
        return None, f"The page has no similarity maps: {type(error).__name__}: {first_line(error)}"
    images = [
        {"title": title, "key": str(scores.keys[row]), "similarity": float(similarity[row])}
        for row, title in chosen.items()
    ]
    names = [teacher.name for teacher in loaded]
    return {"images": images, "figures": _draw(found, names, images, colors)}, without


def _spread(similarity: NDArray[np.float32]) -> dict[int, str]:
    """Rows of the images that show how far a teacher's similarity ranges, with a title each."""
    measured = np.flatnonzero(~np.isnan(similarity))
    order = measured[np.argsort(similarity[measured], kind="stable")]
    if len(order) == 1:
        return {int(order[0]): "the only one"}
    rows = {int(order[0]): "lowest"}
    if len(order) > 2:
        rows[int(order[(len(order) - 1) // 2])] = "median"
    return rows | {int(order[-1]): "highest"}


def _read_images(
    ranking: Ranking, positions: NDArray[np.int64], source: Source | None
) -> list[torch.Tensor]:
    """The decoded images at some positions of the order of the run.

    Raises:
        UsageError: DATA is gone, has changed, or cannot be read image by image.
    """
    source = source or _open_again(ranking.data["source"])
    if not source.permutable or source.count is None:
        raise UsageError(NO_INDEX)
    if source.fingerprint != ranking.data["fingerprint"]:
        raise UsageError(f"'{source.name}' holds other images now than when it was ranked")
    order = permutation(source.count, ranking.settings.seed)
    return [decode_image(source.read(int(order[position]))) for position in positions]


def _open_again(data: str) -> Source:
    """DATA of the run.

    Raises:
        UsageError: it is gone, is a stream, or might have to be downloaded.
    """
    scheme, _, rest = data.partition("/")
    if not os.path.lexists(os.path.expanduser(data)):
        if scheme.lower() in ("wds", "tfds", "hfids"):
            raise UsageError(NO_INDEX)
        folder = os.path.expanduser(re.split(":(?:split|root)=", rest)[0])
        # Gigabytes are not downloaded for a page.
        if scheme.lower() == "hfds" and not os.path.isdir(folder):
            raise UsageError(
                f"'{data}' is not downloaded for a page; the same `tokdiv rank` command again draws them"
            )
    return open_source(data)


def _load_teachers(
    ranking: Ranking, teachers: Sequence[Teacher] | None, device: str
) -> tuple[list[Teacher], str]:
    """The teachers whose maps are drawn, best first, and a sentence on those that are left out."""
    wanted = ranking.teachers[:MAX_TEACHERS]
    if ranking.best_name not in [teacher.name for teacher in wanted]:
        wanted = [*wanted[:-1], ranking[ranking.best_name]]
    without = []
    if len(ranking.teachers) > len(wanted):
        without.append(f"Maps of {len(wanted)} of the {len(ranking.teachers)} teachers.")
    if teachers is not None:
        given = {teacher.name: teacher for teacher in teachers}
        return [given[teacher.name] for teacher in wanted], " ".join(without)
    loaded, device = [], str(choose_device(device))
    for teacher in wanted:
        try:
            loaded.append(_load_again(teacher, device))
        except (UsageError, RunError) as error:
            without.append(f"Without {teacher.name}: {error}.")
    if not loaded:
        reasons = " ".join(without)
        raise UsageError(f"no teacher can be loaded again. {reasons}".rstrip("."))
    return loaded, " ".join(without)


def _load_again(teacher: RankedTeacher, device: str) -> Teacher:
    """A teacher as it was measured.

    Raises:
        UsageError: it needs the user's code, or its weights are not on this machine.
        RunError: its weights have changed.
    """
    weights = teacher.spec.weights or ""
    if teacher.spec.is_custom:
        raise UsageError("it is a module of the user's own, which RUN cannot load again")
    # Gigabytes are not downloaded for a page.
    if weights.startswith(("http://", "https://", "hf-hub:")) and not is_cached(weights):
        raise UsageError(f"its weights, {weights}, are not on this machine")
    return load_teacher(teacher.spec, device=device, dtype=teacher.dtype)


def _draw(
    maps: Maps, names: list[str], images: list[dict[str, Any]], colors: dict[str, str]
) -> list[Markup]:
    """One figure for every PER_FIGURE teachers, all on one scale."""
    shown = ", ".join(f"{image['key']} ({image['title']})" for image in images)
    figures = []
    for start in range(0, len(names), PER_FIGURE):
        part = slice(start, start + PER_FIGURE)
        figure = maps_figure(
            maps.views,
            names[part],
            [row[part] for row in maps.maps],
            maps.rectangles,
            [row[part] for row in maps.tokens],
            [row[part] for row in maps.similarities],
            colors=colors,
            lowest=lowest_cosine(maps.maps),
        )
        alt = (
            f"Cosine of every token to the query token outlined in red, for {', '.join(names[part])}. "
            f"The images from top to bottom: {shown}."
        )
        figures.append(inline_figure(figure, alt, image_format="png"))
    return figures
