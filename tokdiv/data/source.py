"""What a source of images is.

A `Source` either has an index (a folder, a tar, a data set in memory-mapped files): then any image can be read at
any time, from any thread, and the order is a true permutation. Or it is a stream (`wds/`, `tfds/`, `hfids/`):
read in order, shuffled by shards and through a buffer.
"""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from tokdiv.data.headers import UnusableImage
from tokdiv.errors import UsageError

Item = bytes | Image.Image | UnusableImage  # an image, still encoded or not, or why there is none

# Files that are larger are not read: the size is also that of the largest image that is decoded.
MAX_ENCODED_BYTES = 2**29
MAX_ENCODED_VARIABLE = "TOKDIV_MAX_IMAGE_BYTES"


@dataclass
class Source:
    """Images that can be named and read.

    name: DATA as it was given.
    count: number of images, None where a stream does not tell.
    fingerprint: sha256 in hex of the kind, the keys in order and the sizes of the files (of a stream: of the
        shards), by which a run notices that it is resumed with other data. Paths of folders above the data
        and times of files are not part of it.
    permutable: whether `key` and `read` take any index; else only `stream` gives images.
    labels: int64 (count,) class numbers, or None; classes: their names, or None.
    warnings: what the user should know about this data, one line each. It grows while a stream is read.
    last_read: the index of the last image that was read, None before the first.
    """

    name: str
    count: int | None
    fingerprint: str
    permutable: bool = True
    labels: np.ndarray | None = None
    classes: list[str] | None = None
    warnings: list[str] = field(default_factory=list)
    key_of: Callable[[int], str] | None = field(default=None, repr=False)
    reader: Callable[[int], Item] | None = field(default=None, repr=False)
    open_stream: Callable[[int], Iterator[tuple[str, Item]]] | None = field(
        default=None, repr=False
    )
    last_read: int | None = field(default=None, repr=False)

    @property
    def warning(self) -> str | None:
        """All warnings in one text, None where there is none."""
        return "; ".join(self.warnings) or None

    def key(self, index: int) -> str:
        """The unique, stable name of an image: its path, its shard and member, or its number."""
        assert self.key_of is not None, "a stream has no index"
        return self.key_of(index)

    def read(self, index: int) -> Item:
        """The undecoded bytes of an image, or a picture where only those are available. Safe in threads.

        Raises:
            OSError: it cannot be read. UnusableImage: it is not to be read.
        """
        assert self.reader is not None, "a stream has no index"
        item = self.reader(index)
        self.last_read = index
        return item

    def is_gone(self) -> bool:
        """Whether an image that could be read before cannot be read any more."""
        if self.last_read is None or self.reader is None:
            return False
        try:
            self.reader(self.last_read)
        except OSError:
            return True
        except UnusableImage:
            pass
        return False

    def stream(self, seed: int) -> Iterator[tuple[str, Item]]:
        """(key, image) of a source without an index, in an order that the seed determines."""
        assert self.open_stream is not None, "a source with an index is read by permutation"
        return self.open_stream(seed)


def permutation(count: int, seed: int) -> np.ndarray:
    """A seeded uniform permutation of range(count), int64 (count,).

    The ranks of `count` raw 64-bit draws of PCG64. numpy promises that the stream of a bit generator stays
    as it is, but not `Generator.permutation`: a run that is resumed under another numpy must find the same
    order. (A tie among the draws, at one chance in 10^7 for a million images, is broken by position.)
    """
    draws = np.random.PCG64(seed).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int64, copy=False)


def read_file(path: str) -> bytes:
    """The content of a regular file of bounded size.

    Raises:
        OSError: it cannot be read. UnusableImage: it is something else than a file, or too large.
    """
    # Opening a FIFO would wait for a writer, and a device may have no end.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnusableImage("not a regular file")
        check_encoded(status.st_size)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


def check_encoded(num_bytes: int) -> None:
    """Raise UnusableImage for an encoded image that is too large to be read."""
    if num_bytes > (most := max_encoded_bytes()):
        raise UnusableImage(
            f"too large: {num_bytes:,} encoded bytes, at most {most:,} are read ({MAX_ENCODED_VARIABLE})"
        )


def max_encoded_bytes() -> int:
    """The largest encoded image that is read: TOKDIV_MAX_IMAGE_BYTES, else 512 MiB.

    Raises:
        UsageError: it is not a positive integer.
    """
    text = os.environ.get(MAX_ENCODED_VARIABLE)
    if text is None:
        return MAX_ENCODED_BYTES
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 19 and int(text)):
        raise UsageError(
            f"{MAX_ENCODED_VARIABLE}={text}: expected a number of bytes, as 1000000000"
        )
    return int(text)


def unique(names: Iterable[str]) -> list[str]:
    """The names, with #2, #3, ... behind those that came before."""
    result: list[str] = []
    taken: set[str] = set()
    counts: Counter[str] = Counter()
    for name in names:
        key = name
        if key in taken:
            counts[name] = max(counts[name], 1)
            while key in taken:
                counts[name] += 1
                key = f"{name}#{counts[name]}"
        taken.add(key)
        result.append(key)
    return result


def storable(path: str) -> str:
    """A path as text that can be stored: bytes that are not UTF-8 are written as \\udc80 to \\udcff."""
    return path if path.isascii() else path.encode("utf-8", "backslashreplace").decode("utf-8")


def begin_fingerprint(*kind: str) -> Any:
    """A hash that `add_to_fingerprint` feeds with the keys and sizes of the images."""
    digest = hashlib.sha256()
    for part in kind:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest


def add_to_fingerprint(digest: Any, key: str, size: int) -> None:
    digest.update(f"{key}\0{size}\n".encode())
