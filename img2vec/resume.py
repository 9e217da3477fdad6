"""Resuming a pretraining: how far it is, its checkpoints, and whether it is the same run.

    OUT/checkpoints/step-00001200.pt  a checkpoint, see img2vec.checkpoint
    OUT/checkpoints/last              the name of the last complete one; it moves once that is written

Resuming takes the one that the pointer names, else the newest that is not damaged.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from img2vec.checkpoint import (
    load_training_state,
    read_checkpoint,
    training_state,
    write_checkpoint,
)
from img2vec.config import Config
from img2vec.model import encoder_state
from img2vec.step import Training
from tokdiv.errors import RunError, UsageError
from tokdiv.run_dir import write_atomic
from tokdiv.settings import option
from tokdiv.teachers.spec import LoadedSpec

log = logging.getLogger(__name__)

KIND = "img2vec pretrain"
FOLDER, POINTER = "checkpoints", "last"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done, skipped ones included. epoch: epochs done.
        step_in_epoch: steps done in the epoch that has begun.
        world: number of processes. global_batch: images per step.
        skipped: steps left out because their loss was not finite.
        num_consecutive_skipped: the last of them in sequence.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    world: int = 1
    global_batch: int = 0
    skipped: int = 0
    num_consecutive_skipped: int = 0

    @classmethod
    def from_dict(cls, fields: Any, where: Path) -> Self:
        """Raises UsageError where a field is missing, unknown, or no count."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != names:
            raise UsageError(f"'{where}': expected a checkpoint with the progress {sorted(names)}")
        for name, value in fields.items():
            if type(value) is not int or not 0 <= value < 2**62:
                raise UsageError(f"'{where}': {name} is {value!r}; expected a count")
        return cls(**fields)

    def after_step(self, steps_per_epoch: int, skipped: bool) -> Self:
        """One step further."""
        ends = self.step_in_epoch + 1 == steps_per_epoch
        return dataclasses.replace(
            self,
            step=self.step + 1,
            epoch=self.epoch + ends,
            step_in_epoch=0 if ends else self.step_in_epoch + 1,
            skipped=self.skipped + skipped,
            num_consecutive_skipped=self.num_consecutive_skipped + 1 if skipped else 0,
        )


def save_run(out: Path, run: Mapping[str, Any], training: Training, progress: Progress) -> None:
    """Write a checkpoint, move the pointer to it, and delete all but the newest; every process calls it.

    Args:
        run: the content of config.json.

    Raises:
        RunError: the disk is full, or the folder cannot be written to; earlier checkpoints are intact.
    """
    state = {**training_state(training.model, training.optimizer), **run}
    state["progress"] = dataclasses.asdict(progress)

    def write() -> None:
        folder = out / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{progress.step:08d}.pt"
        write_checkpoint(path, KIND, state)
        write_atomic(folder / POINTER, f"{path.name}\n")
        for old in _newest_first(folder)[training.config.keep :]:
            old.unlink(missing_ok=True)

    training.group.on_first(write)


def resume_run(out: Path, run: dict[str, Any], training: Training) -> Progress:
    """Load the last checkpoint, where there is one.

    The run goes on at the very step; with another number of processes, at the next epoch.
    """
    now = {"world": training.group.world, "global_batch": training.plan.global_batch}
    if (found := load_last(out)) is None:
        return Progress(**now)
    path, state = found
    check_same_run(out, state, run)
    load_training_state(training.model, training.optimizer, state, path)
    progress = Progress.from_dict(state["progress"], path)
    if progress.world == now["world"] and progress.step_in_epoch >= training.plan.steps:
        raise UsageError(
            f"'{path}' is damaged: it is at step {progress.step_in_epoch} of an epoch of {training.plan.steps}; "
            f"delete it, or start anew with --no-resume"
        )
    log.info("resuming at step %d, epoch %d", progress.step, progress.epoch)
    if progress.world != now["world"] and progress.step_in_epoch:
        text = "the run was begun on %d processes, now there are %d: on to the next epoch"
        log.info(text, progress.world, now["world"])
        now |= {"epoch": progress.epoch + 1, "step_in_epoch": 0}
    return dataclasses.replace(progress, **now)


def load_last(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint of a run that is not damaged, or None where there is none at all.

    Raises:
        RunError: there are checkpoints, and all of them are damaged.
    """
    folder = out / FOLDER
    candidates = _newest_first(folder)
    pointer = folder / POINTER
    if pointer.is_file():
        # A newer file may be complete although the run was killed before the pointer moved. It is not taken:
        # the run did not say that it had come so far.
        named = folder / pointer.read_bytes()[:100].decode(errors="replace").strip()
        if named in candidates:
            candidates = [named, *(c for c in candidates if c != named)]
        elif candidates:
            log.warning("the checkpoint '%s' is gone; '%s' is taken", named, candidates[0].name)
    for path, following in zip(candidates, [*candidates[1:], None]):
        try:
            return path, _read(path)
        except UsageError as error:
            log.warning("%s%s", error, f"; '{following.name}' is taken" if following else "")
    if candidates:
        raise RunError(
            f"none of the {len(candidates)} checkpoints in '{folder}' can be used; start again with --no-resume"
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    state = read_checkpoint(path, KIND)
    for key in ("model", "optimizer", "config", "teacher", "data"):
        if not isinstance(state.get(key), dict):
            raise UsageError(f"'{path}' is no checkpoint of {KIND}: it has no {key}")
    Progress.from_dict(state.get("progress"), path)
    return state


def _newest_first(folder: Path) -> list[Path]:
    found = folder.glob("step-*.pt") if folder.is_dir() else ()
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.stem)), reverse=True)


def check_same_run(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Compare what config.json or a checkpoint holds with the run of this call.

    Raises:
        UsageError: another run; the message names what differs.
    """
    remedy = "give the same settings, another -o, or --no-resume to start anew"
    if not all(isinstance(old.get(part), dict) for part in ("config", "teacher", "data")):
        raise UsageError(f"'{out}' holds no run of img2vec pretrain that can be read: {remedy}")
    free = {field.name for field in dataclasses.fields(Config) if field.metadata.get("free")}
    if old.get("world") != new["world"]:
        free |= {"batch_size", "accumulate"}  # another number of processes splits the batch anew
    for key, now in new["config"].items():
        if key not in free and old["config"].get(key) != now:
            raise UsageError(
                f"'{out}' was begun with {option(key)} {old['config'].get(key)}, now it is {now}: {remedy}"
            )
    if old["data"].get("fingerprint") != new["data"]["fingerprint"]:
        raise UsageError(
            f"'{out}' was begun on other data ({old['data'].get('source')}, {old['data'].get('count')} images): "
            f"{remedy}"
        )
    before, after = (LoadedSpec.from_dict(run["teacher"]) for run in (old, new))
    for key, now in after.identity().items():
        if (was := before.identity()[key]) != now:
            raise UsageError(
                f"'{out}' was begun with the teacher {before.name} ({key} {was}), now it is {after.name} ({now}): "
                f"{remedy}"
            )


# The student in it -------------------------------------------------------------------------------


def student_from_checkpoint(path: Path) -> dict[str, Any]:
    """What `export_student` needs, except the folder, from a checkpoint or a run's folder.

    Args:
        path: a checkpoint file, or OUT/checkpoints/last, OUT/checkpoints or OUT, which mean the last
            complete one.

    Raises:
        UsageError: no checkpoint of `img2vec pretrain`.
    """
    if path.name == POINTER and path.is_file():
        path = path.parent
    if not path.is_dir():
        return student_export(_read(path))
    out = path.parent if path.name == FOLDER and not (path / FOLDER).is_dir() else path
    if (found := load_last(out)) is None:
        raise UsageError(f"'{path}' holds no checkpoint of {KIND}")
    return student_export(found[1])


def student_export(state: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `export_student`, except the folder, from the content of a checkpoint."""
    config, progress = Config.from_dict(state["config"], "the checkpoint"), state["progress"]
    return {
        "state_dict": encoder_state(state["model"]),
        "architecture": config.student,
        "model_args": {"img_size": config.image_size, **config.student_args},
        "mean": config.mean,
        "std": config.std,
        "input_size": config.image_size,
        "description": {
            "method": "Img2Vec (arXiv 2304.12535)",
            "teacher": state["teacher"].get("name"),
            "steps": progress["step"],
            "epochs": progress["epoch"],
            "global_batch": progress["global_batch"],
        },
    }
