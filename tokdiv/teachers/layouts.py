"""Checkpoint layouts: where authors put the weights in a file, and how their keys become timm's."""

from pathlib import Path
from typing import Any

from torch import Tensor

from tokdiv.errors import UsageError
from tokdiv.teachers.fit import some
from tokdiv.teachers.weights import StateDict

# Where authors put the state dict, outermost first, and what they prefix its keys with. A checkpoint of a
# momentum or teacher-student method holds several networks: the teacher's is the one published.
CONTAINERS = (
    "classy_state_dict",  # VISSL: classy_state_dict / base_model / model / trunk
    "model_state",  # Hiera
    "base_model",
    "teacher",  # DINO and iBOT training checkpoints: teacher and student side by side
    "model_state_dict",
    "state_dict",
    "model",
    "trunk",
    "module",
)

PREFIXES = (
    "module.",
    "momentum_encoder.",  # MoCo v3: the momentum encoder and the base encoder side by side
    "base_encoder.",
    "_feature_blocks.",  # VISSL
    "teacher.",
    "model.",
    "backbone.",
    "encoder.",
    "trunk.",
)


def unwrap(checkpoint: Any, expected: set[str], path: Path) -> StateDict:
    """The state dict inside what authors wrap around it.

    Rules: while the checkpoint is a dict with one of CONTAINERS as a key that holds a dict, go into it;
    then, while keys begin with one of PREFIXES and no key of the architecture does, keep only those keys,
    without the prefix.

    Args:
        checkpoint: what `read_checkpoint` gave.
        expected: the architecture's own keys.
        path: the file, for messages.
    """
    inner = checkpoint
    while isinstance(inner, dict):
        name = next((c for c in CONTAINERS if isinstance(inner.get(c), dict)), None)
        if name is None:
            break
        inner = inner[name]
    tensors = (
        {k: v for k, v in inner.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if isinstance(inner, dict)
        else {}
    )
    if not tensors:
        kind = (
            f"a dict with the keys {some(list(inner))}"
            if isinstance(inner, dict)
            else type(inner).__name__
        )
        raise UsageError(f"'{path}' holds no state dict: found {kind}")
    while True:
        prefix = next((p for p in PREFIXES if any(k.startswith(p) for k in tensors)), None)
        if prefix is None or any(key.startswith(prefix) for key in expected):
            return tensors
        tensors = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
