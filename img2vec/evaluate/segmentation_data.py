"""SEG: images and their masks, opened, paired, and decoded once before anything is trained.

A mask holds one number per pixel. SEG's options say which numbers are classes; the labels that the rest of the
code works with are 0 to num_classes - 1, or IGNORED.
"""

import errno
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from img2vec.evaluate.confusion import IGNORED
from img2vec.evaluate.masks import decode_mask
from img2vec.evaluate.segmentation_sources import Pairs, open_pairs
from tokdiv.data.decode import UnusableImage, decode_image
from tokdiv.dist import Processes
from tokdiv.errors import RunError, UsageError, first_line
from tokdiv.progress import progress_bar

log = logging.getLogger(__name__)

MAX_CLASSES = 4096  # more are numbers of objects, or samples of a photograph
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the machine's, no fault of a file
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class SegmentationData:
    """Images with labels, all of them decoded once and found fit.

    pairs: where they are read.
    indices: int64 (n,), of the usable pairs.
    sizes: int64 (n, 2), height and width of each.
    classes: names, in the order of their numbers; digits where no file gives names.
    pixels: int64 (num_classes,), labeled pixels of each class.
    skipped: (file, reason) of images and masks without partner or that cannot be decoded.
    """

    pairs: Pairs
    indices: NDArray[np.int64]
    sizes: NDArray[np.int64]
    classes: list[str]
    pixels: NDArray[np.int64]
    skipped: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def key(self, position: int) -> str:
        """The image's path below its folder."""
        return self.pairs.image_key(int(self.indices[position]))

    def image(self, position: int) -> torch.Tensor:
        """uint8 (3, H, W)."""
        index = int(self.indices[position])
        with _readable(self.pairs.image_name(index)):
            return decode_image(self.pairs.read_image(index))

    def labels(self, position: int) -> NDArray[np.int16]:
        """(H, W): 0 to num_classes - 1, or IGNORED."""
        index = int(self.indices[position])
        with _readable(name := self.pairs.mask_name(index)):
            values = decode_mask(self.pairs.read_mask(index), name)
        return self.pairs.label_of[values].astype(np.int16)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (UnusableImage, OSError) as error:
        raise RunError(
            f"'{name}' could be read at the start, and cannot now: {first_line(error)}"
        ) from None


def open_segmentation(
    train: str, val: str, group: Processes, workers: int
) -> tuple[SegmentationData, SegmentationData, list[str]]:
    """Open train and val data and check them: every image and mask is decoded once, a part by each process.

    Returns:
        Both data sets, with the same classes, and notes on them.

    Raises:
        UsageError: no such data, no pairs, masks that are not class numbers, sizes that differ, numbers beyond
            the classes.
    """
    opened = [open_pairs(train), open_pairs(val)]
    contents = [_check_pairs(pairs, group, workers) for pairs in opened]
    classes = _classes(opened, contents)
    train_data, val_data = (
        _checked(pairs, content, classes) for pairs, content in zip(opened, contents)
    )
    notes = [note for pairs in opened for note in pairs.notes]
    if unseen := np.flatnonzero((val_data.pixels > 0) & (train_data.pixels == 0)).tolist():
        names = ", ".join(classes[number] for number in unseen[:5])
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        notes.append(
            f"'{val}' has classes that '{train}' lacks, whose IoU can only be 0: {names}{more}; leave them out "
            f"with :ignore=NUMBER"
        )
    for data in (train_data, val_data):
        if data.skipped:
            file, reason = data.skipped[0]
            notes.append(
                f"'{data.pairs.name}': {len(data.skipped)} images or masks left out, the first '{file}': {reason}"
            )
    notes = list(dict.fromkeys(notes))  # train and val may be one SEG
    if group.rank == 0:
        for note in notes:
            log.warning("%s", note)
    return train_data, val_data, notes


# One pass over the masks -------------------------------------------------------------------------


@dataclass
class _Content:
    """What a data set's files hold, by the number of the pair.

    sizes: (height, width) of usable pairs. unusable: reasons. first: a mask value -> the first pair that has it.
    counts: a mask value -> its number of pixels.
    """

    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    unusable: dict[int, tuple[str, str]] = field(default_factory=dict)
    first: dict[int, int] = field(default_factory=dict)
    counts: Counter[int] = field(default_factory=Counter)


def _check_pairs(pairs: Pairs, group: Processes, workers: int) -> _Content:
    """Decode this process's share of the pairs; the content of all, on every process."""

    def check(index: int) -> tuple[tuple[int, int], NDArray[np.int64]] | tuple[str, str]:
        name = pairs.image_name(index)
        try:
            height, width = decode_image(pairs.read_image(index)).shape[1:]
            name = pairs.mask_name(index)
            values = decode_mask(pairs.read_mask(index), name)
        except UnusableImage as error:
            return name, error.reason
        except OSError as error:
            if error.errno in SHORTAGES:
                raise RunError(
                    f"{first_line(error)}: use fewer --workers or raise ulimit -n"
                ) from None
            return name, f"cannot be read: {first_line(error)}"
        if values.shape != (height, width):
            raise UsageError(
                f"'{pairs.image_name(index)}' has {width} x {height} px and its mask '{name}' "
                f"{values.shape[1]} x {values.shape[0]}: expected equal sizes; resize the mask (nearest neighbor)"
            )
        return (height, width), np.bincount(values.ravel())

    content = _Content()
    own = range(group.rank, len(pairs), group.world)
    error: UsageError | None = None
    try:
        found = threaded(check, own, workers)
        bar = progress_bar(
            found, total=len(own), desc="checking masks", unit="img", show=group.rank == 0
        )
        for index, (head, tail) in zip(own, bar):
            if isinstance(tail, str):
                content.unusable[index] = (head, tail)
                continue
            content.sizes[index] = head
            for value in np.flatnonzero(tail).tolist():
                content.first.setdefault(value, index)
                content.counts[value] += int(tail[value])
    except UsageError as mistake:
        error = mistake
    parts = group.gather(error or content)
    return group.on_first(lambda: _merged(pairs, parts or []))


def _merged(pairs: Pairs, parts: list[_Content | UsageError]) -> _Content:
    whole = _Content()
    for part in parts:
        if isinstance(part, UsageError):
            raise part
        whole.sizes |= part.sizes
        whole.unusable |= part.unusable
        whole.counts += part.counts
        for value, index in part.first.items():
            whole.first[value] = min(index, whole.first.get(value, index))
    if not whole.sizes:
        name, reason = min(whole.unusable.items())[1]
        raise UsageError(
            f"'{pairs.name}': none of its {len(pairs)} images can be used; the first, '{name}': {reason}"
        )
    return whole


def _classes(opened: list[Pairs], contents: list[_Content]) -> list[str]:
    """The names of the classes: from train's file, else as many as train's masks have.

    Raises:
        UsageError: a mask value beyond them, fewer than two classes, or no labeled pixel.
    """
    train, val = opened
    if train.classes and val.classes and train.classes != val.classes:
        raise UsageError(
            f"'{train.name}' and '{val.name}' name other classes: give both one file with :classes=FILE"
        )
    classes = train.classes or val.classes
    if classes is None:
        used = [int(train.label_of[value]) for value in contents[0].counts]
        classes = [str(number) for number in range(min(max(used, default=-1) + 1, MAX_CLASSES))]
    for pairs, content in zip(opened, contents):
        for value, index in sorted(content.first.items(), key=lambda item: (item[1], item[0])):
            if (label := int(pairs.label_of[value])) < len(classes):
                continue
            found = f"'{pairs.mask_name(index)}' holds the number {value}"
            remedy = f"leave it out with :ignore={value}"
            if pairs is val and not (train.classes or val.classes):
                raise UsageError(
                    f"{found}, class {label}, which the masks of '{train.name}' lack (their classes are 0 to "
                    f"{len(classes) - 1}); {remedy}, or name all classes with :classes=FILE"
                )
            known = np.flatnonzero((pairs.label_of >= 0) & (pairs.label_of < len(classes)))
            raise UsageError(
                f"{found}; expected {known[0]} to {known[-1]}, for {len(classes)} classes; {remedy}"
            )
        if not any(pairs.label_of[value] != IGNORED for value in content.counts):
            raise UsageError(
                f"'{pairs.name}': no pixel has a class, as all are ignored; check :ignore= and :reduce_zero_label="
            )
    if len(classes) < 2:
        raise UsageError(
            f"'{train.name}' has one class only: an evaluation needs two or more; if its masks are 0 and 255, "
            f"save them as 0 and 1, since 255 means ignored"
        )
    return classes


def _checked(pairs: Pairs, content: _Content, classes: list[str]) -> SegmentationData:
    indices = np.array(sorted(content.sizes), dtype=np.int64)
    pixels = np.zeros(len(classes), dtype=np.int64)
    for value, count in content.counts.items():
        if (label := int(pairs.label_of[value])) != IGNORED:
            pixels[label] += count
    return SegmentationData(
        pairs=pairs,
        indices=indices,
        sizes=np.array([content.sizes[int(index)] for index in indices], dtype=np.int64),
        classes=classes,
        pixels=pixels,
        skipped=[*pairs.unpaired, *(content.unusable[index] for index in sorted(content.unusable))],
    )


def threaded(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`function` of every item, in their order, computed in threads a few items ahead."""
    workers = max(1, workers)
    with ThreadPoolExecutor(workers, thread_name_prefix="img2vec-load") as pool:
        pending: deque[Any] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
