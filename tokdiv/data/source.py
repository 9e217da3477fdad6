"""What a source of images is, and the simplest one: a folder.

A `Source` either has an index (a folder, a tar, a data set in memory-mapped files): then any image
can be read at any time, from any thread, and the order is a true permutation. Or it is a stream
(`wds/`, `tfds/`, `hfids/`): read in order, shuffled by shards and through a buffer.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

Item = bytes | Image.Image


@dataclass
class Source:
    """Images that can be named and read.

    name: DATA as it was given.
    count: how many images, None where a stream does not say.
    fingerprint: sha256 in hex over the kind, the keys in order and the sizes of the files (of a
        stream: the shards'), so that a run can tell that it goes on with other data. Paths of
        folders above the data and times of files are not part of it.
    permutable: whether `key` and `read` take any index; else only `stream` gives images.
    labels: int64 (count,) class numbers, or None; classes: their names, or None.
    warnings: what the user should know about this data, one line each. It grows while a stream of
        damaged shards is read.
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

    @property
    def warning(self) -> str | None:
        """All warnings in one text, None where there is none."""
        return "; ".join(self.warnings) or None

    def key(self, index: int) -> str:
        """The unique, stable name of an image: its path, its shard and member, or its number."""
        assert self.key_of is not None, "a stream has no index"
        return self.key_of(index)

    def read(self, index: int) -> Item:
        """The undecoded bytes of an image, or a picture where only those are to be had.

        Safe in threads. Raises OSError where the file cannot be read.
        """
        assert self.reader is not None, "a stream has no index"
        return self.reader(index)

    def stream(self, seed: int) -> Iterator[tuple[str, Item]]:
        """(key, image) of a source without an index, in an order that the seed determines."""
        assert self.open_stream is not None, "a source with an index is read by permutation"
        return self.open_stream(seed)


def permutation(count: int, seed: int) -> np.ndarray:
    """A seeded uniform permutation of range(count), int64 (count,).

    The ranks of `count` raw 64-bit draws of PCG64. numpy promises that the stream of a bit
    generator stays as it is, but not `Generator.permutation`: a run that is resumed under another
    numpy must find the same order. (A tie among the draws, at one chance in 10^7 for a million
    images, is broken by position.)
    """
    draws = np.random.PCG64(seed).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int64, copy=False)


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
    """A path as text that can be stored: bytes that are no UTF-8 are written as \\udc80 to \\udcff."""
    return path if path.isascii() else path.encode("utf-8", "backslashreplace").decode("utf-8")


def begin_fingerprint(*kind: str) -> Any:
    """A hash that `add_to_fingerprint` feeds with the keys and sizes of the images."""
    digest = hashlib.sha256()
    for part in kind:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest


def add_to_fingerprint(digest: Any, key: str, size: int) -> None:
    digest.update(f"{key}\0{size}\n".encode())


def first_line(error: Exception) -> str:
    """What an error of another package says, cut to one line of a message."""
    text = str(error).strip().split("\n")[0]
    return text[:300] or type(error).__name__
