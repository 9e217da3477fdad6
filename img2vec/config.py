"""All settings of a pretraining run in one frozen dataclass, and the presets.

Precedence, lowest first: the preset, the YAML file, the options of the call.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from tokdiv.errors import UsageError
from tokdiv.teachers.spec import nearest

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Config:
    """Settings of one run. Fields marked (free) may change when a run is resumed; the others may not.

    Attributes:
        student: a timm VisionTransformer without weights: any plain `vit_*`.
        student_args: its further timm arguments, as {"depth": 6, "drop_path_rate": 0.1}.
        image_size: side of the student's view in pixels; the teacher gets the same view, resized where
            its spec names another size.
        mean, std: of the student's input, in units of [0, 1].
        crop_scale: range of the area of the random resized crop.
        mask_ratio: fraction of the mask units that are hidden, rounded to whole units.
        mask_unit: side of a mask unit in pixels.
        decoder_depth: transformer layers; None: 2, and 4 for students 1024 wide or wider.
        decoder_dim: width of the decoder, in heads of 32 channels.
        blocks: which encoder blocks the representation averages: "all", "last", or zero-based numbers
            "2,5,8,11".
        global_weight: weight of the global loss; 0 turns it off.
        target_norm: per teacher token, without learned parameters: "layer", "l2" or "none".
        align: how the teacher's grid meets the student's: "pool-student" averages the student's
            predictions over the cells of each teacher token, "resample-teacher" brings the teacher's
            tokens to the student's grid; None: the first where the teacher's grid is as coarse or
            coarser, else the second.
        epochs: length of the schedule.
        max_steps: stop after so many steps of it (free).
        epoch_size: images that make an epoch; None: all of the data.
        batch_size: images per process and forward pass.
        accumulate: forward passes per step.
        blr: learning rate per 256 images of the global batch.
        lr: the learning rate itself, in place of blr.
        warmup_epochs: None: 40, or a tenth of the epochs where that is less.
        weight_decay: on matrices; none on biases, norms, tokens and position embeddings.
        clip_grad: largest norm of the gradient; None: not clipped.
        dtype: "float32", "bfloat16" (autocast), or "auto": bfloat16 where the device computes in it.
        seed: of the weights, the order, the crops and the masks.
        compile: "on", "off", or "auto", which is on for CUDA (free).
        checkpoint_blocks: compute the encoder's blocks again in the backward pass, for memory (free).
        shard: FSDP2: parameters and optimizer state spread over the processes (free).
        device: "auto", "cpu", "cuda" (free).
        workers: decoding threads per process; None: one per core, at most 16 (free).
        cache_ram: keep the encoded bytes of the images in memory (free).
        save_every: steps between checkpoints; None: one per epoch (free).
        keep: how many checkpoints stay (free).
        knn_every: epochs between measurements of k-NN accuracy where the data has classes, 0: never (free).
        wandb: report to Weights & Biases (free).
    """

    student: str = "vit_base_patch16_224"
    student_args: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)
    crop_scale: tuple[float, float] = (0.2, 1.0)
    mask_ratio: float = 0.6
    mask_unit: int = 32
    decoder_depth: int | None = None
    decoder_dim: int = 512
    blocks: str = "all"
    global_weight: float = 0.5
    target_norm: Literal["layer", "l2", "none"] = "layer"
    align: Literal["pool-student", "resample-teacher"] | None = None
    epochs: int = 800
    max_steps: int | None = None
    epoch_size: int | None = None
    batch_size: int = 256
    accumulate: int = 1
    blr: float = 1.5e-4
    lr: float | None = None
    warmup_epochs: float | None = None
    weight_decay: float = 0.05
    clip_grad: float | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    compile: Literal["auto", "on", "off"] = "auto"
    checkpoint_blocks: bool = False
    shard: bool = False
    device: str = "auto"
    workers: int | None = None
    cache_ram: bool = False
    save_every: int | None = None
    keep: int = 3
    knn_every: int = 10
    wandb: bool = False

    def __post_init__(self) -> None:
        at_least_one = (
            "image_size mask_unit decoder_depth decoder_dim epochs max_steps epoch_size batch_size "
            "accumulate workers save_every keep"
        )
        for name in at_least_one.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{option(name)} {value}: expected 1 or more")
        for name in ["global_weight", "weight_decay", "knn_every", "warmup_epochs", "seed"]:
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"{option(name)} {value}: expected 0 or more")
        for name in ["blr", "lr", "clip_grad"]:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{option(name)} {value}: expected a positive number")
        if not 0 < self.mask_ratio < 1:
            raise UsageError(
                f"--mask-ratio {self.mask_ratio}: expected a number between 0 and 1, as 0.6"
            )
        if self.decoder_dim % 32:
            raise UsageError(
                f"--decoder-dim {self.decoder_dim}: expected a multiple of 32, the width of a head"
            )
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UsageError(
                f"crop_scale {self.crop_scale}: expected two fractions of the area, as (0.2, 1)"
            )
        if min(self.std) <= 0:
            raise UsageError(f"std {self.std}: expected positive numbers")
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise UsageError(
                f"--warmup-epochs {self.warmup_epochs:g} is longer than the {self.epochs} epochs: "
                f"the learning rate would never reach its peak; lower it or raise --epochs"
            )

    @property
    def warmup(self) -> float:
        """Epochs of linear warm-up."""
        return min(40.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs

    def peak_lr(self, global_batch: int) -> float:
        """The learning rate after the warm-up: `lr`, or blr * global batch / 256."""
        return self.lr if self.lr is not None else self.blr * global_batch / 256

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "the configuration") -> Self:
        """The inverse of `to_dict`; raises UsageError for an unknown key or a value of another type."""
        return cls(**_checked(values, where))


# What may differ between a run and its resumption without making it another run.
FREE = frozenset(
    {
        "max_steps",
        "compile",
        "checkpoint_blocks",
        "shard",
        "device",
        "workers",
        "cache_ram",
        "save_every",
        "keep",
        "knn_every",
        "wandb",
    }
)

# Each preset: its command, and what to expect of it. The commands make MAE's global batch of 4096.
PRESETS: dict[str, Config] = {
    # torchrun --nproc-per-node 8 -m img2vec pretrain IMAGENET/train --preset vit_small \
    #     --teacher dino_resnet50 --accumulate 2 -o runs/small
    # A light student for trying teachers at scale. Not trained at that scale here.
    "vit_small": Config(student="vit_small_patch16_224", decoder_depth=2),
    # torchrun --nproc-per-node 8 -m img2vec pretrain IMAGENET/train --preset vit_base \
    #     --teacher dino_resnet50 --accumulate 2 -o runs/base
    # The paper's abstract (arXiv 2304.12535) gives 85.1% top-1 on ImageNet after fine-tuning; this
    # implementation has not been trained at that scale.
    "vit_base": Config(student="vit_base_patch16_224", decoder_depth=2),
    # torchrun --nproc-per-node 8 -m img2vec pretrain IMAGENET/train --preset vit_large \
    #     --teacher dino_resnet50 --accumulate 4 -o runs/large
    # A decoder of 4 layers. Not trained at that scale here.
    "vit_large": Config(student="vit_large_patch16_224", decoder_depth=4, batch_size=128),
    # torchrun --nproc-per-node 8 -m img2vec pretrain IMAGENET/train --preset vit_huge \
    #     --teacher dino_resnet50 --accumulate 8 --shard -o runs/huge
    # Patches of 16 px and not 14: a teacher token of 32 px then covers whole student patches. Not trained
    # at that scale here.
    "vit_huge": Config(
        student="vit_huge_patch14_224",
        student_args={"patch_size": 16},
        decoder_depth=4,
        batch_size=64,
        checkpoint_blocks=True,
    ),
    # img2vec pretrain photos/ --preset sample --teacher pixels -o runs/sample
    # Minutes on a CPU: half a ViT-tiny, for a look at the whole pipeline and for small sets of images.
    # Expect the loss to fall within the first epochs, not a backbone worth keeping.
    "sample": Config(
        student="vit_tiny_patch16_224",
        student_args={"depth": 6},
        decoder_depth=2,
        decoder_dim=192,
        epochs=20,
        batch_size=32,
        blr=1e-3,
        knn_every=5,
    ),
}


def option(name: str) -> str:
    """A field's spelling on the command line."""
    return "--" + name.replace("_", "-")


def make_config(
    preset: str | None = None,
    file: str | Path | None = None,
    options: dict[str, Any] | None = None,
) -> Config:
    """The settings of a call: the preset, overridden by the file, overridden by the options.

    Args:
        preset: a key of PRESETS; None: the file's `preset`, else "vit_base".
        file: YAML with fields of Config as keys, and possibly `preset`.
        options: fields of Config; None as a value means "not given".

    Another student than the preset's is taken whole, without the preset's `student_args`.

    Raises:
        UsageError: an unknown preset, key or option (the nearest is named), or a value out of range.
    """
    from_file = _read_yaml(Path(file)) if file is not None else {}
    preset = preset or from_file.pop("preset", None) or "vit_base"
    from_file.pop("preset", None)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UsageError(
            f"unknown preset '{preset}'{nearest(str(preset), PRESETS)}; expected one of {', '.join(PRESETS)}"
        )
    given = {k: v for k, v in (options or {}).items() if v is not None}
    values = _checked(from_file, f"'{file}'") | _checked(given, "the call")
    if values.get("student", PRESETS[preset].student) != PRESETS[preset].student:
        values = {"student_args": {}} | values  # the preset's are those of its own student
    return dataclasses.replace(PRESETS[preset], **values)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise UsageError(f"--config '{path}': no such file; expected YAML with settings")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"'{path}' holds no settings: expected lines of `key: value`")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Values brought to the types of Config's fields; an unknown or mistyped one is a UsageError."""
    hints = typing.get_type_hints(Config)
    checked = {}
    for key, value in values.items():
        if key not in hints:
            raise UsageError(
                f"{where}: unknown setting '{key}'{nearest(key, hints)}; "
                f"the settings are {', '.join(hints)}"
            )
        try:
            checked[key] = _converted(value, hints[key])
        except (TypeError, ValueError, OverflowError):
            raise UsageError(
                f"{where}: {key} = {value!r}: expected {_expected(hints[key])}"
            ) from None
    return checked


def _converted(value: Any, hint: Any) -> Any:
    """`value` as the annotated type; ValueError where it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _converted(value, next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        # YAML reads a bare `on` or `off` as a truth value.
        value = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        if value not in arguments:
            raise ValueError
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise ValueError
        return tuple(_converted(v, a) for v, a in zip(value, arguments))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError
        return dict(value)
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError
        return value
    if isinstance(value, bool) or (hint is int and float(value) != int(value)):
        raise ValueError
    if hint is str and isinstance(value, (list, tuple)):
        return ",".join(str(v) for v in value)  # blocks: [2, 5, 8, 11]
    return hint(value)  # YAML reads 1e-4, without a point, as text


def _expected(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _expected(next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return f"{len(arguments)} numbers"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return names.get(hint, "a table of key: value")
