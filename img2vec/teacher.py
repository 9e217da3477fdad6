"""Which teacher a pretraining uses: a SPEC, the winner of a ranking, or a network of the user's own."""

import logging
from pathlib import Path

import torch

from img2vec.config import Config
from tokdiv.dist import choose_dtype
from tokdiv.errors import UsageError
from tokdiv.teachers.load import load_teacher
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher

log = logging.getLogger(__name__)


def open_teacher(
    given: str | Path | TeacherSpec | Teacher, config: Config, device: torch.device
) -> Teacher:
    """Load a teacher and prepare it for a device.

    Args:
        given: a SPEC, a TeacherSpec, a Teacher, or the folder (or ranking.json) of a ranking.

    Raises:
        UsageError: no such teacher, or a folder without a ranking.
    """
    dtype, compile = choose_dtype(config.dtype, device), config.compiles_on(device)
    if not isinstance(given, Teacher):
        spec = given if isinstance(given, TeacherSpec) else _resolve(given)
        teacher = load_teacher(spec, image_size=config.image_size, device=device, dtype=dtype)
        return teacher.prepare(device, dtype, compile) if compile else teacher
    if given.spec.is_custom:
        log.warning(
            "%s is made by code of your own: without that code this run cannot be resumed, nor its teacher be "
            "loaded again",
            given.name,
        )
    if given.size != config.image_size:
        text = "%s sees the view resized from %d to %d pixels"
        log.info(text, given.name, config.image_size, given.size)
    return given.prepare(device, dtype, compile)


def _resolve(given: str | Path) -> str | TeacherSpec:
    """A SPEC as it stands, or the winner where `given` is a ranking."""
    path = Path(given).expanduser()
    if (path / "ranking.json").is_file() or (path.suffix == ".json" and path.is_file()):
        return _winner(path)
    if path.is_dir():
        raise UsageError(
            f"--teacher '{given}': a folder without ranking.json; expected a SPEC (see: tokdiv teachers) or the "
            f"folder of a finished `tokdiv rank`"
        )
    return str(given)


def _winner(path: Path) -> TeacherSpec:
    """The best teacher of a ranking, with what a user should know about the ranking."""
    from tokdiv.hand_over import load_ranking

    ranking = load_ranking(path)
    best: TeacherSpec = ranking.best
    if best.is_custom:
        raise UsageError(
            f"--teacher '{path}': its winner '{best.name}' was made by code of your own, which a ranking does not "
            f"hold; name that code with --teacher-module FILE.py:FUNCTION instead of --teacher"
        )
    log.info("teacher: %s, the winner of %s", best.name, path)
    if len(ranking.teachers) > 1 and not ranking.certified:
        if ranking.best_certified:
            log.info("this ranking's winner is certified, the order of its other teachers is not")
        else:
            log.warning("this ranking is not certified: the order of its teachers may be chance")
    for remark in ranking.remarks():
        log.info("%s", remark)
    return best
