"""Checkpoints that are whole or not there, and a pointer to the last one.

    OUT/checkpoints/step-00001200.pt      tensors and plain containers (torch.load with weights_only=True)
    OUT/checkpoints/step-00001200.sha256  its hash: a file without it was never finished
    OUT/checkpoints/last                  the name of the last complete one; moves last of all

On resuming, the one that the pointer names is tried first, then the others from the newest to the oldest.
"""

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from img2vec.config import Config
from img2vec.model import encoder_state
from tokdiv.errors import RunError, UsageError

FORMAT = 1
FOLDER, POINTER = "checkpoints", "last"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: optimizer steps done, skipped ones included. epoch: epochs done.
        step_in_epoch: steps done in the one that has begun.
        world: number of processes. global_batch: images per step.
        skipped: steps left out for a loss that was not finite; in_a_row: the last of them in sequence.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    world: int = 1
    global_batch: int = 0
    skipped: int = 0
    in_a_row: int = 0


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is seen whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(out: Path, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, move the pointer to it, and delete all but the newest `keep`.

    Args:
        out: the run's folder.
        state: tensors and plain containers, with "progress" as a dict of Progress.

    Raises:
        RunError: it cannot be written, as on a full disk; what was there before is untouched.
    """
    folder = out / FOLDER
    path = folder / f"step-{state['progress']['step']:08d}.pt"
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        digest = _sha256(temporary)
        path.with_suffix(".sha256").unlink(missing_ok=True)  # of an older file of that name
        os.replace(temporary, path)
        write_atomically(path.with_suffix(".sha256"), f"{digest}\n".encode())
        write_atomically(folder / POINTER, f"{path.name}\n".encode())
        _sync(folder)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(
            f"the checkpoint '{path}' cannot be written ({reason}); those before it are whole: make room "
            f"and give the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    for old in _newest_first(folder)[keep:]:
        old.unlink(missing_ok=True)
        old.with_suffix(".sha256").unlink(missing_ok=True)
    return path


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def load_last(out: Path, warn: Callable[[str], None] = _warn) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint that is whole, or None where there is none at all.

    Args:
        out: the run's folder.
        warn: is told of a damaged one that is passed over.

    Raises:
        RunError: there are checkpoints, and all of them are damaged.
    """
    folder = out / FOLDER
    candidates = _newest_first(folder)
    pointer = folder / POINTER
    if pointer.is_file():
        # A newer file than the one pointed to was not yet announced when the run was killed; it may be
        # whole all the same, but its step would then count as saved without having been said to be.
        named = folder / pointer.read_text(errors="replace").strip()
        if named in candidates:
            candidates = [named, *(c for c in candidates if c != named)]
        elif candidates:
            warn(f"the checkpoint '{named}' is gone; '{candidates[0].name}' is taken")
    for path, after in zip(candidates, [*candidates[1:], None]):
        try:
            return path, read(path)
        except UsageError as error:
            warn(f"{error}; '{after.name}' is taken" if after else str(error))
    if candidates:
        raise RunError(
            f"none of the {len(candidates)} checkpoints in '{folder}' is whole; start again with --no-resume"
        )
    return None


def read(path: Path) -> dict[str, Any]:
    """Read one checkpoint file and check it.

    Raises:
        UsageError: damaged, unfinished, or no checkpoint of `img2vec pretrain`.
    """
    recorded = path.with_suffix(".sha256")
    if not path.is_file():
        raise UsageError(f"'{path}': no such checkpoint")
    if recorded.is_file() and recorded.read_text(errors="replace").strip() != _sha256(path):
        raise UsageError(f"the checkpoint '{path}' is damaged (its sha256 differs)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(
            f"the checkpoint '{path}' cannot be read ({error.strerror or error})"
        ) from None
    except Exception:  # whatever the unpickler meets in a file that is something else
        raise UsageError(f"'{path}' is no checkpoint of img2vec pretrain, or damaged") from None
    if not isinstance(state, dict) or not {"format", "model", "config", "progress"} <= set(state):
        raise UsageError(f"'{path}' is no checkpoint of img2vec pretrain")
    if state["format"] != FORMAT:
        raise UsageError(f"'{path}' has format {state['format']}, this version reads {FORMAT}")
    return state


def student_from_checkpoint(path: Path) -> dict[str, Any]:
    """What `export_student` needs, but for the folder, from a checkpoint or a run's folder.

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
        state = found[1]
    else:
        state = read(path)
    return student_export(
        Config.from_dict(state["config"], f"'{path}'"),
        state["model"],
        state["teacher"],
        state["progress"],
    )


def student_export(
    config: Config,
    model: dict[str, Tensor],
    teacher: dict[str, Any],
    progress: dict[str, Any],
) -> dict[str, Any]:
    """The arguments of `export_student`, without the folder, of a model's state dict."""
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


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU; called by every process where parameters are sharded."""
    return {name: _whole(value) for name, value in model.state_dict().items()}


def load_model_state(model: nn.Module, state: dict[str, Tensor], where: Path) -> None:
    """Load a whole state dict, sharded or not.

    Raises:
        UsageError: it is of another student.
    """
    own = model.state_dict()
    wrong = sorted(set(own) ^ set(state)) or [
        name for name, value in own.items() if value.shape != state[name].shape
    ]
    if wrong:
        raise UsageError(
            f"'{where}' is a checkpoint of another student: {len(wrong)} parameters differ, as {wrong[0]}; "
            f"give that student's settings, or another -o"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(_like(state[name], value))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name, whole and on the CPU."""
    return {
        name: {key: _whole(value) for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], where: Path
) -> None:
    """The inverse of `optimizer_state`, for a model whose parameters are loaded.

    Raises:
        UsageError: moments of other parameters, shapes or dtypes; fused AdamW would read beyond their ends.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = sorted(set(state) - set(trained)) or (
        sorted(set(trained) - set(state)) if state else []
    )
    wrong = wrong or [name for name in state if not _are_moments(state[name], trained[name])]
    if wrong:
        raise UsageError(
            f"'{where}': the optimizer's state does not fit the model ({len(wrong)} parameters, as "
            f"{wrong[0]}): the checkpoint is damaged; delete it, or start again with --no-resume"
        )
    for name, moments in state.items():
        parameter = trained[name]
        optimizer.state[parameter] = {
            # The count of steps is no shard; a fused AdamW wants it beside the parameter.
            key: value.to(parameter.device) if value.ndim == 0 else _like(value, parameter).clone()
            for key, value in moments.items()
        }


def _are_moments(moments: Any, parameter: nn.Parameter) -> bool:
    """Whether these are AdamW's `step`, `exp_avg` and `exp_avg_sq` of a parameter."""
    if not isinstance(moments, dict) or set(moments) != {"step", "exp_avg", "exp_avg_sq"}:
        return False
    shapes = {"step": torch.Size([]), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    dtypes = {"step": torch.float32, "exp_avg": parameter.dtype, "exp_avg_sq": parameter.dtype}
    return all(
        isinstance(value, Tensor) and value.shape == shapes[key] and value.dtype == dtypes[key]
        for key, value in moments.items()
    )


def _whole(value: Tensor) -> Tensor:
    value = value.detach()
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.to("cpu", copy=True)


def _like(value: Tensor, reference: Any) -> Tensor:
    """`value` on the device of `reference`, and sharded as it is."""
    value = value.to(reference.device)
    if hasattr(reference, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, reference.device_mesh, reference.placements)
    return value


def truncate_metrics(path: Path, step: int) -> int | None:
    """Drop the lines of steps behind `step`, and a last line that was cut, so that none repeats.

    Returns:
        The step of the last evaluation that is left, a line without `loss`; None where there is none.
    """
    if not path.is_file():
        return None
    kept, evaluated = [], None
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            values = json.loads(line)
            if line.endswith(b"\n") and values["step"] <= step:
                kept.append(line)
                evaluated = evaluated if "loss" in values else values["step"]
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, b"".join(kept))
    return evaluated


def _newest_first(folder: Path) -> list[Path]:
    found = folder.glob("step-*.pt") if folder.is_dir() else ()
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.stem)), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """The names in a folder reach the disk too."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
