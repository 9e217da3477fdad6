"""What a source of images is, and the simplest one: a folder.

A `Source` either has an index (a folder, a tar, a data set in memory-mapped files): then any image
can be read at any time, from any thread, and the order is a true permutation. Or it is a stream
(`wds/`, `tfds/`, `hfids/`): read in order, shuffled by shards and through a buffer.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from tokdiv.errors import UsageError

EXTENSIONS = ".bmp .gif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp"
IS_IMAGE = frozenset(EXTENSIONS.split())

# The shuffle buffer of a stream holds this many images, or fewer once their bytes reach the limit.
BUFFER_IMAGES = 10_000
BUFFER_BYTES = 256 * 2**20

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


class NoImages(UsageError):
    """Nothing with the extension of an image was found where images were looked for."""

    def __init__(self, data: str, others: Counter[str]) -> None:
        found = ", ".join(f"{n} {ext or 'without extension'}" for ext, n in others.most_common(4))
        super().__init__(
            f"{data!r} holds no images: found {found or 'nothing'}; looked for {EXTENSIONS}"
        )


def permutation(count: int, seed: int) -> np.ndarray:
    """A seeded uniform permutation of range(count), int64 (count,).

    The ranks of `count` raw 64-bit draws of PCG64. numpy promises that the stream of a bit
    generator stays as it is, but not `Generator.permutation`: a run that is resumed under another
    numpy must find the same order. (A tie among the draws, at one chance in 10^7 for a million
    images, is broken by position.)
    """
    draws = np.random.PCG64(seed).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int64, copy=False)


def open_folder(data: str, root: str) -> Source:
    """The images of a folder, at any depth, in the order of their paths.

    Raises NoImages; UsageError where a folder in it cannot be read.
    """
    paths: list[str] = []
    others: Counter[str] = Counter()
    digest = begin_fingerprint("folder")
    for path, size in _walk(root, others):
        paths.append(path)
        add_to_fingerprint(digest, storable(path), size)
    if not paths:
        raise NoImages(data, others)
    labels, classes = class_folders(paths)
    notes = []
    if others[".tar"]:
        notes.append(f"{data}: {others['.tar']} .tar files beside the images are left out")

    def read(index: int) -> bytes:
        with open(os.path.join(root, paths[index]), "rb") as file:
            return file.read()

    return Source(
        name=data,
        count=len(paths),
        fingerprint=digest.hexdigest(),
        labels=labels,
        classes=classes,
        warnings=notes,
        key_of=lambda index: storable(paths[index]),
        reader=read,
    )


def _walk(root: str, others: Counter[str]) -> Iterator[tuple[str, int]]:
    """(path below root with /, size) of each image, in the order of the paths.

    Links are followed, but not to a folder that one is in already. A link to nothing is given,
    with size -1, so that it shows up among the unusable images. `others` counts what is no image.
    The pictures of a ranking or a pretraining that lies in here are none of the data.
    """

    def entries_of(folder: str) -> list[tuple[str, os.DirEntry[str], bool]]:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
        found = [(entry.name, entry, entry.is_dir()) for entry in visible]
        # With its "/", a folder sorts among its siblings as the paths below it do.
        found.sort(key=lambda item: item[0] + "/" if item[2] else item[0])
        return found

    def identity(folder: str) -> tuple[int, int]:
        status = os.stat(folder)
        return status.st_dev, status.st_ino

    above = [identity(root)]
    stack = [("", iter(entries_of(root)))]
    while stack:
        prefix, entries = stack[-1]
        for name, entry, is_folder in entries:
            if is_folder:
                try:
                    inside = identity(entry.path)
                    if inside in above:
                        continue
                    below = entries_of(entry.path)
                    if not _is_run({name for name, _, _ in below}):
                        stack.append((prefix + name + "/", iter(below)))
                        above.append(inside)
                except OSError as error:
                    raise UsageError(
                        f"{entry.path!r} cannot be read: {os.strerror(error.errno or 0)}; "
                        f"allow it or move it out of DATA"
                    ) from error
                if stack[-1][1] is not entries:
                    break
                continue
            extension = os.path.splitext(name)[1].lower()
            if extension not in IS_IMAGE:
                others[extension] += 1
            elif entry.is_file():
                yield prefix + name, entry.stat().st_size
            elif entry.is_symlink():
                yield prefix + name, -1
        else:
            stack.pop()
            above.pop()


def _is_run(names: set[str]) -> bool:
    """Whether a folder of such files is a RUN of `tokdiv rank` or an OUT of `img2vec pretrain`."""
    return "config.json" in names and bool(names & {"state", "ranking.json", "checkpoints"})


def class_folders(paths: list[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels by the first folder of each path, where every image lies in one."""
    if any("/" not in path for path in paths):
        return None, None
    names = sorted({path[: path.index("/")] for path in paths})
    number = {name: index for index, name in enumerate(names)}
    labels = np.fromiter((number[path[: path.index("/")]] for path in paths), np.int64, len(paths))
    return labels, [storable(name) for name in names]


def shuffled(samples: Iterator[tuple[str, Item]], seed: int) -> Iterator[tuple[str, Item]]:
    """A stream through a buffer: each image drawn from it makes room for the next."""
    bits = np.random.PCG64([seed, 1])
    buffer: list[tuple[str, Item]] = []
    num_bytes = 0
    for sample in samples:
        buffer.append(sample)
        num_bytes += _num_bytes(sample[1])
        while len(buffer) > BUFFER_IMAGES or (num_bytes > BUFFER_BYTES and len(buffer) > 1):
            drawn = _draw(buffer, bits)
            num_bytes -= _num_bytes(drawn[1])
            yield drawn
    while buffer:
        yield _draw(buffer, bits)


def _draw(buffer: list[tuple[str, Item]], bits: np.random.PCG64) -> tuple[str, Item]:
    place = int(bits.random_raw()) % len(buffer)  # raw draws: see `permutation`
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()


def _num_bytes(item: Item) -> int:
    if isinstance(item, Image.Image):
        return item.width * item.height * len(item.getbands())
    return len(item)


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
