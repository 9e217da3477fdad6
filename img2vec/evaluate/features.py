"""Features of labeled images, on one process or many, each image once."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from img2vec.evaluate.labeled import LabeledData
from tokdiv.data.loader import read_batches
from tokdiv.errors import RunError, UsageError

ROWS_A_GATHER = 65_536  # bounds what a gather holds on the device beside the features


@dataclass(frozen=True)
class Features:
    """The usable images of a data set, in its order.

    features: float32 (n, C), on the CPU. labels: int64 (n,). rows: int64 (n,), the places in the data.
    skipped: how many images could not be used.
    """

    features: Tensor
    labels: Tensor
    rows: Tensor
    skipped: int


def extract_features(
    tokens: Callable[[Tensor], Tensor],
    data: LabeledData,
    size: int,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    description: str = "features",
) -> Features:
    """The mean over its tokens of each image's center view.

    Args:
        tokens: uint8 images (B, 3, size, size) on `device` -> (B, K, C); a Teacher, or any function that
            does its own normalization and runs without gradients.
        data: the images.
        size: side of the view in pixels.
        batch_size: images in a forward pass.
        workers: decoding threads; None for one per core.
        device: where `tokens` runs.
        description: on the progress bar.

    Returns:
        The features of all images, on every process.

    Raises:
        RunError: no image can be used, or features that are not finite.
    """
    rank, world = process()
    mine = np.arange(rank, len(data), world, dtype=np.int64)
    blocks = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    features: list[Tensor] = []
    rows: list[np.ndarray] = []
    batches = read_batches(
        data.source,
        data.indices,
        blocks,
        {size},
        workers=default_workers() if workers is None else workers,
        pin_memory=torch.device(device).type == "cuda",
    )
    with tqdm(
        total=len(mine), desc=description, unit="img", disable=None if rank == 0 else True
    ) as bar:
        for batch in batches:
            if len(batch.views[size]):
                with enough_memory("--batch-size (of a probe: --encode-batch-size)", batch_size):
                    view = batch.views[size].to(device, non_blocking=True)
                    features.append(tokens(view).float().mean(dim=1).cpu())
                rows.append(batch.positions[batch.usable])
            bar.update(len(batch))
    places = torch.from_numpy(np.concatenate(rows)) if rows else torch.empty(0, dtype=torch.int64)
    dim = _largest(features[0].shape[1] if features else 0, device)
    vectors = torch.cat(features) if features else torch.empty(0, dim)
    if world > 1:
        vectors, places = gather_rows(vectors, device), gather_rows(places, device)
        order = torch.argsort(places)
        vectors, places = vectors[order], places[order]
    if not len(places):
        raise RunError(f"'{data.source.name}': none of its {len(data)} images can be used")
    if not torch.isfinite(vectors).all():
        raise RunError(
            f"the features of '{data.source.name}' are not finite: the model's weights are broken, or its "
            f"numbers exceed the range of the dtype (try --dtype float32)"
        )
    labels = torch.from_numpy(data.labels[places.numpy()])
    return Features(vectors, labels, places, len(data) - len(places))


@contextmanager
def enough_memory(option: str, batch_size: int) -> Iterator[None]:
    """Say which option to lower, and to what, where the device's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise RunError(
            f"not enough GPU memory for {batch_size} images at once: try {option} {max(1, batch_size // 2)}"
        ) from None


def exact_device(device: torch.device) -> torch.device:
    """Where double precision is to be had: the device itself, but for Apple's."""
    return torch.device("cpu") if device.type == "mps" else device


def process() -> tuple[int, int]:
    """The number of this process and how many there are: 0 and 1 without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def communication_device(device: str | torch.device) -> torch.device:
    """Where tensors must lie to be exchanged: NCCL alone takes the GPU's, all else has gloo for the CPU's."""
    return torch.device(device if dist.get_backend() == "nccl" else "cpu")


def gather_rows(rows: Tensor, device: str | torch.device) -> Tensor:
    """The rows (n_r, ...) of all processes, one process after the other, on the CPU of each."""
    rank, world = process()
    if world == 1:
        return rows
    place = communication_device(device)
    count = torch.tensor([len(rows)], device=place)
    counts = [torch.empty_like(count) for _ in range(world)]
    dist.all_gather(counts, count)
    sizes = [int(n) for n in counts]
    parts: list[list[Tensor]] = [[] for _ in range(world)]
    for start in range(0, max(sizes), ROWS_A_GATHER):
        # Collectives need equal shapes; the filling is cut off again below.
        length = min(ROWS_A_GATHER, max(sizes) - start)
        piece = torch.zeros(length, *rows.shape[1:], dtype=rows.dtype, device=place)
        valid = rows[start : start + length]
        piece[: len(valid)] = valid.to(place)
        pieces = [torch.empty_like(piece) for _ in range(world)]
        dist.all_gather(pieces, piece)
        for part, other, size in zip(parts, pieces, sizes):
            part.append(other[: max(0, min(length, size - start))].cpu())
    return torch.cat([piece for part in parts for piece in part]) if max(sizes) else rows


def sum_over_processes(values: Tensor, device: str | torch.device) -> Tensor:
    """The sum of each entry over all processes, exact for integers."""
    _, world = process()
    if world == 1:
        return values
    total = values.to(communication_device(device))
    dist.all_reduce(total)
    return total.to(values.device)


def _largest(value: int, device: str | torch.device) -> int:
    """The largest over all processes: one without images does not know the width of the features."""
    _, world = process()
    if world == 1:
        return value
    largest = torch.tensor([value], device=communication_device(device))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def default_workers() -> int:
    """One per core that this process may use, shared among the processes of the machine; at most 16."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def check_positive(**values: float) -> None:
    """Raise UsageError, with the option's name, for a value that is not above zero."""
    for name, value in values.items():
        if not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected a number above 0")
