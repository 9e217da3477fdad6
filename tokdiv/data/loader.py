"""From the bytes of an image to batches of views: one decode an image, in threads, in a seeded order.

    source = open_source("photos/")
    order = permutation(source.count, seed=0)
    for batch in read_batches(source, order, blocks, sizes={224}, workers=8):
        batch.views[224]    # uint8 (num_usable, 3, 224, 224)

Threads and not processes: the decoders, the resize and the copies release the interpreter's lock,
and a batch is written where it is used, without being sent from one process to another.
"""

import errno
import os
import threading
from collections import deque
from collections.abc import Collection, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokdiv.data.decode import UnusableImage, center_view, decode_image
from tokdiv.data.open import open_source
from tokdiv.data.source import Source, permutation
from tokdiv.errors import RunError

__all__ = [
    "Batch",
    "Source",
    "UnusableImage",
    "center_view",
    "decode_image",
    "open_source",
    "permutation",
    "read_batches",
]


@dataclass
class Batch:
    """A block of images in the order of the run.

    positions: int64 (n,), ascending places in the order (not indices into the source).
    keys: n names, unique within the source.
    usable: bool (n,); where False, `reasons` says why.
    reasons: n entries, None where usable.
    views: for each size, uint8 (num_usable, 3, size, size): the usable images in order.
    """

    positions: np.ndarray
    keys: list[str]
    usable: np.ndarray
    reasons: list[str | None]
    views: dict[int, torch.Tensor]

    def __len__(self) -> int:
        return len(self.positions)

    def split(self, k: int) -> tuple["Batch", "Batch"]:
        """The first k images and the rest (views are shared with this batch, not copied)."""
        k = min(max(k, 0), len(self))
        cut = int(self.usable[:k].sum())
        halves = (slice(None, k), slice(None, cut)), (slice(k, None), slice(cut, None))
        first, second = (
            Batch(
                self.positions[rows],
                self.keys[rows],
                self.usable[rows],
                self.reasons[rows],
                {size: view[used] for size, view in self.views.items()},
            )
            for rows, used in halves
        )
        return first, second


def read_batches(
    source: Source,
    order: np.ndarray | None,
    blocks: Iterable[np.ndarray],
    sizes: Collection[int],
    *,
    workers: int,
    seed: int = 0,
    pin_memory: bool = False,
    prefetch: int = 2,
) -> Generator[Batch, None, None]:
    """Batches of views for blocks of positions, one `Batch` a block, in order.

    order: int64 (count,), position -> index into the source; None for a source that cannot be
        permuted, whose positions count along its stream, shuffled with `seed`. (None for another
        source: its own order.)
    blocks: arrays of ascending positions. At most `prefetch` of them are drawn ahead of the batch
        that the caller holds, so that at most prefetch + 1 batches are in memory.
    sizes: the sides of the views wanted; each image is decoded once for all of them.
    workers: decoding threads.

    Where a stream ends within a block, its batch is shorter and the last; positions that a block
    leaves out are read over but not decoded. An image that cannot be read or decoded is in its
    batch, not usable, with the reason. Errors of `blocks`, of a stream and of the machine (memory,
    file handles) are raised. Closing the generator stops the threads after the image at hand.
    """
    if order is None and source.permutable:
        order = np.arange(source.count or 0)
    stop = threading.Event()
    cursor = None if order is not None else _StreamCursor(source.stream(seed), stop)
    decoders = ThreadPoolExecutor(max(1, workers), thread_name_prefix="tokdiv-decode")
    reader = ThreadPoolExecutor(1, thread_name_prefix="tokdiv-read")

    def begin(block: np.ndarray) -> _PendingBatch:
        positions = np.asarray(block, dtype=np.int64)
        if order is not None:
            indices = order[positions]
            items = None
        else:
            assert cursor is not None
            indices = None
            items = reader.submit(cursor.take, positions)
        pending = _PendingBatch(source, positions, indices, items, sizes, pin_memory, stop)
        rows = iter(range(len(positions)))  # shared: each thread draws the next image not begun
        pending.tasks = [
            decoders.submit(pending.fill, rows) for _ in range(min(max(1, workers), len(positions)))
        ]
        return pending

    waiting: deque[_PendingBatch] = deque()
    blocks = iter(blocks)
    try:
        while True:
            while len(waiting) < max(1, prefetch) and (block := next(blocks, None)) is not None:
                waiting.append(begin(block))
            if not waiting:
                return
            pending = waiting.popleft()
            batch, ended = pending.finish()
            del pending
            if len(batch) or not ended:
                yield batch
            del batch  # the caller's alone from here on
            if ended:
                return
    finally:
        stop.set()
        decoders.shutdown(wait=True, cancel_futures=True)
        reader.shutdown(wait=True, cancel_futures=True)
        if cursor is not None:
            cursor.close()


class _StreamCursor:
    """Walks a stream of (key, image) to ascending positions. Used by one thread."""

    def __init__(self, samples: Iterator[tuple[str, Any]], stop: threading.Event) -> None:
        self.samples, self.stop, self.next_position = samples, stop, 0

    def take(self, positions: np.ndarray) -> list[tuple[str, Any]]:
        """The samples at these positions; fewer where the stream ends before."""
        taken: list[tuple[str, Any]] = []
        for position in positions.tolist():
            if position < self.next_position:
                raise ValueError(f"position {position} of a stream is behind {self.next_position}")
            sample = None
            while self.next_position <= position and not self.stop.is_set():
                sample = next(self.samples, None)
                if sample is None:
                    return taken
                self.next_position += 1
            if sample is None:  # stopped
                return taken
            taken.append(sample)
        return taken

    def close(self) -> None:
        if hasattr(self.samples, "close"):
            self.samples.close()


class _PendingBatch:
    """A batch that threads are filling."""

    def __init__(
        self,
        source: Source,
        positions: np.ndarray,
        indices: np.ndarray | None,
        items: "Future[list[tuple[str, Any]]] | None",
        sizes: Collection[int],
        pin_memory: bool,
        stop: threading.Event,
    ) -> None:
        n = len(positions)
        self.source, self.positions, self.indices, self.items = source, positions, indices, items
        self.stop = stop
        self.reasons: list[str | None] = [None] * n
        self.views = {
            size: torch.empty((n, 3, size, size), dtype=torch.uint8, pin_memory=pin_memory)
            for size in sorted(sizes)
        }
        # Written through numpy: a copy by torch would start a pool of OpenMP threads in each worker.
        self.arrays = {size: view.numpy() for size, view in self.views.items()}
        self.tasks: list[Future[None]] = []

    def fill(self, rows: Iterator[int]) -> None:
        """Read, decode and write images until `rows` has no more."""
        for row in rows:
            if self.stop.is_set():
                return
            if self.items is not None and row >= len(self.items.result()):
                return
            try:
                image = decode_image(self._read(row))
                for size, array in self.arrays.items():
                    array[row] = center_view(image, size).numpy()
            except UnusableImage as unusable:
                self.reasons[row] = unusable.reason
            except OSError as error:
                self.reasons[row] = _io_reason(error)

    def _read(self, row: int) -> bytes | Image.Image:
        if self.items is not None:
            return self.items.result()[row][1]
        assert self.indices is not None
        return self.source.read(int(self.indices[row]))

    def finish(self) -> tuple[Batch, bool]:
        """Wait for the threads; the batch, and whether the stream ended in it."""
        for task in self.tasks:
            task.result()
        n = len(self.positions)
        if self.items is not None:
            taken = self.items.result()
            num_read, keys = len(taken), [key for key, _ in taken]
        else:
            assert self.indices is not None
            num_read, keys = n, [self.source.key(int(index)) for index in self.indices]
        reasons = self.reasons[:num_read]
        usable = np.array([reason is None for reason in reasons], dtype=bool)
        rows = np.flatnonzero(usable)
        for array in self.arrays.values():
            for to, row in enumerate(rows):  # close the gaps in place: pinned memory stays pinned
                if to != row:
                    array[to] = array[row]
        views = {size: view[: len(rows)] for size, view in self.views.items()}
        return Batch(self.positions[:num_read], keys, usable, reasons, views), num_read < n


def _io_reason(error: OSError) -> str:
    """Why a file cannot be read, without its path. A shortage of the machine is no fault of it."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise RunError(
            f"cannot open more files ({os.strerror(error.errno)}): use fewer --workers or raise ulimit -n"
        ) from error
    return f"cannot be read: {os.strerror(error.errno) if error.errno else error}"
