"""Checkpoints: torch files that end with their own sha256, and a pointer to the last complete one.

    OUT/checkpoints/step-00001200.pt  tensors and plain containers; torch.load(weights_only=True) reads it too
    OUT/checkpoints/last              the name of the last complete one; it moves once that is written

Resuming takes the one that the pointer names, else the newest that is not damaged.
"""

import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from img2vec.config import Config
from img2vec.model import encoder_state
from tokdiv.errors import RunError, UsageError, first_line
from tokdiv.run_dir import write_atomic
from tokdiv.settings import option
from tokdiv.teachers.spec import LoadedSpec

log = logging.getLogger(__name__)

FORMAT = 2
KIND = "img2vec pretrain"
FOLDER, POINTER = "checkpoints", "last"
DIGEST = re.compile(rb"\nsha256:([0-9a-f]{64})\n")  # the last bytes of a checkpoint
DIGEST_LENGTH = 73
CHUNK = 2**20
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps of a parameter
# Sharded or not, the state is gathered whole on the CPU of rank 0, and loaded from a whole one on every rank.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


# One file ----------------------------------------------------------------------------------------


def write_checkpoint(path: Path, kind: str, state: Mapping[str, Any]) -> None:
    """Write tensors and plain containers, then the sha256 of all bytes before it.

    Args:
        kind: the command that reads it again, as "img2vec pretrain".

    Raises:
        RunError: the disk is full, or the folder cannot be written to; an older file of that name is intact.
    """

    def write(file: BinaryIO) -> None:
        hashed: Any = _Hashed(file)
        torch.save({"format": FORMAT, "kind": kind, **state}, hashed)
        # Readers of zip files search for the end of the archive from the back and skip what follows it.
        file.write(f"\nsha256:{hashed.sha256.hexdigest()}\n".encode())

    write_atomic(path, write)


def read_checkpoint(path: Path, kind: str) -> dict[str, Any]:
    """Read a file of `write_checkpoint`; nothing of it is parsed before its sha256 is checked.

    Raises:
        UsageError: no such file, no digest or a wrong one, or a checkpoint of another command or version.
    """
    if not path.is_file():
        raise UsageError(f"'{path}': no such checkpoint")
    try:
        with path.open("rb") as file:
            _check_digest(path, file)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"the checkpoint '{path}' cannot be read ({first_line(error)})") from None
    except UsageError:
        raise
    except Exception:  # the unpickler's, for a file that is something else
        raise UsageError(f"'{path}' is no checkpoint of {kind}") from None
    if not isinstance(state, dict) or state.get("kind") != kind:
        raise UsageError(f"'{path}' is no checkpoint of {kind}")
    if state.get("format") != FORMAT:
        raise UsageError(f"'{path}' has format {state.get('format')}; this version reads {FORMAT}")
    return state


class _Hashed:
    """A file that is written, and the sha256 of what went through."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _check_digest(path: Path, file: BinaryIO) -> None:
    """Compare the bytes with the digest at their end, and go back to the start of the file."""
    remaining = os.fstat(file.fileno()).st_size - DIGEST_LENGTH
    file.seek(max(0, remaining))
    recorded = DIGEST.fullmatch(file.read(DIGEST_LENGTH))
    if recorded is None:
        raise UsageError(
            f"'{path}' is no complete checkpoint: it does not end with its sha256; it was cut, or is of another "
            f"program or version"
        )
    file.seek(0)
    found = hashlib.sha256()
    while remaining > 0 and (chunk := file.read(min(CHUNK, remaining))):
        found.update(chunk)
        remaining -= len(chunk)
    if found.hexdigest().encode() != recorded[1]:
        raise UsageError(f"the checkpoint '{path}' is damaged (its sha256 differs)")
    file.seek(0)


# What it holds of a model and its optimizer ------------------------------------------------------


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and moments by parameter name: whole, on the CPU, and on rank 0 only; every process calls it.

    Tensors on the CPU are not copied. The optimizer's settings are no part of it: the run's own hold.
    """
    moments: Any = {}
    if optimizer.state:  # torch would make a step to fill it
        moments = get_optimizer_state_dict(model, optimizer, options=WHOLE).get("state", {})
    return {"model": model_state(model), "optimizer": moments}


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights alone, as in `training_state`."""
    weights: Any = get_model_state_dict(model, options=WHOLE)
    return weights


def load_training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], where: Path
) -> None:
    """The inverse of `training_state`, on every process; AdamW's state has to fit the model in all shapes.

    Raises:
        UsageError: names, shapes or dtypes of another model; nothing is loaded then.
    """
    _check_weights(model, state.get("model"), where)
    _check_moments(model, state.get("optimizer"), where)
    load_model_state(model, state["model"], where)
    if state["optimizer"]:
        groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
        moments: Any = {"state": state["optimizer"], "param_groups": groups}
        set_optimizer_state_dict(model, optimizer, moments, options=WHOLE)


def load_model_state(model: nn.Module, state: Any, where: Path) -> None:
    """The weights alone, as in `load_training_state`."""
    _check_weights(model, state, where)
    set_model_state_dict(model, dict(state), options=WHOLE)


def _check_weights(model: nn.Module, state: Any, where: Path) -> None:
    own = model.state_dict()
    wrong = ["no table of weights"]
    if isinstance(state, dict):
        wrong = sorted(set(own) ^ set(state), key=str)
        wrong = wrong or [name for name in own if not _is_like(state[name], own[name])]
    if wrong:
        raise UsageError(
            f"'{where}' is a checkpoint of another model: {len(wrong)} weights differ, as {wrong[0]}; "
            f"give the settings it was made with, or another -o"
        )


def _check_moments(model: nn.Module, state: Any, where: Path) -> None:
    """Fused AdamW does not check shapes: it would read beyond the end of a smaller tensor."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = ["no table of moments"]
    if isinstance(state, dict):
        wrong = sorted(set(trained) ^ set(state), key=str) if state else []
        wrong = wrong or [name for name in state if not _are_moments(state[name], trained[name])]
    if wrong:
        raise UsageError(
            f"'{where}': the optimizer's state does not fit the model ({len(wrong)} parameters, as "
            f"{wrong[0]}): the checkpoint is damaged; delete it, or start again with --no-resume"
        )


def _are_moments(moments: Any, parameter: nn.Parameter) -> bool:
    if not isinstance(moments, dict) or set(moments) != MOMENTS:
        return False
    step = moments["step"]
    return _is_like(step, torch.zeros(())) and all(
        _is_like(moments[key], parameter) for key in MOMENTS - {"step"}
    )


def _is_like(value: Any, reference: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.shape == reference.shape
        and value.dtype == reference.dtype
    )


# A run's checkpoints -----------------------------------------------------------------------------


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


def save_checkpoint(out: Path, state: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint of a run, move the pointer to it, and delete all but the newest `keep`.

    Args:
        state: with "progress", a dict of Progress.

    Raises:
        RunError: see `write_checkpoint`; the checkpoints before it are intact.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state['progress']['step']:08d}.pt"
    write_checkpoint(path, KIND, state)
    write_atomic(folder / POINTER, f"{path.name}\n")
    for old in _newest_first(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


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
    path = Path(path)
    if path.name == POINTER and path.is_file():
        path = path.parent
    if path.is_dir():
        out = path.parent if path.name == FOLDER and not (path / FOLDER).is_dir() else path
        found = load_last(out)
        if found is None:
            raise UsageError(f"'{path}' holds no checkpoint of img2vec pretrain")
        path, state = found
    else:
        state = _read(path)
    config = Config.from_dict(state["config"], f"'{path}'")
    return student_export(config, state["model"], state["teacher"], state["progress"])


def student_export(
    config: Config, model: dict[str, Tensor], teacher: dict[str, Any], progress: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of `export_student`, except the folder, for the weights of a whole model."""
    return {
        "state_dict": encoder_state(model),
        "architecture": config.student,
        "model_args": {"img_size": config.image_size, **config.student_args},
        "mean": config.mean,
        "std": config.std,
        "input_size": config.image_size,
        "description": {
            "method": "Img2Vec (arXiv 2304.12535)",
            "teacher": teacher.get("name"),
            "steps": progress["step"],
            "epochs": progress["epoch"],
            "global_batch": progress["global_batch"],
        },
    }
