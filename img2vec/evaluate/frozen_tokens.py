"""Tokens of a frozen model on the views of images with masks: encoded once and cached, or anew in every step."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from img2vec.evaluate.classifier import mean_and_std
from img2vec.evaluate.segment_settings import SegmentRecipe
from img2vec.evaluate.segmentation_data import SegmentationData, threaded
from img2vec.evaluate.segmentation_views import Layout, cut_labels, cut_views, in_batches
from tokdiv.dist import Processes
from tokdiv.errors import UsageError
from tokdiv.progress import progress_bar
from tokdiv.teachers.teacher import Teacher

UNKNOWN_MEMORY = 8 * 2**30  # taken as free where the system does not say


def choose_blocks(encoder: Teacher, blocks: list[int]) -> Teacher:
    """The same network with the tokens of several blocks or stages, concatenated along the channels.

    The final norm is applied to each where the model's tokens have it. Coarser stages are upsampled to the
    finest one's grid.

    Raises:
        UsageError: a network whose blocks are unknown, or no such block.
    """
    spec, network = encoder.spec, encoder.module
    if spec.is_handcrafted or spec.is_custom:
        raise UsageError(f"--blocks: {encoder.name} has no blocks that are known; leave it out")
    last = (len(network.feature_info) if spec.block is None else spec.block + 1) - 1  # type: ignore[arg-type]
    if not blocks or not all(0 <= block <= last for block in blocks):
        given = ",".join(map(str, blocks))
        raise UsageError(f"--blocks {given}: {encoder.name} has blocks 0 to {last}")
    options: dict[str, Any] = {"norm": True} if spec.norm else {}

    def tokens(module: nn.Module, images: Tensor) -> Tensor:
        maps = module.forward_intermediates(  # type: ignore[operator]
            images, indices=blocks, output_fmt="NCHW", intermediates_only=True, **options
        )
        size = max(tuple(plane.shape[2:]) for plane in maps)
        return torch.cat([F.interpolate(p, size=size, mode="bilinear") for p in maps], dim=1)

    mean, std = mean_and_std(encoder)
    return Teacher(
        network, tokens, mean=mean, std=std, size=encoder.size, name=encoder.name, spec=spec
    )


@dataclass(frozen=True)
class FrozenTokens:
    """The views of a data set, with their tokens and labels.

    An image belongs to process `position % world`, so that a batch is the same on any number of processes.

    encoder: the frozen model. data: images with labels. layout: how images become views.
    views: int64 (V, 2), the image's position and the number of the view in the image.
    grid: rows and columns of the labels of a view.
    """

    encoder: Teacher
    data: SegmentationData
    layout: Layout
    recipe: SegmentRecipe
    group: Processes
    views: NDArray[np.int64]
    grid: tuple[int, int]

    def __len__(self) -> int:
        return len(self.views)

    def own(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the views' numbers that belong to this process."""
        return numbers[self.views[numbers, 0] % self.group.world == self.group.rank]

    def encode(self, batches: Iterable[NDArray[np.int64]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and labels of views, read in threads a few batches ahead.

        Args:
            batches: numbers of views, which need not be this process's.

        Yields:
            (n, K, C) on the device and int16 (n, rows, columns) on the CPU; (0,) and (0,) for no views.
        """

        def load(numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
            images, labels = [torch.empty(0, dtype=torch.uint8)], [torch.empty(0).short()]
            for position in dict.fromkeys(self.views[numbers, 0].tolist()):
                ours = self.views[numbers][self.views[numbers, 0] == position, 1]
                images.append(cut_views(self.data.image(position), self.layout)[ours])
                cut = cut_labels(self.data.labels(position), self.layout, self.grid)
                labels.append(torch.from_numpy(cut[ours]))
            return torch.cat(images), torch.cat(labels)

        loaded = threaded(load, batches, self.recipe.workers)
        yield from in_batches(
            self.encoder, loaded, self.recipe.encode_batch_size, self.group.device
        )


def frozen_tokens(
    encoder: Teacher,
    data: SegmentationData,
    layout: Layout,
    recipe: SegmentRecipe,
    group: Processes,
    labels_per_token: int,
) -> FrozenTokens:
    """All views of the data, with labels_per_token ** 2 labels per token."""
    views = [
        (position, number)
        for position, (height, width) in enumerate(data.sizes.tolist())
        for number in range(len(layout.corners(height, width)))
    ]
    rows, columns = encoder.grid
    grid = rows * labels_per_token, columns * labels_per_token
    return FrozenTokens(encoder, data, layout, recipe, group, np.array(views), grid)


# The cache ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """This process's tokens and labels, on the CPU.

    tokens: (n, K, C) as the encoder gives them. labels: int16 (n, rows, columns).
    row_of: a view's number -> its row.
    """

    tokens: Tensor
    labels: Tensor
    row_of: dict[int, int]

    def __getitem__(self, numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([self.row_of[number] for number in numbers.tolist()], dtype=torch.int64)
        return self.tokens[rows], self.labels[rows]


def fits_in_memory(frozen: FrozenTokens) -> bool:
    """Whether the tokens of every process fit into its part of the memory; alike on all processes."""
    encoder, group, given = frozen.encoder, frozen.group, frozen.recipe.cache_gib
    itemsize = 2 if encoder.dtype == torch.bfloat16 else 4
    rows, columns = frozen.grid
    num_bytes = encoder.num_tokens * encoder.dim * itemsize + 2 * rows * columns
    num_bytes *= len(frozen.own(np.arange(len(frozen))))
    limit = free_memory() / 2 if given is None else given * 2**30
    return not group.max(int(num_bytes > limit / group.local_world))


def fill_cache(frozen: FrozenTokens) -> Cache:
    """Encode this process's views, each image once."""
    own = frozen.own(np.arange(len(frozen)))
    ends = np.flatnonzero(np.diff(frozen.views[own, 0])) + 1
    images = np.split(own, ends) if len(own) else []
    bar = progress_bar(
        frozen.encode(images),
        total=len(images),
        desc="tokens of train",
        unit="img",
        show=frozen.group.rank == 0,
    )
    tokens = labels = torch.empty(0)
    done = 0
    for part, its_labels in bar:
        if not done:
            tokens = part.new_empty((len(own), *part.shape[1:]), device="cpu")
            labels = its_labels.new_empty((len(own), *its_labels.shape[1:]))
        tokens[done : done + len(part)] = part
        labels[done : done + len(part)] = its_labels
        done += len(part)
    return Cache(tokens, labels, {number: row for row, number in enumerate(own.tolist())})


def free_memory() -> float:
    """Bytes of memory that may be taken: of the machine, and of this container."""
    free = [float(UNKNOWN_MEMORY)]
    try:
        with open("/proc/meminfo") as file:
            kib = next(line for line in file if line.startswith("MemAvailable")).split()[1]
        free = [1024.0 * int(kib)]
        with (
            open("/sys/fs/cgroup/memory.max") as limit,  # cgroup v2
            open("/sys/fs/cgroup/memory.current") as used,
        ):
            free.append(float(int(limit.read()) - int(used.read())))
    except (OSError, ValueError, StopIteration):
        pass
    return min(free)
