"""Checkpoint files of pretraining and fine-tuning, and what they hold of a model and its optimizer.

A checkpoint holds tensors and plain containers; torch.load(weights_only=True) reads it. It ends with its sha256, so
that a cut or damaged file is never taken for a good one.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tokdiv.errors import UsageError, first_line
from tokdiv.run_dir import write_atomic

log = logging.getLogger(__name__)

FORMAT = 2
DIGEST = re.compile(rb"\nsha256:([0-9a-f]{64})\n")  # the last bytes of a checkpoint
DIGEST_LENGTH = 73
CHUNK = 2**20
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
    if differing := _differing(model.state_dict(), state, _is_like):
        raise UsageError(
            f"'{where}' is a checkpoint of another model: {len(differing)} weights differ, as {differing[0]}; "
            f"give the settings it was made with, or another -o"
        )


def _check_moments(model: nn.Module, state: Any, where: Path) -> None:
    """Fused AdamW does not check shapes: it would read beyond the end of a smaller tensor."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if state != {} and (differing := _differing(trained, state, _are_moments)):
        raise UsageError(
            f"'{where}': the optimizer's state does not fit the model ({len(differing)} parameters, as "
            f"{differing[0]}): the checkpoint is damaged; delete it, or start again with --no-resume"
        )


def _differing(
    own: Mapping[str, Tensor], state: Any, fits: Callable[[Any, Tensor], bool]
) -> list[str]:
    """Names that only one of the two has, else those whose content does not fit."""
    if not isinstance(state, dict):
        return ["all of them"]
    names = sorted(set(own) ^ set(state), key=str)
    return names or [name for name, value in own.items() if not fits(state[name], value)]


def _are_moments(moments: Any, parameter: Tensor) -> bool:
    """Whether these are AdamW's of a parameter."""
    wanted = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
    return isinstance(moments, dict) and not _differing(wanted, moments, _is_like)


def _is_like(value: Any, reference: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.shape == reference.shape
        and value.dtype == reference.dtype
    )
