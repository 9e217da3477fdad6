"""Batches for pretraining: a random view and a mask of each image, made in threads.

What happens to an image depends on (seed, epoch, position) alone, not on who reads it: every number of
processes and every resumption sees the same.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from img2vec.masking import CROP, Layout, draw_mask, generator
from tokdiv.data.loader import fill_batches
from tokdiv.data.source import Source, permutation
from tokdiv.errors import UsageError

ASPECT = (3 / 4, 4 / 3)  # of the random resized crop, as torchvision's and MAE's
TRIES = 10


@dataclass(frozen=True)
class View:
    """How images become views. size: pixels of a side. scale: range of the crop's area."""

    size: int
    scale: tuple[float, float]
    layout: Layout
    seed: int


@dataclass
class Batch:
    """One forward pass of one process.

    positions: int64 (n,), in the epoch's order; -1 fills a batch up to its size.
    images: uint8 (n, 3, size, size). masks: bool (n, units), True where hidden.
    usable: float32 (n,): 1, or 0 for an image that cannot be read and for filling, which count nothing
        in the loss. The shapes are always the same.
    """

    positions: np.ndarray
    images: Tensor
    masks: Tensor
    usable: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Copied to a device, without waiting where the memory is pinned."""
        if device.type == "cpu":
            return self
        moved = (t.to(device, non_blocking=True) for t in (self.images, self.masks, self.usable))
        return Batch(self.positions, *moved)


@dataclass
class _ViewBatch(Batch):
    """A batch that the loader fills."""

    view: View
    epoch: int

    def write(self, row: int, image: Tensor | None) -> None:
        # A row without an image has a mask as well: its tokens are computed, and count nothing.
        position = max(0, int(self.positions[row]))
        mask = draw_mask(self.view.layout, self.view.seed, self.epoch, position)
        # Through numpy: a copy by torch would start a pool of OpenMP threads in each worker.
        self.masks.numpy()[row] = mask
        if image is not None:
            self.images.numpy()[row] = random_view(image, self.view, self.epoch, position).numpy()
            self.usable.numpy()[row] = 1.0


@dataclass(frozen=True)
class Plan:
    """Which positions of an epoch each step, forward pass and process takes.

    images: of an epoch. batch_size: of one forward pass of one process.
    accumulate: forward passes of a step. world: processes. global_batch: images of a step.
    """

    images: int
    batch_size: int
    accumulate: int
    world: int
    global_batch: int

    @property
    def steps(self) -> int:
        """Steps of an epoch; images that fill no step are left to other epochs' orders."""
        return self.images // self.global_batch

    def blocks(self, rank: int, first: int = 0) -> Iterator[np.ndarray]:
        """Positions of each forward pass of a process from step `first` on, -1 for filling.

        A step takes the same positions on one process or on many.
        """
        share = np.arange(self.batch_size, dtype=np.int64)
        for step in range(first, self.steps):
            for inner in range(self.accumulate):
                offset = (inner * self.world + rank) * self.batch_size + share
                positions = step * self.global_batch + offset
                yield np.where(offset < self.global_batch, positions, -1)


def plan_epoch(images: int, batch_size: int, accumulate: int, world: int) -> Plan:
    """Fit the global batch to the data: where it is larger, every step takes all images once."""
    wanted = batch_size * accumulate * world
    if images >= wanted:
        return Plan(images, batch_size, accumulate, world, wanted)
    return Plan(images, math.ceil(images / (accumulate * world)), accumulate, world, images)


def images_per_epoch(source: Source, epoch_size: int | None) -> int:
    """How many images an epoch has.

    Raises:
        UsageError: a stream that does not say, or fewer images than an epoch wants.
    """
    if source.count is None:
        if epoch_size is None:
            raise UsageError(
                f"'{source.name}' does not say how many images it holds: give --epoch-size N, the images "
                f"that make an epoch"
            )
        return epoch_size
    if epoch_size is not None and epoch_size > source.count:
        raise UsageError(f"--epoch-size {epoch_size}: '{source.name}' holds {source.count} images")
    return epoch_size or source.count


def crop_box(
    height: int, width: int, scale: tuple[float, float], seed: int, epoch: int, position: int
) -> tuple[int, int, int, int, bool]:
    """A random resized crop: top, left, height, width in pixels, and whether to flip.

    The area is uniform in `scale`, the logarithm of the aspect uniform in that of 3/4 to 4/3; ten tries,
    then the largest central crop within those aspects. As torchvision's RandomResizedCrop draws it, from
    a generator that belongs to the image.
    """
    raw = generator(seed, CROP, epoch, position).random_raw(2 * TRIES + 3)
    draws = ((raw >> np.uint64(11)) * 2.0**-53).tolist()  # uniform in [0, 1)
    flip = draws[0] < 0.5
    low, high = (math.log(a) for a in ASPECT)
    for attempt in range(TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[3 + 2 * attempt])
        aspect = math.exp(low + (high - low) * draws[4 + 2 * attempt])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(draws[1] * (height - h + 1)), int(draws[2] * (width - w + 1))
            return top, left, h, w, flip
    w = min(width, max(1, round(height * ASPECT[1])))
    h = min(height, max(1, round(width / ASPECT[0])))
    return (height - h) // 2, (width - w) // 2, h, w, flip


def random_view(image: Tensor, view: View, epoch: int, position: int) -> Tensor:
    """Crop, resize (bicubic, antialiased), perhaps flip: uint8 (3, H, W) to uint8 (3, size, size)."""
    top, left, h, w, flip = crop_box(
        image.shape[1], image.shape[2], view.scale, view.seed, epoch, position
    )
    part = image[:, top : top + h, left : left + w]
    part = F.interpolate(
        part[None], (view.size, view.size), mode="bicubic", align_corners=False, antialias=True
    )[0]
    return part.flip(2) if flip else part


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's order."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])


def read_epoch(
    source: Source,
    plan: Plan,
    view: View,
    epoch: int,
    *,
    rank: int = 0,
    first: int = 0,
    workers: int = 1,
    prefetch: int = 4,
    pin_memory: bool = False,
    cache: dict[int, bytes] | None = None,
    report: Callable[[str, str], None] = lambda key, reason: None,
) -> Generator[Batch, None, None]:
    """The batches of one process in one epoch, one per forward pass.

    Args:
        epoch: zero-based; it determines the order, the crops and the masks.
        first: the first step of the epoch to give.
        workers: decoding threads. prefetch: batches made ahead.
        cache: keeps the encoded bytes of what was read, by index; None keeps nothing.
        report: called with the key and the reason of an image that cannot be used.
    """
    seed = epoch_seed(view.seed, epoch)
    order = None
    if source.permutable:
        assert source.count is not None
        order = permutation(source.count, seed)
    unfilled = (
        _empty_batch(positions, view, epoch, pin_memory) for positions in plan.blocks(rank, first)
    )
    # Every process walks through the whole of a stream, and decodes its own positions.
    with contextlib.closing(
        fill_batches(
            source,
            order,
            unfilled,
            workers=workers,
            seed=seed % 2**31,
            prefetch=prefetch,
            cache=cache if source.permutable else None,
        )
    ) as batches:
        for batch, keys, reasons in batches:
            for row, position in enumerate(batch.positions[batch.positions >= 0].tolist()):
                if row >= len(keys):
                    report(f"position {position}", "the stream ended before it")
                elif (reason := reasons[row]) is not None:
                    report(keys[row], reason)
            yield batch


def _empty_batch(positions: np.ndarray, view: View, epoch: int, pin_memory: bool) -> _ViewBatch:
    n = len(positions)
    return _ViewBatch(
        positions,
        torch.zeros(n, 3, view.size, view.size, dtype=torch.uint8, pin_memory=pin_memory),
        torch.zeros(n, view.layout.num_units, dtype=torch.bool, pin_memory=pin_memory),
        torch.zeros(n, pin_memory=pin_memory),
        view,
        epoch,
    )
