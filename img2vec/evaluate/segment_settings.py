"""Settings of `segment`: defaults, help texts and constraints. The command line is made from them."""

from dataclasses import dataclass
from typing import Literal

from img2vec.evaluate.settings import ModelSettings
from tokdiv.settings import setting


@dataclass(frozen=True)
class SegmentSettings(ModelSettings):
    """Settings of `segment`; those of `upernet` are MAE's and BEiT's for ViT-B on ADE20K.

    For ViT-L: layer_decay 0.75, drop_path 0.2. For small data: a lower max_steps.
    """

    head: Literal["linear", "knn", "upernet"] = setting(
        "linear", "linear and knn: frozen tokens; upernet: the whole network is fine-tuned."
    )
    image_size: int | None = setting(
        None,
        "Side of a view in pixels.",
        at_least=1,
        shown_default="the model's own; upernet: 512",
    )
    mode: Literal["auto", "whole", "slide"] = setting(
        "auto",
        "whole: an image is resized to one view; slide: its short side is, and windows slide along it; auto: slide "
        "for upernet.",
    )
    stride: int | None = setting(
        None, "Pixels between two windows.", at_least=1, shown_default="two thirds of the view"
    )
    blocks: str | None = setting(
        None,
        "Blocks or stages to use, as 3,5,7,11: concatenated for linear and knn, the four of upernet.",
        shown_default="the last; upernet: at a third, a half, two thirds and the end",
    )
    max_steps: int | None = setting(
        None,
        "Length of the schedule in optimizer steps.",
        at_least=1,
        shown_default="linear: 2,000; upernet: 160,000",
    )
    batch_size: int = setting(
        16, "Views per step, over all processes; at most the training views.", at_least=1
    )
    micro_batch_size: int | None = setting(
        None,
        "Images per forward pass of upernet's training, per process; fewer take less memory, and BatchNorm sees "
        "fewer.",
        at_least=1,
        shown_default="the process's whole batch",
    )
    lr: float | None = setting(
        None, "Peak learning rate.", above=0, shown_default="linear: 3e-3; upernet: 1e-4"
    )
    weight_decay: float | None = setting(
        None, "Weight decay of matrices.", at_least=0, shown_default="linear: 1e-4; upernet: 0.05"
    )
    warmup_steps: int | None = setting(
        None,
        "Steps of linear warm-up, of upernet.",
        at_least=0,
        shown_default="1,500, at most a tenth of the steps",
    )
    layer_decay: float = setting(
        0.65,
        "The learning rate of a block is that of the next one times this, of upernet.",
        above=0,
    )
    drop_path: float = setting(
        0.1, "Stochastic depth of the last block, of upernet.", at_least=0, below=1
    )
    channels: int | None = setting(
        None,
        "Channels of upernet's head.",
        at_least=1,
        shown_default="a ViT's width; 512 for ConvNets",
    )
    k: int = setting(30, "Number of neighbors, of knn.", at_least=1)
    temperature: float = setting(0.02, "Temperature of the votes, of knn.", above=0)
    tokens_per_class: int = setting(
        1000, "Training tokens of each class that neighbors come from, of knn.", at_least=1
    )
    encode_batch_size: int = setting(
        32, "Views per forward pass without gradients, per process.", at_least=1
    )
    cache_gib: float | None = setting(
        None,
        "Memory for the tokens of linear, in GiB per machine; 0 computes them anew in every step.",
        at_least=0,
        shown_default="half of the free memory",
    )
    save_every: int = setting(1000, "Steps between checkpoints of upernet.", at_least=1)
    seed: int = setting(
        0, "Seed of order, augmentation, bank and the head's start.", at_least=0, below=2**63
    )


@dataclass(frozen=True)
class SegmentRecipe(SegmentSettings):
    """Settings of a segmentation with nothing left open."""

    image_size: int = 224
    max_steps: int = 2000
    lr: float = 3e-3
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    workers: int = 1


# What decides the result of each head, and is recorded with it.
_FROZEN = ("head", "image_size", "mode", "stride", "blocks", "dtype", "seed")
_TRAINED = ("max_steps", "batch_size", "lr", "weight_decay")
RECORDED = {
    "linear": (*_FROZEN, *_TRAINED),
    "knn": (*_FROZEN, "k", "temperature", "tokens_per_class"),
    "upernet": (
        *_FROZEN,
        *_TRAINED,
        "micro_batch_size",
        "warmup_steps",
        "layer_decay",
        "drop_path",
        "channels",
    ),
}
