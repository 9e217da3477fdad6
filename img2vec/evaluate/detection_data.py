"""Samples that a detector is trained and evaluated on: images with boxes, labels and masks.

Crowds are left out of training and ignored by the evaluation; images without objects are trained on as negatives.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from img2vec.evaluate.coco import CocoData
from tokdiv.data.decode import UnusableImage, decode_image
from tokdiv.data.loader import _io_reason
from tokdiv.dist import Processes


class Sample(NamedTuple):
    """One image with its objects.

    position: of the image in the data. image: uint8 (3, H, W); None where it cannot be used, for the `reason`.
    target: boxes float (N, 4) as x1, y1, x2, y2; labels int64 (N,); masks uint8 (N, H, W); in evaluation also
        iscrowd int64 (N,) and area float (N,).
    """

    position: int
    image: Tensor | None
    target: dict[str, Tensor]
    reason: str | None = None


def read_sample(data: CocoData, index: int) -> Sample:
    """An image at its own size with all of its objects, crowds included."""
    record = data.record(index)
    height, width = record["size"]
    try:
        image = decode_image((data.folder / record["file"]).read_bytes())
    except UnusableImage as error:
        return Sample(index, None, {}, error.reason)
    except OSError as error:
        return Sample(index, None, {}, _io_reason(error))
    if image.shape[1:] != (height, width):
        found = f"{image.shape[2]} x {image.shape[1]}"
        return Sample(index, None, {}, f"has {found} pixels, and {width} x {height} in the JSON")
    objects = record["objects"]
    target = {
        "boxes": torch.tensor([o[1] for o in objects], dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor([o[0] for o in objects], dtype=torch.int64),
        "masks": decode_masks([o[4] for o in objects], height, width),
        "iscrowd": torch.tensor([o[3] for o in objects], dtype=torch.int64),
        "area": torch.tensor([o[2] for o in objects], dtype=torch.float32),
    }
    return Sample(index, image.contiguous(), target)


def decode_masks(segmentations: list[Any], height: int, width: int) -> Tensor:
    """uint8 (N, H, W) of polygons and run-length encodings."""
    from pycocotools import mask as coco_mask

    masks = np.zeros((len(segmentations), height, width), dtype=np.uint8)
    for mask, segmentation in zip(masks, segmentations):
        if isinstance(segmentation, list):
            rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            rle = coco_mask.frPyObjects(segmentation, height, width)
        else:
            rle = segmentation
        mask[:] = coco_mask.decode(rle)
    return torch.from_numpy(masks)


def augment(
    sample: Sample,
    size: int,
    scales: tuple[float, float],
    flip: float,
    generator: np.random.Generator,
) -> Sample:
    """Large-scale jitter (arXiv 2012.07177) and a flip: an image of at most size x size, objects cut to it.

    The image is resized to fit into a square of size * s, with s uniform in `scales`, and cropped to at most
    size x size at a random place. An object that the crop cuts gets the box of what is left of it; one whose box
    or mask has nothing left is dropped, and so are crowds.
    """
    from torchvision import tv_tensors
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    assert sample.image is not None
    kept = sample.target["iscrowd"] == 0
    height, width = sample.image.shape[1:]
    image: Tensor = tv_tensors.Image(sample.image)
    boxes: Tensor = tv_tensors.BoundingBoxes(
        sample.target["boxes"][kept], format="XYXY", canvas_size=(height, width)
    )
    masks: Tensor = tv_tensors.Mask(sample.target["masks"][kept])

    scale = generator.uniform(*scales) * size / max(height, width)
    resized = [max(1, round(height * scale)), max(1, round(width * scale))]
    image, boxes = F.resize(image, resized, antialias=True), F.resize(boxes, resized)
    # As an image and not as a mask, whose plain NEAREST takes the corner of a cell, half a pixel off.
    masks = tv_tensors.Mask(
        F.resize(tv_tensors.Image(masks), resized, interpolation=InterpolationMode.NEAREST_EXACT)
    )
    crop = [min(side, size) for side in resized]
    top, left = (int(generator.integers(0, a - b + 1)) for a, b in zip(resized, crop))
    shifted = boxes.as_subclass(Tensor) - torch.tensor([left, top, left, top])
    image, masks = (F.crop(t, top, left, *crop) for t in (image, masks))
    boxes = F.clamp_bounding_boxes(F.crop(boxes, top, left, *crop))
    clipped = boxes.as_subclass(Tensor)
    is_cut = (clipped != shifted).any(dim=1, keepdim=True)
    tight = tight_boxes(masks.as_subclass(Tensor))
    boxes = tv_tensors.wrap(torch.where(is_cut, tight, clipped), like=boxes)
    if generator.random() < flip:
        image, boxes, masks = (F.horizontal_flip(t) for t in (image, boxes, masks))
    boxes, masks = boxes.as_subclass(Tensor), masks.as_subclass(Tensor)
    sides = boxes[:, 2:] - boxes[:, :2]
    left_over = (sides.min(dim=1).values >= 1) & (masks.flatten(1) > 0).any(dim=1)
    target = {
        "boxes": boxes[left_over],
        "labels": sample.target["labels"][kept][left_over],
        "masks": masks[left_over],
    }
    return Sample(sample.position, image.as_subclass(Tensor).contiguous(), target)


def tight_boxes(masks: Tensor) -> Tensor:
    """float (N, 4): the smallest boxes that hold the masks (N, H, W); x2 < x1 where a mask is empty.

    torchvision.ops.masks_to_boxes gives the last pixel in place of its end.
    """

    def extent(filled: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.arange(filled.shape[1])
        first = torch.where(filled, steps, filled.shape[1]).amin(dim=1)
        return first, torch.where(filled, steps + 1, 0).amax(dim=1)

    filled = masks > 0
    (x1, x2), (y1, y2) = extent(filled.any(dim=1)), extent(filled.any(dim=2))
    return torch.stack([x1, y1, x2, y2], dim=1).float()


# Batches -----------------------------------------------------------------------------------------


def training_batches(
    data: CocoData,
    *,
    size: int,
    scales: tuple[float, float],
    flip: float,
    batch_size: int,
    first_step: int,
    num_steps: int,
    seed: int,
    workers: int,
    group: Processes,
) -> Iterator[list[Sample]]:
    """This process's part of each step's images, augmented, from `first_step` up to `num_steps`.

    What is random about an image comes from (seed, epoch, its index) alone, whatever the number of processes
    and workers. What is left of an epoch after its last whole batch is left out, in each epoch other images.

    Args:
        batch_size: of all processes together, at most the number of training images.
    """
    indices = data.training_indices()
    steps_per_epoch = len(indices) // batch_size

    def keys() -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, indices
        for step in range(first_step, num_steps):
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                order = np.random.default_rng([seed, epoch]).permutation(indices)
            start = step % steps_per_epoch * batch_size
            mine = order[start : start + batch_size][group.rank :: group.world]
            yield [(epoch, int(index)) for index in mine]

    def read(key: tuple[int, int]) -> Sample:
        sample = read_sample(data, key[1])
        if sample.image is None:
            return sample
        return augment(sample, size, scales, flip, np.random.default_rng([seed, *key]))

    yield from _loaded(read, keys(), workers, group.device)


def evaluation_batches(
    data: CocoData, *, batch_size: int, workers: int, group: Processes
) -> Iterator[list[Sample]]:
    """This process's images at their own size: index rank, rank + world, ..., without padding."""
    mine = list(range(group.rank, len(data), group.world))
    batches = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
    yield from _loaded(lambda index: read_sample(data, index), batches, workers, group.device)


class _Samples(Dataset[Sample]):
    def __init__(self, read: Callable[[Any], Sample]) -> None:
        self.read = read

    def __getitem__(self, key: Any) -> Sample:
        return self.read(key)


def _loaded(
    read: Callable[[Any], Sample],
    batches: Iterator[list[Any]],
    workers: int,
    device: torch.device,
) -> Iterator[list[Sample]]:
    """Samples read ahead by worker processes; where the system cannot fork, there are none."""
    forks = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
    yield from DataLoader(
        _Samples(read),
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=list,
        num_workers=workers if forks else 0,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if forks else None,
        generator=torch.Generator(),  # else it draws from the global one
    )
