"""A student as a folder that timm loads: `model.safetensors` and `config.json`.

    timm.create_model("local-dir:OUT/student", pretrained=True)                  # the mean patch token
    timm.create_model("local-dir:OUT/student", pretrained=True, num_classes=10)  # and a new classifier
    timm.create_model("hf-hub:USER/NAME", pretrained=True)                       # once uploaded
    timm.create_model(ARCHITECTURE, num_classes=0, checkpoint_path="OUT/student/model.safetensors")

The folder has the format of timm's own `save_for_hf`, which is not used here because it would pass on the
license, origin and tag of timm's weights for the architecture, and those are not the student's.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from tokdiv.errors import RunError, UsageError, first_line
from tokdiv.run_dir import part_of, read_json, remove_parts, write_error
from tokdiv.teachers.architecture import create_model

WEIGHTS, CONFIG = "model.safetensors", "config.json"
CROP_PCT = 224 / 256  # the center crop of tokdiv's view
TOLERANCE = 1e-5  # of the features of what was written, relative to the largest

Triple = tuple[float, float, float]


def export_student(
    state_dict: Mapping[str, Tensor],
    architecture: str,
    out: str | Path,
    *,
    model_args: Mapping[str, Any] | None = None,
    mean: Triple,
    std: Triple,
    input_size: int,
    description: Mapping[str, Any] | None = None,
) -> Path:
    """Write an encoder as a folder that timm loads, and check it by loading it.

    Args:
        state_dict: the encoder's, with timm's key names for `num_classes=0`.
        architecture: timm's name.
        out: the folder; an existing one is replaced once the new one is complete.
        model_args: further arguments of the architecture, of JSON types.
        mean, std: normalization of the input, in units of [0, 1].
        input_size: side of the input in pixels.
        description: stored in config.json under "img2vec".

    Returns:
        The folder.

    Raises:
        UsageError: the weights do not fit the architecture.
        RunError: the folder cannot be written, or timm does not load the same model from it.
    """
    from timm.models.vision_transformer import VisionTransformer

    arguments = {**(model_args or {}), "num_classes": 0}
    model = build(architecture, arguments, input_size)
    if type(model) is VisionTransformer and model.global_pool == "token":
        # No target trains the CLS token, and k-NN and probe use the mean patch token. The final norm stays
        # on the tokens, as in pretraining: timm's default with "avg" would be a new norm after pooling.
        arguments |= {"global_pool": "avg", "fc_norm": False}
        model.reset_classifier(0, global_pool="avg")  # type: ignore[operator]
    load_strictly(model, state_dict, architecture)
    return save_model(
        model,
        architecture,
        out,
        model_args=arguments,
        mean=mean,
        std=std,
        input_size=input_size,
        description=description,
    )


def build(architecture: str, arguments: Mapping[str, Any], input_size: int) -> nn.Module:
    """The architecture, untrained, in eval mode; torch's generators keep their state."""
    import timm

    if not timm.is_model(architecture):
        raise UsageError(
            f"timm {timm.__version__} has no architecture '{architecture}': install the version that the "
            f"student was pretrained with"
        )
    with torch.random.fork_rng(devices=[]):
        given = sized(architecture, arguments, input_size)
        own = {key: given.pop(key) for key in ("num_classes", "img_size") if key in given}
        model = create_model(architecture, given, **own)
    return model.eval()


def sized(architecture: str, arguments: Mapping[str, Any], input_size: int) -> dict[str, Any]:
    """The arguments, with `img_size` where the architecture is made for one other than `input_size`."""
    import timm

    default = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    fixed = default is not None and default.fixed_input_size
    native = default.input_size[-1] if default is not None else None
    extra = {"img_size": input_size} if fixed and native != input_size else {}
    return {**{k: v for k, v in arguments.items() if k != "img_size"}, **extra}


def load_strictly(model: nn.Module, state_dict: Mapping[str, Tensor], architecture: str) -> None:
    """Load weights; a missing, unexpected or misshapen one is a UsageError."""
    wanted = model.state_dict()
    problems = [f"missing {key}" for key in wanted if key not in state_dict]
    problems += [f"unexpected {key}" for key in state_dict if key not in wanted]
    problems += [
        f"{key} is {tuple(value.shape)}, expected {tuple(wanted[key].shape)}"
        for key, value in state_dict.items()
        if key in wanted and value.shape != wanted[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UsageError(
            f"the weights do not fit {architecture}: {'; '.join(problems[:3])}{more}; the student's "
            f"architecture and its arguments must be those that it was trained with"
        )
    model.load_state_dict({key: value.detach().cpu() for key, value in state_dict.items()})


def save_model(
    model: nn.Module,
    architecture: str,
    out: str | Path,
    *,
    model_args: Mapping[str, Any],
    mean: Triple,
    std: Triple,
    input_size: int,
    description: Mapping[str, Any] | None = None,
    label_names: list[str] | None = None,
) -> Path:
    """Write a timm model with or without a classifier, and check it; see `export_student`."""
    out = Path(out).resolve()  # a link stays, and the folder behind it is replaced
    model = model.eval()
    config = _config(model, architecture, model_args, mean, std, input_size)
    if label_names is not None:
        config["label_names"] = label_names
    if description:
        config["img2vec"] = dict(description)
    try:
        text = json.dumps(config, indent=2) + "\n"
    except TypeError as error:
        raise UsageError(
            f"config.json takes numbers, texts, lists and tables only: {error}"
        ) from None
    tensors = {
        key: (value.float() if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in model.state_dict().items()
    }
    # timm and transformers look for this entry of the metadata.
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    part, old = part_of(out), part_of(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_parts(out.parent, out.name)
        part.mkdir()
        for name, content in ((WEIGHTS, weights), (CONFIG, text.encode())):
            with (part / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _check(part, model, input_size)
        if out.exists():
            out.rename(old)
        part.rename(out)
    except OSError as error:
        raise write_error(out, error) from None
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
    return out


def _config(
    model: nn.Module,
    architecture: str,
    model_args: Mapping[str, Any],
    mean: Triple,
    std: Triple,
    input_size: int,
) -> dict[str, Any]:
    known: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    num_classes = int(model_args.get("num_classes", 0))
    arguments = {k: v for k, v in model_args.items() if k != "num_classes"}
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": int(model.num_features),  # type: ignore[arg-type]
        "model_args": sized(architecture, arguments, input_size),
        "pretrained_cfg": {
            "tag": "img2vec",
            "custom_load": False,
            "input_size": [3, input_size, input_size],
            "fixed_input_size": bool(known.get("fixed_input_size", False)),
            "interpolation": "bicubic",
            "crop_pct": CROP_PCT,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": num_classes,
            "pool_size": None,
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    }


@torch.no_grad()
def _check(folder: Path, model: nn.Module, input_size: int) -> None:
    """Load the folder with timm, as a user would, and compare tokens and features with the model's."""
    import timm

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, input_size, input_size, generator=generator)
    weight = next(model.parameters())
    try:
        with torch.random.fork_rng(devices=[]), _plain_path(folder) as path:
            loaded = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        expected = _outputs(model, images.to(weight.device, weight.dtype))
        difference = (_outputs(loaded, images) - expected).abs().max().item()
    except (RuntimeError, TypeError, ValueError, KeyError, AssertionError) as error:
        raise RunError(f"timm cannot load the export: {first_line(error)}") from error
    scale = max(1.0, expected.abs().max().item())
    if not difference <= TOLERANCE * scale:  # also where it is NaN
        raise RunError(
            f"the export gives features that differ by {difference:.2g} from the student's (at most "
            f"{TOLERANCE * scale:.2g} is rounding): it was not kept; weights that are not finite do this"
        )


@contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """The folder under a path without special characters: timm before 1.0.29 cuts a path at # and ?."""
    if re.fullmatch(r"[\w./-]+", str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        link = Path(temporary) / "student"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Tokens, and features or logits, in one vector."""
    tokens = model.forward_features(images)  # type: ignore[operator]
    return torch.cat([tokens.flatten(), model(images).flatten()]).float().cpu()


def is_timm_folder(path: Path) -> bool:
    """Whether it is a folder in timm's format, as written here."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def read_student(path: str | Path) -> dict[str, Any]:
    """A student as the keyword arguments of `export_student` (without `out`).

    Args:
        path: a folder of timm's format, OUT of a pretraining (its `student/`, else its last complete
            checkpoint), or a checkpoint.

    Raises:
        UsageError: none of these.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UsageError(
            f"'{path}': no such file or folder; expected OUT of img2vec pretrain, its student/, or a "
            f"checkpoint"
        )
    for folder in (path, path / "student"):
        if is_timm_folder(folder):
            return _read_timm_folder(folder)
    from img2vec.resume import student_from_checkpoint  # which reads a run's files

    return student_from_checkpoint(path)


def _read_timm_folder(folder: Path) -> dict[str, Any]:
    from tokdiv.teachers.checkpoint import read_checkpoint

    try:
        config = read_json(folder / CONFIG)
        pretrained = config["pretrained_cfg"]
        student = {
            "architecture": str(config["architecture"]),
            "model_args": dict(config.get("model_args") or {}),
            "mean": _triple(pretrained["mean"]),
            "std": _triple(pretrained["std"]),
            "input_size": int(pretrained["input_size"][-1]),
            "description": config.get("img2vec"),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(
            f"'{folder / CONFIG}' is no timm configuration ({type(error).__name__}: {first_line(error)})"
        ) from None
    tensors = read_checkpoint(folder / WEIGHTS)
    if config.get("num_classes"):
        names = pretrained.get("classifier") or "head"
        prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
        tensors = {key: value for key, value in tensors.items() if not key.startswith(prefixes)}
    return {"state_dict": tensors, **student}


def _triple(values: Any) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def export(source: str | Path, out: str | Path) -> Path:
    """Write the student of a pretraining as a folder that timm loads.

    Args:
        source: see `read_student`.
        out: the folder to write.

    Raises:
        UsageError: `source` holds no student, or `out` is where it lies or is in use.
        RunError: see `export_student`.
    """
    origin, out = Path(source).expanduser().resolve(), Path(out).expanduser()
    if out.resolve() in (origin, origin / "student") or out.resolve() in origin.parents:
        raise UsageError(f"'{out}' is where the student is read from: give another folder with -o")
    if out.exists() and not (out.is_dir() and (is_timm_folder(out) or not any(out.iterdir()))):
        raise UsageError(f"'{out}' exists and is no exported student: give a new folder with -o")
    return export_student(**read_student(source), out=out)
