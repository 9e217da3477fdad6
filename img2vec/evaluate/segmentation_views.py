"""Square views of images of any size, and predictions on views back at the size of the mask."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from img2vec.evaluate.confusion import confusion_matrix
from img2vec.evaluate.features import enough_memory
from img2vec.evaluate.segmentation_data import SegmentationData, threaded
from tokdiv.dist import Processes
from tokdiv.progress import progress_bar

Scores = Callable[
    [Tensor], Tensor
]  # uint8 (n, 3, S, S) on the device -> float (n, num_classes, h, w)


@dataclass(frozen=True)
class Layout:
    """How an image becomes views of size x size.

    size: side of a view in pixels.
    stride: None: the image is resized to one view, whatever its aspect. Else its short side is resized to
        `size`, and windows follow each other at most `stride` pixels apart; the last one ends at the border.
    """

    size: int
    stride: int | None

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the image that the views are cut from."""
        if self.stride is None:
            return self.size, self.size
        short = min(height, width)
        return round(height * self.size / short), round(width * self.size / short)

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """(top, left) of each view in an image whose original size is given."""
        height, width = self.resized(height, width)
        return [(top, left) for top in self._starts(height) for left in self._starts(width)]

    def _starts(self, length: int) -> list[int]:
        last = length - self.size
        stride = self.stride or self.size
        return [*range(0, last, stride), last]


def cut_views(image: Tensor, layout: Layout) -> Tensor:
    """uint8 (3, H, W) -> uint8 (n, 3, S, S): resized (bicubic, antialiased) and cut."""
    height, width = image.shape[1:]
    resized = F.interpolate(
        image[None], size=layout.resized(height, width), mode="bicubic", antialias=True
    )[0]
    S = layout.size
    corners = layout.corners(height, width)
    return torch.stack([resized[:, top : top + S, left : left + S] for top, left in corners])


def cut_labels(
    labels: NDArray[np.int16], layout: Layout, grid: tuple[int, int]
) -> NDArray[np.int16]:
    """(H, W) -> (n, rows, columns): of each view, the labels at the centers of a grid of cells.

    With the grid (S, S) these are the labels of the view's pixels, resized by nearest neighbor.
    """
    height, width = layout.resized(*labels.shape)
    S, (rows, columns) = layout.size, grid
    views = []
    for top, left in layout.corners(*labels.shape):
        y = (top + (np.arange(rows) + 0.5) * S / rows) * labels.shape[0] / height
        x = (left + (np.arange(columns) + 0.5) * S / columns) * labels.shape[1] / width
        views.append(labels[y.astype(np.int64)[:, None], x.astype(np.int64)])
    return np.stack(views)


def join_views(scores: Tensor, layout: Layout, height: int, width: int) -> Tensor:
    """The inverse of `cut_views`, for scores: (n, C, h, w) -> (C, height, width), bilinear.

    Where windows overlap, their scores are averaged, as in mmsegmentation's slide inference.
    """
    if layout.stride is not None:
        S = layout.size
        scores = F.interpolate(scores, size=(S, S), mode="bilinear")
        whole = scores.new_zeros(scores.shape[1], *layout.resized(height, width))
        count = scores.new_zeros(1, *whole.shape[1:])
        for view, (top, left) in zip(scores, layout.corners(height, width)):
            whole[:, top : top + S, left : left + S] += view
            count[:, top : top + S, left : left + S] += 1
        scores = (whole / count)[None]
    return F.interpolate(scores, size=(height, width), mode="bilinear")[0]


def in_batches(
    network: Scores, loaded: Iterable[tuple[Tensor, Any]], batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Any]]:
    """The network's output for each item's views, with the rest of the item.

    Args:
        network: a function of views on the device.
        loaded: items of uint8 (n, 3, S, S) on the CPU and anything else; n may differ.
        batch_size: views per forward pass.
    """

    def outputs(waiting: list[tuple[Tensor, Any]]) -> Iterator[tuple[Tensor, Any]]:
        views = torch.cat([item for item, _ in waiting])
        counts = [len(item) for item, _ in waiting]
        parts = [
            part.to(device, non_blocking=True) for part in views.split(batch_size) if len(part)
        ]
        with enough_memory("--encode-batch-size", batch_size):
            found = torch.cat([network(part) for part in parts] or [torch.empty(0)])
        yield from zip(found.split(counts), [rest for _, rest in waiting])

    waiting: list[tuple[Tensor, Any]] = []
    for item in loaded:
        waiting.append(item)
        if sum(len(views) for views, _ in waiting) >= batch_size:
            yield from outputs(waiting)
            waiting = []
    if waiting:
        yield from outputs(waiting)


@torch.no_grad()
def predict(
    scores_of: Scores,
    data: SegmentationData,
    positions: Iterable[int],
    layout: Layout,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Predict images at the size of their masks.

    Yields:
        (position, predicted int64 (H, W), labels int16 (H, W)), on the device.
    """

    def load(position: int) -> tuple[Tensor, tuple[int, Tensor]]:
        views = cut_views(data.image(position), layout)
        return views, (position, torch.from_numpy(data.labels(position)))

    loaded = threaded(load, positions, workers)
    for scores, (position, labels) in in_batches(scores_of, loaded, batch_size, device):
        joined = join_views(scores.float(), layout, *labels.shape)
        yield position, joined.argmax(dim=0), labels.to(device)


def evaluate(
    scores_of: Scores,
    data: SegmentationData,
    layout: Layout,
    group: Processes,
    *,
    batch_size: int,
    workers: int,
) -> Tensor:
    """The confusion matrix of all images, int64 (num_classes, num_classes), alike on every process."""
    own = range(group.rank, len(data), group.world)
    confusion = torch.zeros(data.num_classes, data.num_classes, dtype=torch.int64)
    predicted = predict(
        scores_of, data, own, layout, batch_size=batch_size, workers=workers, device=group.device
    )
    for _, prediction, labels in progress_bar(
        predicted, total=len(own), desc="val", unit="img", show=group.rank == 0
    ):
        confusion += confusion_matrix(prediction, labels, data.num_classes)
    return group.sum(confusion)
