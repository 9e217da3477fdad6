"""Features of labeled images, on one process or many, each image once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from img2vec.evaluate.labeled import LabeledData
from tokdiv.data.loader import Batch, read_batches
from tokdiv.dist import Processes, current_processes, default_workers
from tokdiv.errors import RunError
from tokdiv.progress import progress_bar


class NoFeatures(RunError):
    """The data or the model gives no features, as every process finds."""


@dataclass(frozen=True)
class Features:
    """Features of the usable images of a data set, in its order.

    features: float32 (n, C), on the CPU. labels: int64 (n,). positions: int64 (n,), in the data.
    skipped: number of images that could not be used.
    """

    features: Tensor
    labels: Tensor
    positions: Tensor
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
    """The mean token of each image's center view.

    Args:
        tokens: uint8 images (B, 3, size, size) on `device` -> (B, K, C); a Teacher, or any function that
            does its own normalization and runs without gradients.
        data: the images.
        size: side of the view in pixels.
        batch_size: images per forward pass.
        workers: decoding threads; None for one per core.
        device: where `tokens` runs.
        description: label of the progress bar.

    Returns:
        The features of all images, on every process.

    Raises:
        NoFeatures: no image can be used, or features are not finite.
        RunError: the device's memory does not suffice.
    """
    group = current_processes(device)
    features: list[Tensor] = []
    positions: list[Tensor] = []
    with progress_bar(
        total=len(range(group.rank, len(data), group.world)),
        desc=description,
        unit="img",
        show=group.rank == 0,
    ) as bar:
        for batch in read_views(data, size, group, batch_size=batch_size, workers=workers):
            view = batch.views[size]
            if len(view):
                with enough_memory("--batch-size (of a probe: --encode-batch-size)", batch_size):
                    found = tokens(view.to(device, non_blocking=True)).float().mean(dim=1)
                if len(found) != len(view):
                    raise RunError(
                        f"the model gave {len(found)} results for {len(view)} images: expected one for each"
                    )
                features.append(found.cpu())
                positions.append(torch.from_numpy(batch.positions[batch.usable]))
            bar.update(len(batch))
    # A process without usable images does not know the width of the features.
    dim = group.max(features[0].shape[1] if features else 0)
    vectors = group.gather_rows(torch.cat(features) if features else torch.empty(0, dim))
    usable = group.gather_rows(torch.cat(positions) if positions else torch.empty(0).long())
    if group.world > 1:
        order = torch.argsort(usable)
        vectors, usable = vectors[order], usable[order]
    if not len(usable):
        raise no_usable_images(data)
    if not torch.isfinite(vectors).all():
        raise NoFeatures(
            f"the features of '{data.source.name}' are not finite: the model's weights are broken, or its "
            f"numbers exceed the range of the dtype (try --dtype float32)"
        )
    labels = torch.from_numpy(data.labels[usable.numpy()])
    return Features(vectors, labels, usable, len(data) - len(usable))


def read_views(
    data: LabeledData, size: int, group: Processes, *, batch_size: int, workers: int | None
) -> Iterator[Batch]:
    """Center views of this process's images: positions rank, rank + world, ... of the data."""
    own = np.arange(group.rank, len(data), group.world, dtype=np.int64)
    blocks = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    return read_batches(
        data.source,
        data.indices,
        blocks,
        {size},
        workers=default_workers() if workers is None else max(1, workers),
        pin_memory=group.device.type == "cuda",
    )


def no_usable_images(data: LabeledData) -> NoFeatures:
    """The error where none of the data can be used."""
    return NoFeatures(f"'{data.source.name}': none of its {len(data)} images can be used")


@contextmanager
def enough_memory(option: str, batch_size: int) -> Iterator[None]:
    """Where the device runs out of memory, name the option to lower and a value to try."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise RunError(
            f"not enough GPU memory for {batch_size} images at once: try {option} {max(1, batch_size // 2)}"
        ) from None


def float64_device(device: torch.device) -> torch.device:
    """The device itself where it computes in float64; the CPU in place of Apple's GPU."""
    return torch.device("cpu") if device.type == "mps" else device
