"""Augmented training batches, the same for every number of processes and workers.

What is random about an image comes from (seed, epoch, its place in the data) alone. The augmentations of
timm and torchvision draw from the global generators, so each image seeds them and puts their state back.
"""

import multiprocessing
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from img2vec.evaluate.labeled import LabeledData
from tokdiv.data.loader import UnusableImage, decode_image
from tokdiv.dist import current_processes
from tokdiv.errors import UsageError
from tokdiv.teachers.spec import Triple

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class TrainingBatch:
    """This process' part of a batch.

    epoch, step: of the whole training, `step` within the epoch; num_steps: of an epoch.
    images: (n, 3, size, size), of the transform's dtype; n may be 0 where none can be used.
    labels: int64 (n,). rows: int64 (n,), places in the data. skipped: the places of unusable images.
    """

    epoch: int
    step: int
    num_steps: int
    images: Tensor
    labels: Tensor
    rows: Tensor
    skipped: list[int]


def training_batches(
    data: LabeledData,
    transform: Transform,
    size: int,
    *,
    batch_size: int,
    first_epoch: int = 0,
    epochs: int,
    seed: int,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[TrainingBatch]:
    """Shuffled, augmented batches of the epochs from `first_epoch` up to `epochs`.

    Args:
        batch_size: of all processes together, at most len(data); what is left of an epoch behind its last
            whole batch is left out (in each epoch other images).
        transform: a picture -> (3, size, size); draws from the global generators of `random`, numpy and
            torch's CPU.
        workers: worker processes; 0 for none. Where the system cannot fork, there are none.
    """
    num_steps = len(data) // batch_size
    # A source is read through closures, which cannot be sent to a process, only inherited.
    forks = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
    places = _order(len(data), batch_size, first_epoch, epochs, seed)
    loader: Iterator[tuple[Tensor, Tensor, Tensor, list[int]]] = iter(
        DataLoader(
            _Augmented(data, transform, seed),
            batch_sampler=places,  # type: ignore[arg-type]
            collate_fn=_Collate(size),
            num_workers=workers if forks else 0,
            pin_memory=pin_memory,
            multiprocessing_context="fork" if forks else None,
            generator=torch.Generator().manual_seed(seed),  # else it draws from the global one
        )
    )
    for epoch in range(first_epoch, epochs):
        for step in range(num_steps):
            yield TrainingBatch(epoch, step, num_steps, *next(loader))


def _order(
    count: int, batch_size: int, first_epoch: int, epochs: int, seed: int
) -> Iterator[list[tuple[int, int]]]:
    """(epoch, place) of the images of this process, batch after batch."""
    group = current_processes()
    for epoch in range(first_epoch, epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        for start in range(0, count - batch_size + 1, batch_size):
            mine = order[start : start + batch_size][group.rank :: group.world]
            yield [(epoch, int(place)) for place in mine]


class _Augmented(Dataset[tuple[int, Tensor | None, int]]):
    def __init__(self, data: LabeledData, transform: Transform, seed: int) -> None:
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, at: tuple[int, int]) -> tuple[int, Tensor | None, int]:  # type: ignore[override]
        epoch, place = at
        label = int(self.data.labels[place])
        try:
            pixels = decode_image(self.data.source.read(int(self.data.indices[place])))
        except (UnusableImage, OSError):
            return place, None, label
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        with seeded(self.seed, epoch, place):
            return place, self.transform(picture), label


class _Collate:
    """Stacks what can be used; an object and not a closure, so that any start method takes it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(
        self, samples: list[tuple[int, Tensor | None, int]]
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        usable = [(place, image, label) for place, image, label in samples if image is not None]
        images = [image for _, image, _ in usable]
        return (
            torch.stack(images) if images else torch.empty(0, 3, self.size, self.size),
            torch.tensor([label for *_, label in usable], dtype=torch.int64),
            torch.tensor([place for place, *_ in usable], dtype=torch.int64),
            [place for place, image, _ in samples if image is None],
        )


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed the global generators of `random`, numpy and torch's CPU; put their state back behind."""
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])  # noqa: NPY002 - timm's RandAugment and Mixup draw from it
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def crop_and_flip(size: int) -> Transform:
    """Random resized crop (bicubic, 8% to 100% of the area) and flip: uint8 (3, size, size)."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )


def randaugment(
    size: int, *, auto_augment: str, reprob: float, mean: Triple, std: Triple
) -> Transform:
    """timm's: random resized crop, flip, RandAugment, normalization, random erasing.

    Args:
        size: of the result, float (3, size, size), normalized.
        auto_augment: in timm's notation, as "rand-m9-mstd0.5-inc1"; "" for none.
        reprob: probability of random erasing.
        mean, std: of the RGB channels, in units of [0, 1].

    Raises:
        UsageError: a notation that timm does not know.
    """
    from timm.data import create_transform

    try:
        transform = create_transform(
            size,
            is_training=True,
            color_jitter=None,
            auto_augment=auto_augment or None,
            interpolation="bicubic",
            re_prob=reprob,
            re_mode="pixel",
            re_count=1,
            mean=mean,
            std=std,
        )
    except (AssertionError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"--auto-augment {auto_augment}: expected timm's notation, as rand-m9-mstd0.5-inc1"
        ) from None
    for step in transform.transforms:
        for operation in getattr(step, "ops", []):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(picture: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """At its greatest magnitude timm keeps 0 bits: black in older versions of Pillow, an error in newer."""
    if bits_to_keep < 1:
        return Image.new(picture.mode, picture.size)
    return picture if bits_to_keep >= 8 else ImageOps.posterize(picture, bits_to_keep)
