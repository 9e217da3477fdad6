"""Augmentation of an image together with its labels: the recipe of BEiT and MAE on ADE20K (mmsegmentation's)."""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from img2vec.evaluate.confusion import IGNORED
from img2vec.evaluate.segmentation_data import SegmentationData, threaded

SCALES = (0.5, 2.0)
MAX_SHARE, TRIALS = 0.75, 10  # a crop is drawn again, so often, where one class takes up more of it
# Multiplicative, but for the hue's shift; each with a probability of 0.5.
BRIGHTNESS, CONTRAST, SATURATION, HUE = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.1, 0.1)


def augment(
    image: Tensor, labels: Tensor, size: int, fill: list[float], generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Random scale and crop, flip, color jitter.

    A scale s resizes the short side to s * size before a crop of size x size. That crop is a square of short / s
    pixels of the original, so only that part is resized.

    Args:
        image: uint8 (3, H, W). labels: int16 (H, W).
        fill: color of what is added at the right and bottom where the scaled image is smaller than the crop; its
            labels are IGNORED.
        generator: of all that is random.

    Returns:
        uint8 (3, size, size) and int16 (size, size).
    """
    height, width = labels.shape
    side = max(1, round(min(height, width) / generator.uniform(*SCALES)))
    missing = [0, 0, max(0, side - width), max(0, side - height)]
    picture = functional.pad(tv_tensors.Image(image), missing, fill=fill)
    mask = functional.pad(tv_tensors.Mask(labels), missing, fill=IGNORED)
    top, left = draw_crop(mask, side, generator)
    picture = functional.resized_crop(
        picture, top, left, side, side, [size, size], InterpolationMode.BILINEAR, antialias=True
    )
    mask = functional.crop(mask, top, left, side, side)
    # Of a Mask, torchvision rounds the coordinates down, up to half a pixel beside those of the image.
    mask = functional.resize_image(mask[None], [size, size], InterpolationMode.NEAREST_EXACT)[0]
    if generator.random() < 0.5:
        picture, mask = functional.horizontal_flip(picture), mask.flip(-1)
    return jitter_colors(picture, generator).as_subclass(Tensor), mask.as_subclass(Tensor)


def draw_crop(labels: Tensor, side: int, generator: np.random.Generator) -> tuple[int, int]:
    """Top and left of a crop, if possible of one in which no class takes up more than MAX_SHARE."""
    height, width = labels.shape
    for _ in range(TRIALS):
        top = int(generator.integers(height - side + 1))
        left = int(generator.integers(width - side + 1))
        part = labels[top : top + side, left : left + side]
        counts = torch.bincount(part[part != IGNORED].long())
        if len(counts) and int(counts.max()) <= MAX_SHARE * int(counts.sum()):
            break
    return top, left


def jitter_colors(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, each with a probability of 0.5, in a random order."""
    changes: list[tuple[Callable[[Tensor, float], Tensor], tuple[float, float]]] = [
        (functional.adjust_brightness, BRIGHTNESS),
        (functional.adjust_contrast, CONTRAST),
        (functional.adjust_saturation, SATURATION),
        (functional.adjust_hue, HUE),
    ]
    for number in generator.permutation(len(changes)):
        change, limits = changes[number]
        if generator.random() < 0.5:
            image = change(image, generator.uniform(*limits))
    return image


def augmented_batches(
    data: SegmentationData,
    batches: Iterator[tuple[int, NDArray[np.int64]]],
    size: int,
    fill: list[float],
    *,
    seed: int,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented images and labels of batches, read in threads.

    Args:
        batches: the number of the step, and positions of images. What is random depends on the seed, the step and
            the position alone.

    Yields:
        uint8 (n, 3, size, size) and int64 (n, size, size).
    """
    counts: list[int] = []

    def items() -> Iterator[tuple[int, int]]:
        for step, positions in batches:
            counts.append(len(positions))
            yield from ((step, position) for position in positions.tolist())

    def load(item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        step, position = item
        labels = torch.from_numpy(data.labels(position))
        generator = np.random.default_rng([seed, step, position])
        return augment(data.image(position), labels, size, fill, generator)

    loaded = threaded(load, items(), workers)
    while first := list(islice(loaded, 1)):
        images, labels = zip(*first, *islice(loaded, counts.pop(0) - 1))
        yield torch.stack(images), torch.stack(labels).long()
