"""The settings of `tokdiv rank`; `depth` and `maps` take some of them."""

from dataclasses import dataclass
from typing import Literal

from tokdiv.settings import check_settings, setting


@dataclass(frozen=True)
class Settings:
    """How to rank. Default, help and range of each option are stated here only."""

    max_images: int | None = setting(
        None, "Measure at most this many images.", at_least=1, shown_default="all"
    )
    confidence: float = setting(
        0.99, "Probability that everything certified is true.", above=0.5, below=1
    )
    certify: Literal["order", "best", "none"] = setting(
        "order",
        "order: stop once every pair is decided or tied. best: once the winner is, dropping certified losers on "
        "the way. none: measure all images.",
    )
    tie: float = setting(
        0.002, "A gap of mean similarity below this is a tie.", at_least=0, below=1
    )
    batch_size: int | Literal["auto"] = setting(
        "auto",
        "Images of one forward pass, per process; auto doubles it while that is faster.",
        at_least=1,
    )
    workers: int | None = setting(
        None,
        "Decoding threads per process.",
        at_least=1,
        shown_default="one a core, at most 16",
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps.")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Precision of the forward passes; auto is bfloat16 where it is native."
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "torch.compile; auto for long runs (50,000 images a process)."
    )
    seed: int = setting(0, "Seed of the order of the images.", at_least=0, at_most=2**63 - 1)
    image_size: int | Literal["native"] | None = setting(
        None,
        "Side of the view in pixels, or native for each teacher's own.",
        at_least=1,
        shown_default="224",
    )
    correspondence_images: int = setting(
        256,
        "Images whose correspondence tells noise-like teachers apart; up to twice as many while one is undecided. "
        "0 leaves it out.",
        at_least=0,
    )
    allow_baselines: bool = setting(False, "Let pixels, hog and untrained networks win.")

    def __post_init__(self) -> None:
        check_settings(self)
