"""All settings of a pretraining run in one frozen dataclass, and the presets.

Precedence, lowest first: the preset, the YAML file, the options of the call.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from tokdiv.errors import UsageError
from tokdiv.settings import check_settings, convert, expected, setting
from tokdiv.teachers.spec import nearest

if TYPE_CHECKING:
    import torch

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Config:
    """Settings of one run; `free` ones may change when the run is resumed."""

    student: str = setting("vit_base_patch16_224", "Any plain vit_* of timm.")
    student_args: dict[str, Any] = setting(
        {}, 'Further arguments of the timm model, as {"depth": 6, "drop_path_rate": 0.1}.'
    )
    image_size: int = setting(
        224, "Side of the student's view in pixels.", at_least=1, at_most=8192
    )
    mean: Triple = setting(
        (0.485, 0.456, 0.406), "Mean of the student's input, in units of [0, 1]."
    )
    std: Triple = setting(
        (0.229, 0.224, 0.225), "Standard deviation of it, in units of [0, 1].", above=0
    )
    crop_scale: tuple[float, float] = setting(
        (0.2, 1.0), "Range of the area of the random resized crop.", above=0, at_most=1
    )
    mask_ratio: float = setting(
        0.6, "Fraction of the mask units that are hidden from the student.", above=0, below=1
    )
    mask_unit: int = setting(32, "Side of a mask unit in pixels.", at_least=1)
    decoder_depth: int | None = setting(
        None, "Layers of the decoder.", at_least=1, shown_default="2; 4 for ViT-L and ViT-H"
    )
    decoder_dim: int = setting(
        512, "Width of the decoder: a multiple of 32, the width of a head.", at_least=1
    )
    blocks: str = setting(
        "all", "Encoder blocks to average: all, last, or zero-based numbers as 2,5,8,11."
    )
    global_weight: float = setting(0.5, "Weight of the global loss; 0 turns it off.", at_least=0)
    target_norm: Literal["layer", "l2", "none"] = setting(
        "layer", "Normalization of each teacher token: layer, l2 or none."
    )
    align: Literal["pool-student", "resample-teacher"] | None = setting(
        None,
        "pool-student averages the student's predictions over each teacher token, resample-teacher brings the "
        "teacher's tokens to the student's grid.",
        shown_default="pool-student unless the teacher's grid is finer",
    )
    epochs: int = setting(800, "Length of the schedule.", at_least=1)
    max_steps: int | None = setting(
        None, "Stop after this many optimizer steps of the schedule.", at_least=1, free=True
    )
    epoch_size: int | None = setting(
        None, "Images of an epoch.", at_least=1, shown_default="all of DATA"
    )
    batch_size: int = setting(256, "Images of one forward pass, per process.", at_least=1)
    accumulate: int = setting(1, "Forward passes of an optimizer step.", at_least=1)
    blr: float = setting(1.5e-4, "Learning rate per 256 images of the global batch.", above=0)
    lr: float | None = setting(None, "Peak learning rate, instead of --blr.", above=0)
    warmup_epochs: float | None = setting(
        None,
        "Epochs of linear warm-up.",
        at_least=0,
        shown_default="40, at most a tenth of the epochs",
    )
    weight_decay: float = setting(
        0.05, "Weight decay of matrices; biases, norms and tokens have none.", at_least=0
    )
    clip_grad: float | None = setting(
        None, "Largest norm of the gradient.", above=0, shown_default="not clipped"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "auto, float32 or bfloat16 (autocast); auto is bfloat16 where it is native."
    )
    seed: int = setting(
        0, "Seed of weights, order, crops and masks.", at_least=0, at_most=2**63 - 1
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "auto, on or off: torch.compile; auto is on for CUDA.", free=True
    )
    checkpoint_blocks: bool = setting(
        False, "Less memory: compute the encoder again in the backward pass.", free=True
    )
    shard: bool = setting(
        False, "FSDP2: spread parameters and optimizer state over the processes.", free=True
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.", free=True)
    workers: int | None = setting(
        None,
        "Decoding threads per process.",
        at_least=1,
        shown_default="one per core, at most 16",
        free=True,
    )
    cache_ram: bool = setting(False, "Keep the encoded images in memory.", free=True)
    save_every: int | None = setting(
        None, "Steps between checkpoints.", at_least=1, shown_default="one per epoch", free=True
    )
    keep: int = setting(3, "Number of checkpoints to keep.", at_least=1, free=True)
    knn_every: int = setting(
        10,
        "Epochs between k-NN accuracies, where DATA has classes; 0 for never.",
        at_least=0,
        free=True,
    )
    wandb: bool = setting(False, "Report to Weights & Biases.", free=True)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.decoder_dim % 32:
            raise UsageError(
                f"--decoder-dim {self.decoder_dim}: expected a multiple of 32, the width of a head"
            )
        low, high = self.crop_scale
        if low > high:
            raise UsageError(f"--crop-scale {low}, {high}: expected the smaller area first")
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise UsageError(
                f"--warmup-epochs {self.warmup_epochs:g} is longer than the {self.epochs} epochs: "
                f"the learning rate would never reach its peak; lower it or raise --epochs"
            )

    @property
    def warmup(self) -> float:
        """Epochs of linear warm-up."""
        return min(40.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs

    def compiles_on(self, device: "torch.device") -> bool:
        """Whether teacher and student go through torch.compile."""
        return self.compile == "on" or (self.compile == "auto" and device.type == "cuda")

    def peak_lr(self, global_batch: int) -> float:
        """The learning rate after the warm-up: `lr`, or blr * global batch / 256."""
        return self.lr if self.lr is not None else self.blr * global_batch / 256

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "the configuration") -> Self:
        """The inverse of `to_dict`; UsageError for an unknown key or a value of another type or range."""
        return cls(**_checked(values, where))


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


def make_config(
    preset: str | None = None,
    file: str | Path | None = None,
    options: dict[str, Any] | None = None,
) -> Config:
    """The settings of a call: the preset's, replaced by the file's, replaced by the options.

    Args:
        preset: a key of PRESETS; None: the file's `preset`, else "vit_base".
        file: YAML with fields of Config as keys, and possibly `preset`.
        options: fields of Config; None as a value means "not given".

    With another student than the preset's, the preset's `student_args` are left out.

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
    """Values converted to the types of Config's fields.

    Raises:
        UsageError: an unknown key, or a value of another type.
    """
    hints = typing.get_type_hints(Config)
    checked = {}
    for key, value in values.items():
        if key not in hints:
            raise UsageError(
                f"{where}: unknown setting '{key}'{nearest(key, hints)}; the settings are {', '.join(hints)}"
            )
        try:
            checked[key] = convert(value, hints[key])
        except (TypeError, ValueError, OverflowError):
            raise UsageError(
                f"{where}: {key} = {value!r}: expected {expected(hints[key])}"
            ) from None
    return checked
