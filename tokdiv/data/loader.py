"""From a source of images to batches, decoded in threads: the one loader of ranking, features and training.

    source = open_source("photos/")
    order = permutation(source.count, seed=0)
    for batch in read_batches(source, order, blocks, sizes={224}, workers=8):
        batch.views[224]    # uint8 (num_usable, 3, 224, 224)

Threads and not processes: the decoders, the resize and the copies release the interpreter's lock, and a batch
is written where it is used, without being sent from one process to another.
"""

import contextlib
import errno
import itertools
import os
import threading
from collections import deque
from collections.abc import Collection, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from tokdiv.data.decode import UnusableImage, center_view, decode_image
from tokdiv.data.open import open_source
from tokdiv.data.source import Item, Source, permutation
from tokdiv.errors import RunError

__all__ = [
    "Batch",
    "Source",
    "UnusableImage",
    "center_view",
    "decode_image",
    "fill_batches",
    "open_source",
    "pack",
    "permutation",
    "read_batches",
]

# Not the image's fault: it could be read with fewer threads, or with a higher limit.
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# A disk or a network that fails, whatever the file: also where others can still be read, from a cache.
OUTAGES = tuple(
    getattr(errno, name)
    for name in (
        *("EIO", "ENODEV", "ENXIO", "ENOMEDIUM", "EREMOTEIO", "ESTALE", "ESHUTDOWN", "ENOTCONN"),
        *("ETIMEDOUT", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
    )
    if hasattr(errno, name)
)
NUM_FAILURES = 3  # consecutive images that cannot be read, at which DATA itself is in question


class Fillable(Protocol):
    """A batch whose memory is there and whose rows the loader fills."""

    @property
    def positions(self) -> np.ndarray:
        """int64 (n,), positions in the order; -1 stands for a row without an image."""

    def write(self, row: int, image: Tensor | None) -> None:
        """Write one row, once, in any thread: uint8 (3, H, W); None where there is no usable image."""


B = TypeVar("B", bound=Fillable)


class Filled(NamedTuple, Generic[B]):
    """A batch whose rows are written.

    keys: n names; fewer where a stream ended. reasons: as many entries, None where usable.
    """

    batch: B
    keys: list[str]
    reasons: list[str | None]


def fill_batches(
    source: Source,
    order: np.ndarray | None,
    batches: Iterable[B],
    *,
    workers: int,
    seed: int = 0,
    prefetch: int = 2,
    cache: dict[int, bytes] | None = None,
) -> Generator[Filled[B], None, None]:
    """Fill batches with decoded images, in order, some ahead of the one that the caller holds.

    An image that cannot be read or decoded has a reason instead. But where consecutive images cannot be read,
    and DATA is gone (see `_check_outage`), that is an error. A batch that ends in such images is held back
    until the next ones tell, so that none of them is taken for unusable.

    Args:
        source: where the images are read.
        order: int64 (count,), position -> index into the source; None for the source's own order. A
            stream has no indices: its positions count along it, shuffled with `seed`, and must ascend;
            what they leave out is read over but not decoded.
        batches: each is drawn when its turn comes to be filled, so that at most prefetch + 1 are in
            memory, the caller's included.
        workers: decoding threads.
        cache: keeps the encoded bytes of what was read, by index; None keeps nothing.

    Raises:
        RunError: DATA is gone, or the machine is short of memory or file handles. Errors of `batches` and of
            a stream are raised too.

    Closing the generator stops the threads after the image at hand.
    """
    if order is None and source.permutable:
        order = np.arange(source.count or 0)
    stop = threading.Event()
    cursor = None if order is not None else _StreamCursor(source.stream(seed), stop)
    num_workers = max(1, workers)
    decoders = ThreadPoolExecutor(num_workers, thread_name_prefix="tokdiv-decode")
    reader = ThreadPoolExecutor(1, thread_name_prefix="tokdiv-read")

    def begin(batch: B) -> _Filling[B]:
        positions = batch.positions
        items = reader.submit(cursor.take, positions) if cursor is not None else None
        indices = order[positions] if order is not None else None
        filling = _Filling(source, batch, indices, items, stop, cache)
        rows = iter(range(len(positions)))  # shared: each thread draws the next row not begun
        for _ in range(min(num_workers, len(positions))):
            filling.tasks.append(decoders.submit(filling.run, rows))
        return filling

    waiting: deque[_Filling[B]] = deque()
    ready: deque[Filled[B]] = deque()
    failures: list[OSError] = []  # of the last images, without one that could be read after them
    remaining, ahead = iter(batches), max(1, prefetch)
    try:
        while True:
            waiting.extend(map(begin, itertools.islice(remaining, ahead - len(waiting))))
            ended = len(waiting) < min(
                ahead, 2
            )  # no more are drawn, and none is left after this one
            if waiting:
                filling = waiting.popleft()
                ready.append(filling.finish())
                failures = _check_outage(source, failures, filling.errors)
                del filling
            if ended:
                if failures and source.is_gone():
                    raise _outage(source, failures)
                failures = []
            while ready and not failures:
                yield ready.popleft()  # not kept in a name: it is the caller's alone
            if ended:
                return
    finally:
        stop.set()
        decoders.shutdown(wait=True, cancel_futures=True)
        reader.shutdown(wait=True, cancel_futures=True)
        if cursor is not None:
            cursor.close()


@dataclass
class _Filling(Generic[B]):
    """A batch that threads are filling."""

    source: Source
    batch: B
    indices: np.ndarray | None  # of its rows in the source
    items: "Future[list[tuple[str, Item]]] | None"  # of its rows, where the source is a stream
    stop: threading.Event
    cache: dict[int, bytes] | None
    reasons: list[str | None] = field(init=False)
    errors: list[OSError | None] = field(init=False)  # why it could not be read
    tasks: list["Future[None]"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reasons = [None] * len(self.batch.positions)
        self.errors = [None] * len(self.batch.positions)

    def run(self, rows: Iterator[int]) -> None:
        """Read, decode and write images until `rows` has no more."""
        for row in rows:
            if self.stop.is_set():
                return
            self.batch.write(row, self._decoded(row))

    def _decoded(self, row: int) -> Tensor | None:
        items = None if self.items is None else self.items.result()
        if self.batch.positions[row] < 0 or (items is not None and row >= len(items)):
            return None
        try:
            if items is not None:
                return decode_image(items[row][1])
            assert self.indices is not None
            return decode_image(self._read(int(self.indices[row])))
        except UnusableImage as unusable:
            self.reasons[row] = unusable.reason
        except OSError as error:
            self.errors[row] = error
            self.reasons[row] = _io_reason(error)
        except MemoryError:
            raise RunError("out of memory in decoding an image: use fewer --workers") from None
        return None

    def _read(self, index: int) -> Item:
        if self.cache is None:
            return self.source.read(index)
        item = self.cache.get(index) or self.source.read(index)
        if isinstance(item, bytes):
            self.cache[index] = item
        return item

    def finish(self) -> Filled[B]:
        """Wait for the threads."""
        for task in self.tasks:
            task.result()
        if self.items is not None:
            keys = [key for key, _ in self.items.result()]
        else:
            assert self.indices is not None
            keys = [self.source.key(int(index)) for index in self.indices]
        return Filled(self.batch, keys, self.reasons[: len(keys)])


class _StreamCursor:
    """Walks a stream of (key, image) to ascending positions. Used by one thread."""

    def __init__(self, samples: Iterator[tuple[str, Item]], stop: threading.Event) -> None:
        self.samples, self.stop, self.next_position = samples, stop, 0

    def take(self, positions: np.ndarray) -> list[tuple[str, Item]]:
        """The samples at these positions, -1 left out; fewer where the stream ends before."""
        taken: list[tuple[str, Item]] = []
        for position in positions[positions >= 0].tolist():
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


def _check_outage(
    source: Source, failures: list[OSError], errors: list[OSError | None]
) -> list[OSError]:
    """The failures at the end of a batch, those before it counted, where no image was read in between.

    Raises:
        RunError: several in a row cannot be read because the disk or the network fails, or they are not there
            any more and neither is an image that was read before. A file that is gone or locked alone is
            that file's fault.
    """
    for error in errors:
        failures = [] if error is None else [*failures, error]
        if len(failures) >= NUM_FAILURES:
            if any(f.errno in OUTAGES for f in failures) or source.is_gone():
                raise _outage(source, failures)
            failures = []
    return failures


def _outage(source: Source, failures: list[OSError]) -> RunError:
    return RunError(
        f"'{source.name}' cannot be read any more ({_io_reason(failures[-1])}): make it available again, and "
        f"the same command goes on"
    )


def _io_reason(error: OSError) -> str:
    """Why a file cannot be read, without its path."""
    if error.errno in SHORTAGES:
        raise RunError(
            f"cannot open more files ({os.strerror(error.errno)}): use fewer --workers or raise ulimit -n"
        ) from error
    return f"cannot be read: {os.strerror(error.errno) if error.errno else error}"


def pack(rows: Tensor, usable: np.ndarray) -> Tensor:
    """The usable rows, moved together in place: pinned memory stays pinned."""
    array = rows.numpy()
    kept = np.flatnonzero(usable)
    for to, row in enumerate(kept):
        if to != row:
            array[to] = array[row]
    return rows[: len(kept)]


@dataclass
class Batch:
    """Center views of a block of images, in the order of the run.

    positions: int64 (n,), ascending positions in the order (not indices into the source).
    keys: n names, unique within the source.
    usable: bool (n,); where False, `reasons` says why.
    reasons: n entries, None where usable.
    views: for each size, uint8 (num_usable, 3, size, size): the usable images in order.
    """

    positions: np.ndarray
    keys: list[str]
    usable: np.ndarray
    reasons: list[str | None]
    views: dict[int, Tensor]

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


class _Views:
    """The memory of a Batch."""

    def __init__(self, block: np.ndarray, sizes: Collection[int], pin_memory: bool) -> None:
        self.positions = np.asarray(block, dtype=np.int64)
        self.views = {
            size: torch.empty((len(block), 3, size, size), dtype=torch.uint8, pin_memory=pin_memory)
            for size in sorted(sizes)
        }
        # Written through numpy: a copy by torch would start a pool of OpenMP threads in each worker.
        self.arrays = {size: view.numpy() for size, view in self.views.items()}

    def write(self, row: int, image: Tensor | None) -> None:
        if image is not None:
            for size, array in self.arrays.items():
                array[row] = center_view(image, size).numpy()


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
    """Batches of center views for blocks of ascending positions, one `Batch` a block, in order.

    Where a stream ends within a block, its batch is shorter and the last. An image that cannot be used is
    in its batch, with the reason.

    Args:
        sizes: the sides of the views; each image is decoded once for all of them.
        source, order, workers, seed, prefetch: see `fill_batches`.
    """
    unfilled = (_Views(block, sizes, pin_memory) for block in blocks)
    with contextlib.closing(
        fill_batches(source, order, unfilled, workers=workers, seed=seed, prefetch=prefetch)
    ) as batches:
        for batch, keys, reasons in batches:
            n = len(keys)
            usable = np.array([reason is None for reason in reasons], dtype=bool)
            if n or not len(batch.positions):
                views = {size: pack(view, usable) for size, view in batch.views.items()}
                yield Batch(batch.positions[:n], keys, usable, reasons, views)
            if n < len(batch.positions):
                return
