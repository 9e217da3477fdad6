"""Folders and files that say themselves which network they hold: timm's exports, and runs of `img2vec pretrain`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokdiv.errors import UsageError, first_line
from tokdiv.run_dir import read_json
from tokdiv.teachers.spec import TeacherSpec

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
OF_THE_VIEW = (
    "img_size",
    "num_classes",
)  # arguments that follow from the view and from leaving heads out


def export_fields(folder: Path) -> dict[str, Any] | None:
    """The fields of a spec that a timm export's config.json states; None where there is no such file.

    Raises:
        UsageError: a damaged config.json.
    """
    try:
        config = read_json(folder / CONFIG)
    except OSError:
        return None
    except ValueError as error:
        raise UsageError(f"'{folder / CONFIG}' is damaged: {first_line(error)}") from None
    return config_fields(config, str(folder / CONFIG)) if "architecture" in config else None


def config_fields(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of a spec in the content of a timm export's config.json.

    Raises:
        UsageError: something is missing or of the wrong type.
    """
    try:
        published = config["pretrained_cfg"]
        arguments = dict(config.get("model_args") or {})
        return {
            "architecture": config["architecture"],
            "arguments": {k: v for k, v in arguments.items() if k not in OF_THE_VIEW},
            "mean": published["mean"],
            "std": published["std"],
            "input_size": published["input_size"][-1],
            "license": published.get("license"),
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(
            f"'{name}' is no configuration of a timm export: {type(error).__name__}: {first_line(error)}"
        ) from None


def spec_of_path(path: Path, name: str) -> TeacherSpec | None:
    """The network in a timm export, in OUT of `img2vec pretrain`, or in one of its checkpoints.

    Args:
        path: OUT stands for its student, or where there is none yet for its last checkpoint.
        name: the spec's.

    Returns:
        None where the path holds neither.
    """
    folders: tuple[Path, ...] = (path, path / "student")
    if path.is_file():
        folders = (path.parent,) if path.name in WEIGHTS else ()
    for folder in folders:
        weights = path if path.is_file() else weights_in(folder)
        if weights is not None and (fields := export_fields(folder)):
            return TeacherSpec(name, weights=str(weights.resolve()), **fields)
    file = path
    if path.is_dir():
        checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        last = checkpoints / "last"
        steps = sorted(checkpoints.glob("step-*.pt"))
        if last.is_file():
            file = checkpoints / Path(last.read_text().strip()).name
        elif steps:
            file = steps[-1]
    return _of_checkpoint(file, name) if file.is_file() and file.suffix == ".pt" else None


def weights_in(folder: Path) -> Path | None:
    """The file with the weights in a folder of timm's or of Hugging Face's making."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def weights_file_in(folder: str, text: str) -> Path:
    """The file with the weights in a folder that a SPEC names.

    Raises:
        UsageError: there is none; it says how to convert what there is.
    """
    if (found := weights_in(Path(folder))) is not None:
        return found
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    remedy = "expected a .pth, .pt or .safetensors file"
    if any(name.endswith(".distcp") for name in names):
        remedy = (
            f"a sharded checkpoint: convert it once with python -m torch.distributed.checkpoint.format_utils "
            f"dcp_to_torch {folder} weights.pth"
        )
    elif files := [
        n for n in names if n.endswith((".pth", ".pt", ".safetensors", ".ckpt", ".tar"))
    ]:
        remedy = f"name a file in it, as {os.path.join(folder, files[0])}"
    raise UsageError(f"'{folder}' in '{text}': a folder, not a checkpoint; {remedy}")


def _of_checkpoint(file: Path, name: str) -> TeacherSpec | None:
    """The student in a checkpoint of `img2vec pretrain`, which holds its configuration."""
    from tokdiv.teachers.checkpoint import read_checkpoint  # torch, and the whole file

    content = read_checkpoint(file)
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict) or not isinstance(config.get("student"), str):
        return None
    arguments = dict(config.get("student_args") or {})
    return TeacherSpec(
        name,
        config["student"],
        weights=str(file.resolve()),
        mean=config.get("mean"),
        std=config.get("std"),
        input_size=config.get("image_size"),
        arguments={k: v for k, v in arguments.items() if k not in OF_THE_VIEW},
        use_ema=False,  # the student itself, also where its average was the target
    )
