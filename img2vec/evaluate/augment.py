"""Augmented training batches, the same for every number of processes and workers.

What is random about an image comes from (seed, epoch, its index in the data) alone. Nothing here draws from the
global generators: images are augmented in threads, which share those with the training loop.
"""

import contextlib
import importlib.util
import itertools
import math
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from img2vec.evaluate.labeled import LabeledData
from tokdiv.data.loader import fill_batches, pack
from tokdiv.dist import current_processes
from tokdiv.errors import UsageError
from tokdiv.teachers.spec import Triple

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of random resized crops
TRIES = 10
# Random erasing as in timm: the area, as a share of the image, and the aspect of the rectangle.
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Augmentation:
    """Turns a picture into a training image.

    size: its side in pixels. dtype: uint8, or float32 where it is normalized.
    apply: (picture, three seeds) -> (3, size, size). It runs in many threads at once.
    """

    size: int
    dtype: torch.dtype
    apply: Callable[[Image.Image, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class TrainingBatch:
    """The images of one forward pass of this process.

    images: (n, 3, size, size), of the augmentation's dtype; n may be 0 where none can be used.
    labels: int64 (n,). indices: int64 (n,), in the data. skipped: indices of unusable images.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    skipped: list[int]


@dataclass(frozen=True)
class TrainingStep:
    """This process's part of an optimizer step.

    epoch, step: of the whole training, `step` within the epoch; num_steps: of an epoch.
    num_images: of this process, the unusable ones included.
    num_batches: forward passes. batches: can be iterated once.
    """

    epoch: int
    step: int
    num_steps: int
    num_images: int
    num_batches: int
    batches: Iterator[TrainingBatch]


def training_steps(
    data: LabeledData,
    augmentation: Augmentation,
    *,
    batch_size: int,
    micro_batch_size: int,
    first_epoch: int = 0,
    epochs: int,
    seed: int,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[TrainingStep]:
    """Shuffled, augmented images of the epochs from `first_epoch` up to `epochs`.

    Args:
        batch_size: of all processes together, at most len(data); what an epoch has left after its last
            full batch is left out (in each epoch other images).
        micro_batch_size: images of this process in a forward pass. Only a few of these are in memory.
        workers: threads that decode and augment.
    """
    group = current_processes()
    num_steps = len(data) // batch_size
    num_images = len(range(group.rank, batch_size, group.world))
    num_batches = -(-num_images // micro_batch_size)

    def empty() -> Iterator[_Augmented]:
        for epoch in range(first_epoch, epochs):
            order = np.random.default_rng([seed, epoch]).permutation(len(data))
            for start in range(0, num_steps * batch_size, batch_size):
                own = order[start : start + batch_size][group.rank :: group.world]
                for at in range(0, num_images, micro_batch_size):
                    indices = own[at : at + micro_batch_size]
                    yield _Augmented(indices, epoch, seed, augmentation, pin_memory)

    with contextlib.closing(
        fill_batches(data.source, data.indices, empty(), workers=workers)
    ) as filled:
        for epoch in range(first_epoch, epochs):
            for step in range(num_steps):
                batches = (
                    _training_batch(batch, reasons, data)
                    for batch, _, reasons in itertools.islice(filled, num_batches)
                )
                yield TrainingStep(epoch, step, num_steps, num_images, num_batches, batches)
                deque(batches, maxlen=0)  # what the caller left belongs to this step


def _training_batch(
    batch: "_Augmented", reasons: list[str | None], data: LabeledData
) -> TrainingBatch:
    usable = np.array([reason is None for reason in reasons], dtype=bool)
    indices = batch.positions[usable]
    return TrainingBatch(
        pack(batch.images, usable),
        torch.from_numpy(data.labels[indices]),
        torch.from_numpy(indices),
        batch.positions[~usable].tolist(),
    )


class _Augmented:
    """The memory of a TrainingBatch, which the loader fills."""

    def __init__(
        self,
        indices: np.ndarray,
        epoch: int,
        seed: int,
        augmentation: Augmentation,
        pin_memory: bool,
    ) -> None:
        self.positions, self.entropy, self.augmentation = indices, (seed, epoch), augmentation
        shape = (len(indices), 3, augmentation.size, augmentation.size)
        self.images = torch.empty(shape, dtype=augmentation.dtype, pin_memory=pin_memory)

    def write(self, row: int, image: Tensor | None) -> None:
        if image is None:
            return
        entropy = np.random.SeedSequence((*self.entropy, int(self.positions[row])))
        picture = Image.fromarray(np.ascontiguousarray(image.numpy().transpose(1, 2, 0)))
        # Through numpy: a copy by torch would start a pool of OpenMP threads in each worker.
        augmented = self.augmentation.apply(picture, entropy.generate_state(3))
        self.images.numpy()[row] = augmented


def crop_and_flip(size: int) -> Augmentation:
    """Random resized crop (bicubic, 8% to 100% of the area) and flip: uint8 (3, size, size)."""
    log_aspect = torch.log(torch.tensor(ASPECT))

    def apply(picture: Image.Image, seeds: np.ndarray) -> np.ndarray:
        # The draws are those of torchvision's RandomResizedCrop and RandomHorizontalFlip.
        draws = torch.Generator().manual_seed(int(seeds[2]))
        box = _crop_box(
            *picture.size,
            area=lambda: torch.empty(1).uniform_(*AREA, generator=draws).item(),
            aspect=lambda: torch.empty(1).uniform_(*log_aspect, generator=draws).exp().item(),
            integer=lambda most: int(torch.randint(0, most + 1, size=(1,), generator=draws)),
        )
        picture = picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)
        if torch.rand(1, generator=draws) < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(picture).transpose(2, 0, 1)

    return Augmentation(size, torch.uint8, apply)


def randaugment(
    size: int, *, auto_augment: str, reprob: float, mean: Triple, std: Triple
) -> Augmentation:
    """timm's recipe: random resized crop, flip, RandAugment, normalization, random erasing.

    Args:
        size: of the result, float32 (3, size, size), normalized.
        auto_augment: in timm's notation, as "rand-m9-mstd0.5-inc1"; "" for none.
        reprob: probability of random erasing.
        mean, std: of the RGB channels, in units of [0, 1].

    Raises:
        UsageError: a notation that timm does not know.
    """
    generators = _Generators()
    policy = timm_policy(auto_augment, size, mean, generators) if auto_augment else None
    center, scale = (np.array(values, np.float32)[:, None, None] for values in (mean, std))
    low, high = (math.log(a) for a in ASPECT)

    def apply(picture: Image.Image, seeds: np.ndarray) -> np.ndarray:
        generators.seed(seeds)
        draws = generators.python
        box = _crop_box(
            *picture.size,
            area=lambda: draws.uniform(*AREA),
            aspect=lambda: math.exp(draws.uniform(low, high)),
            integer=lambda most: draws.randint(0, most),
        )
        picture = picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)
        if torch.rand(1, generator=generators.torch) < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if policy is not None:
            picture = policy(picture)
        pixels = np.asarray(picture).transpose(2, 0, 1) / np.float32(255)
        pixels = (pixels - center) / scale
        if reprob > 0 and draws.random() <= reprob:
            _erase(pixels, generators)
        return pixels

    return Augmentation(size, torch.float32, apply)


def _crop_box(
    width: int,
    height: int,
    area: Callable[[], float],
    aspect: Callable[[], float],
    integer: Callable[[int], int],
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop, drawn in the order of torchvision and timm.

    Ten tries, then the largest central crop within the aspects.

    Args:
        area: draws a share of the image's area. aspect: draws an aspect.
        integer: draws an integer from 0 to its argument, both included.
    """
    for _ in range(TRIES):
        pixels, ratio = area() * (width * height), aspect()
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = integer(height - h), integer(width - w)
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ASPECT[1])))
    h = min(height, max(1, round(width / ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _erase(pixels: np.ndarray, generators: "_Generators") -> None:
    """Fill a random rectangle of (3, H, W) with noise in place, as timm's RandomErasing does."""
    _, height, width = pixels.shape
    draws = generators.python
    for _ in range(TRIES):
        area = draws.uniform(*ERASED_AREA) * (height * width)
        aspect = math.exp(draws.uniform(*(math.log(a) for a in ERASED_ASPECT)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w < width and h < height:
            top, left = draws.randint(0, height - h), draws.randint(0, width - w)
            noise = torch.empty(3, h, w).normal_(generator=generators.torch)
            pixels[:, top : top + h, left : left + w] = noise.numpy()
            return


class _Generators(threading.local):
    """Generators of the thread that asks, in place of the global ones of `random`, numpy and torch."""

    def __init__(self) -> None:
        self.python, self.torch = random.Random(), torch.Generator()
        self.numpy = np.random.RandomState()

    def seed(self, seeds: np.ndarray) -> None:
        """Begin the streams that `seeded` gives the global generators for these seeds."""
        self.python.seed(int(seeds[0]))
        self.numpy.seed(int(seeds[1]))
        self.torch.manual_seed(int(seeds[2]))


def timm_policy(
    auto_augment: str, size: int, mean: Triple, generators: _Generators
) -> Callable[[Image.Image], Image.Image]:
    """RandAugment, AutoAugment or AugMix of timm, drawing from `generators`.

    Raises:
        UsageError: a notation that timm does not know.
    """
    timm = _private_copy("timm.data.auto_augment", generators)
    options: dict[str, Any] = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * x)) for x in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    make = timm.auto_augment_transform
    if auto_augment.startswith("rand"):
        make = timm.rand_augment_transform
    elif auto_augment.startswith("augmix"):
        make, options["translate_pct"] = timm.augment_and_mix_transform, 0.3
    try:
        policy = make(auto_augment, options)
    except (AssertionError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"--auto-augment {auto_augment}: expected timm's notation, as rand-m9-mstd0.5-inc1"
        ) from None
    for operation in getattr(policy, "ops", []):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return policy


def _private_copy(name: str, generators: _Generators) -> Any:
    """A copy of a module whose `random` and `np.random` are `generators`, so that threads can use it."""

    class Python(ModuleType):
        def __getattr__(self, function: str) -> Any:
            return getattr(generators.python, function)

    class Numpy(ModuleType):
        def __getattr__(self, function: str) -> Any:
            return generators.numpy if function == "random" else getattr(np, function)

    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(random=Python("random"), np=Numpy("np"))
    return module


def _posterize(picture: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """At its greatest magnitude timm keeps 0 bits: black in older versions of Pillow, an error in newer."""
    if bits_to_keep < 1:
        return Image.new(picture.mode, picture.size)
    return picture if bits_to_keep >= 8 else ImageOps.posterize(picture, bits_to_keep)


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed the global generators of `random`, numpy and torch's CPU; restore their state afterwards.

    For code that draws from them in the main thread, as timm's Mixup does.
    """
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])  # noqa: NPY002
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
