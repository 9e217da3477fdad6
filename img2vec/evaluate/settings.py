"""Settings of the evaluations: defaults, help texts and constraints. The command line is made from them."""

from dataclasses import dataclass
from typing import Literal

from tokdiv.errors import UsageError
from tokdiv.settings import check_settings, setting


@dataclass(frozen=True)
class ModelSettings:
    """How the model runs; every evaluation has these settings."""

    image_size: int | None = setting(
        None,
        "Side of the view in pixels.",
        at_least=1,
        shown_default="the model's own",
    )
    workers: int | None = setting(
        None, "Decoding threads per process.", at_least=0, shown_default="one per core"
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps.")
    dtype: str = setting("auto", "auto, float32 or bfloat16; auto is bfloat16 where it is native.")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class KnnSettings(ModelSettings):
    """Settings of `knn`; the defaults are DINO's (arXiv 2104.14294, app. F.1)."""

    k: tuple[int, ...] = setting(
        (10, 20, 100, 200), "Numbers of neighbors, joined with commas.", at_least=1, as_text=True
    )
    temperature: float = setting(0.07, "Temperature of the votes.", above=0)
    feature: str = setting("mean", "Feature of an image: mean (of its patch tokens) or cls.")
    batch_size: int = setting(64, "Images per forward pass, per process.", at_least=1)


@dataclass(frozen=True)
class ProbeSettings(ModelSettings):
    """Settings of `probe`; the defaults are MAE's linear probe (arXiv 2111.06377, app. A.1)."""

    solver: Literal["lars", "lbfgs"] = setting("lars", "lars (MAE's recipe) or lbfgs (quick).")
    epochs: int = setting(90, "Number of LARS epochs.", at_least=1)
    batch_size: int = setting(
        16384, "Images per LARS step, over all processes; at most the training images.", at_least=1
    )
    blr: float = setting(0.1, "Learning rate per 256 images of the batch.", at_least=0)
    lr: float | None = setting(None, "Peak learning rate, in place of --blr.", at_least=0)
    warmup_epochs: float = setting(10.0, "Epochs of linear warm-up.", at_least=0)
    penalty: float | None = setting(
        None,
        "Weight decay of lbfgs: the factor of half the squared weights beside the mean cross-entropy.",
        at_least=0,
        shown_default="chosen on a fifth of --train",
    )
    feature: str = setting("mean", "Feature of an image: mean (of its patch tokens) or cls.")
    encode_batch_size: int = setting(64, "Images per forward pass, per process.", at_least=1)
    seed: int = setting(
        0,
        "Seed of order, augmentation, the classifier's start and the fifth held out.",
        at_least=0,
        below=2**63,
    )


@dataclass(frozen=True)
class FinetuneSettings(ModelSettings):
    """Settings of `finetune`; the defaults are MAE's for ViT-B (arXiv 2111.06377, app. A.1, table 9).

    For ViT-L: epochs 50, blr 1e-3, layer_decay 0.75, drop_path 0.2.
    """

    epochs: int = setting(100, "Length of the schedule.", at_least=1)
    batch_size: int = setting(
        1024, "Images per step, over all processes; at most the training images.", at_least=1
    )
    micro_batch_size: int | None = setting(
        None,
        "Images per forward pass, per process; fewer take less memory, and the gradient is the same.",
        at_least=1,
        shown_default="the process's whole batch",
    )
    blr: float = setting(5e-4, "Learning rate per 256 images of the batch.", at_least=0)
    lr: float | None = setting(None, "Peak learning rate, in place of --blr.", at_least=0)
    min_lr: float = setting(1e-6, "Learning rate at the end of the cosine.", at_least=0)
    warmup_epochs: float = setting(5.0, "Epochs of linear warm-up.", at_least=0)
    weight_decay: float = setting(0.05, "Weight decay of matrices.", at_least=0)
    layer_decay: float = setting(
        0.65, "The learning rate of a block is that of the next one times this.", above=0
    )
    drop_path: float = setting(0.1, "Stochastic depth of the last block.", at_least=0, below=1)
    mixup: float = setting(0.8, "Alpha of mixup; 0 turns it off.", at_least=0)
    cutmix: float = setting(1.0, "Alpha of cutmix; 0 turns it off.", at_least=0)
    smoothing: float = setting(0.1, "Label smoothing.", at_least=0, below=1)
    auto_augment: str = setting(
        "rand-m9-mstd0.5-inc1", "RandAugment in timm's notation (its --aa); empty turns it off."
    )
    reprob: float = setting(0.25, "Probability of random erasing.", at_least=0, at_most=1)
    seed: int = setting(
        0,
        "Seed of order, augmentation, drop path and the classifier's start.",
        at_least=0,
        below=2**63,
    )


@dataclass(frozen=True)
class Recipe(FinetuneSettings):
    """Settings of a fine-tuning with nothing left open."""

    micro_batch_size: int = 1
    lr: float = 0.0
    image_size: int = 224
    workers: int = 1


@dataclass(frozen=True)
class DetectSettings(ModelSettings):
    """Settings of `detect`; the defaults are ViTDet's for ViT-B on COCO (arXiv 2203.16527, app. A.2).

    For ViT-L: layer_decay 0.8, drop_path 0.4. For ViT-H: layer_decay 0.9, drop_path 0.5, 75 epochs.
    """

    image_size: int = setting(
        1024, "Side of the square that images are fitted into; a multiple of 32.", at_least=64
    )
    epochs: int = setting(100, "Length of the schedule.", at_least=1)
    max_steps: int | None = setting(
        None,
        "Length of the schedule in optimizer steps, in place of --epochs; for small data.",
        at_least=1,
        shown_default="--epochs decides",
    )
    batch_size: int = setting(
        64, "Images per step, over all processes; at most the training images.", at_least=1
    )
    micro_batch_size: int = setting(
        1,
        "Images per forward pass, per process; gradients accumulate to --batch-size.",
        at_least=1,
    )
    blr: float = setting(4e-4, "Learning rate per 256 images of the batch.", at_least=0)
    lr: float | None = setting(None, "Peak learning rate, in place of --blr.", at_least=0)
    warmup_steps: int = setting(250, "Steps of linear warm-up.", at_least=0)
    weight_decay: float = setting(0.1, "Weight decay of matrices.", at_least=0)
    layer_decay: float = setting(
        0.7, "The learning rate of a block is that of the next one times this.", above=0
    )
    drop_path: float = setting(0.1, "Stochastic depth of the last block.", at_least=0, below=1)
    clip_grad: float | None = setting(
        None, "Largest norm of the gradient.", above=0, shown_default="not clipped"
    )
    ema: float = setting(
        0.0,
        "Decay of a moving average of the weights, which is evaluated; 0: none.",
        at_least=0,
        below=1,
    )
    scale_min: float = setting(0.1, "Smallest scale of the large-scale jitter.", above=0)
    scale_max: float = setting(2.0, "Largest scale of the large-scale jitter.", above=0)
    flip: float = setting(0.5, "Probability of a horizontal flip.", at_least=0, at_most=1)
    window: str = setting(
        "auto",
        "Windowed attention: off, the side of a window in tokens, or auto (windows where the grid "
        "exceeds 32 x 32 tokens).",
    )
    global_blocks: int = setting(
        4, "Blocks with global attention among windowed ones, evenly spaced.", at_least=1
    )
    channels: int = setting(256, "Channels of the feature pyramid and of the heads.", at_least=8)
    proposals: int = setting(
        512, "Proposals per image that the box and mask heads learn from.", at_least=1
    )
    checkpoint_blocks: bool = setting(
        False, "Less memory: the backbone is computed again in the backward pass."
    )
    eval_every: int = setting(
        0, "Epochs between evaluations on --val; 0 evaluates at the end only.", at_least=0
    )
    save_every: int | None = setting(
        None, "Steps between checkpoints.", at_least=1, shown_default="one an epoch"
    )
    workers: int | None = setting(
        None,
        "Worker processes that read images, per process.",
        at_least=0,
        shown_default="one per core",
    )
    seed: int = setting(
        0, "Seed of order, augmentation, drop path and the new layers.", at_least=0, below=2**63
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_min > self.scale_max:
            raise UsageError(f"--scale-min {self.scale_min}: above --scale-max {self.scale_max}")


@dataclass(frozen=True)
class DetectRecipe(DetectSettings):
    """Settings of a detector's training with nothing left open."""

    lr: float = 0.0
    max_steps: int = 1
    save_every: int = 1
    workers: int = 1


def peak_lr(settings: ProbeSettings | FinetuneSettings | DetectSettings, batch_size: int) -> float:
    """The learning rate after the warm-up: `lr`, or blr * batch_size / 256."""
    return settings.blr * batch_size / 256 if settings.lr is None else settings.lr


def warmup_note(warmup_epochs: float, epochs: float) -> list[str]:
    """A note where the training ends before its warm-up does."""
    if warmup_epochs < epochs:
        return []
    return [
        f"the warm-up of {warmup_epochs:g} epochs takes up all {epochs:g}: the learning rate never comes down; "
        f"give --warmup-epochs"
    ]
