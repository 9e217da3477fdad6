"""Images in .tar files as a Source: an index over their members, so that any image is one read away."""

import json
import os
from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from tokdiv.data.decode import image_extensions
from tokdiv.data.folder import NoImages, class_folders, unread_images
from tokdiv.data.members import DamagedTar, Member, NotATar, Tar, is_compressed
from tokdiv.data.source import (
    Item,
    Source,
    add_to_fingerprint,
    begin_fingerprint,
    check_encoded,
    storable,
    unique,
)
from tokdiv.errors import UsageError

MAX_LABEL_BYTES = 2**16  # of a .cls or .json
MAX_DOTS = 64  # of a file's name, as far as labels are concerned
NO_LABEL = -(2**63)
LABELS = (".cls", ".json")


def open_tars(data: str, paths: list[str]) -> Source:
    """Tars, indexed by the offsets of their members.

    Keys are the members' names, with several tars `shard.tar/member`. Labels come from the .cls or .json
    beside each image (WebDataset's convention), else from folders.

    Raises UsageError: compressed, no tar, no complete member; NoImages.
    """
    index = _Index()
    for shard, path in zip(unique(os.path.basename(path) for path in paths), paths):
        prefix = f"{shard}/" if len(paths) > 1 else ""
        index.add(path, prefix)
    if not index.names:
        raise NoImages(data, index.others)
    keys = unique(storable(name) for name in index.names)
    digest = begin_fingerprint("tar")
    for key, size in zip(keys, index.sizes):
        add_to_fingerprint(digest, key, size)
    labels, classes = index.labels_and_classes(len(paths) > 1)

    def read(number: int) -> Item:
        check_encoded(index.sizes[number])
        # Opened each time: a handle for each of thousands of shards would exceed the limit.
        with open(paths[index.shards[number]], "rb", buffering=0) as file:
            return _read_at(file.fileno(), index.offsets[number], index.sizes[number])

    return Source(
        name=data,
        count=len(keys),
        fingerprint=digest.hexdigest(),
        labels=labels,
        classes=classes,
        warnings=index.notes + [f"{data}: {note}" for note in index.left_out()],
        key_of=lambda number: keys[number],
        reader=read,
    )


def _read_at(handle: int, offset: int, size: int) -> bytes:
    parts = []
    while size > 0:
        part = os.pread(handle, size, offset)
        if not part:
            raise OSError("the tar ends before the image does")
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


@dataclass
class _Index:
    """The images of some tars.

    names, shards, offsets, sizes, labels: of the images. Arrays, not lists of integers: an index of a million
        images stays below 200 MB.
    others: counts of other files by extension. notes: what is wrong with a tar.
    num_shards, num_parts, num_links: tars read, and images left out.
    """

    names: list[str] = field(default_factory=list)
    shards: "array[int]" = field(default_factory=lambda: array("i"))
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    labels: "array[int]" = field(default_factory=lambda: array("q"))
    others: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    num_shards: int = 0
    num_parts: int = 0
    num_links: int = 0

    def add(self, path: str, prefix: str) -> None:
        """Add the images of a tar, with `prefix` before their names."""
        begin, num_files, damage = len(self.names), 0, None
        links: list[Member] = []
        labels = _Labels()
        try:
            if is_compressed(path):
                raise UsageError(
                    f"{path!r} is compressed, which allows no random access: unpack it to a .tar or a folder "
                    f"first (images hardly shrink)"
                )
            with open(path, "rb") as file:
                tar = Tar(file, os.path.getsize(path))
                for member in tar.members():
                    num_files += member.kind == "file"
                    extension = os.path.splitext(member.name)[1].lower()
                    if is_hidden(member.name):
                        continue
                    if extension not in image_extensions():
                        self.others[extension] += member.kind == "file"
                        if extension in LABELS and member.size < MAX_LABEL_BYTES:
                            labels.add(member.name, tar.read(member.size))
                    elif member.kind == "file":
                        self._append(prefix + member.name, member.offset, member.size)
                    else:
                        links.append(member)
        except NotATar:
            raise UsageError(
                f"{path!r} is no .tar of images (DATA is a folder of images, a .tar, shards or a scheme)"
            ) from None
        except DamagedTar as error:
            damage = str(error)
        except OSError as error:
            raise UsageError(f"{path!r} cannot be read: {os.strerror(error.errno or 0)}") from error
        if damage is not None:
            if not num_files:
                raise UsageError(
                    f"{path!r} {damage} before its first complete file: fetch it again"
                )
            self.notes.append(f"{path} {damage} after {num_files} files; those before are used")
        self._add_links(links, begin, prefix)
        self._remove_parts(begin)
        self.labels.extend(labels.of(name.removeprefix(prefix)) for name in self.names[begin:])
        self.shards.extend([self.num_shards] * (len(self.names) - begin))
        self.num_shards += 1

    def _append(self, name: str, offset: int, size: int) -> None:
        self.names.append(name)
        self.offsets.append(offset)
        self.sizes.append(size)

    def _add_links(self, links: list[Member], begin: int, prefix: str) -> None:
        """Add the hard links to images of this tar: other names of them."""
        numbers = {self.names[n]: n for n in range(begin, len(self.names))} if links else {}
        for member in links:
            number = numbers.get(prefix + member.link, -1) if member.kind == "link" else -1
            if number < 0:
                self.num_links += 1
            else:
                self._append(prefix + member.name, self.offsets[number], self.sizes[number])

    def _remove_parts(self, begin: int) -> None:
        """Leave out the images that accompany another one of their sample."""
        names = self.names[begin:]
        if not any(map(is_part, names)):
            return
        samples = {sample_of(name) for name in names if stem_of(name) == sample_of(name)}
        kept = [
            n for n, name in enumerate(names) if not (is_part(name) and sample_of(name) in samples)
        ]
        self.num_parts += len(names) - len(kept)
        self.names[begin:] = [names[n] for n in kept]
        for column in (self.offsets, self.sizes):
            column[begin:] = array(column.typecode, [column[begin + n] for n in kept])

    def labels_and_classes(self, sharded: bool) -> tuple[np.ndarray | None, list[str] | None]:
        """Labels from .cls or .json beside every image, else from folders below what all share."""
        numbers = np.array(self.labels, np.int64)
        num_missing = int((numbers == NO_LABEL).sum())
        if not num_missing:
            return numbers, None
        if num_missing < len(numbers):
            self.notes.append(
                f"{num_missing} of {len(numbers)} images have no class number in a .cls or .json beside them: "
                f"these numbers are not used"
            )
        inner = [name.partition("/")[2] for name in self.names] if sharded else self.names
        shared = os.path.commonpath({os.path.dirname(name) for name in inner})
        return class_folders([name[len(shared) :].lstrip("/") for name in inner])

    def left_out(self) -> list[str]:
        """A line for each kind of image that is left out."""
        notes = unread_images(self.others)
        if count := self.others[".tar"]:
            notes.append(f"{count} .tar files inside are left out: unpack them")
        if self.num_parts:
            notes.append(
                f"{self.num_parts} images that accompany another one of their sample, as 7.seg.png does 7.png, "
                f"are left out"
            )
        if self.num_links:
            notes.append(
                f"{self.num_links} members with names of images that are links, devices or sparse files are "
                f"left out"
            )
        return notes


@dataclass
class _Labels:
    """The class numbers in the .cls and .json files of one tar.

    found: for each extension, class numbers by stem; of equal names, the second's by stem + "\\0" + "2".
    repeated: how often a label's name came again. given: how often an image's name came, where some did.
    """

    found: dict[str, dict[str, int]] = field(default_factory=lambda: {name: {} for name in LABELS})
    repeated: Counter[str] = field(default_factory=Counter)
    given: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, content: bytes) -> None:
        stem, extension = os.path.splitext(name)
        labels = self.found[extension.lower()]
        if stem in labels:
            self.repeated[name] += 1
            stem = f"{stem}\0{self.repeated[name] + 1}"
        labels[stem] = parse_label(content, extension.lower())

    def of(self, name: str) -> int:
        """The number for an image: of the label with the longest name that its own begins with, .cls first.

        The second image of a name has the second label of that name, and so on. Called once an image.
        """
        nth = ""
        if self.repeated:
            self.given[name] += 1
            nth = f"\0{self.given[name]}" if self.given[name] > 1 else ""
        folder, slash, file = name.rpartition("/")
        parts = file.split(".")[:MAX_DOTS]
        for length in range(len(parts) - 1, 0, -1):
            stem = folder + slash + ".".join(parts[:length])
            for labels in self.found.values():
                number = labels.get(stem + nth, labels.get(stem, NO_LABEL))
                if number != NO_LABEL:
                    return number
        return NO_LABEL


def parse_label(content: bytes, extension: str) -> int:
    """The class number in a .cls, or under "label", "cls" or "class" in a .json; else NO_LABEL."""
    try:
        if extension == ".cls":
            values = [int(content)]
        else:
            fields = json.loads(content)
            values = [fields.get(name) for name in ("label", "cls", "class")]
    except (ValueError, AttributeError, RecursionError):
        return NO_LABEL
    integers = (v for v in values if isinstance(v, int) and not isinstance(v, bool))
    return next((v for v in integers if -(2**63) < v < 2**63), NO_LABEL)


def is_hidden(name: str) -> bool:
    return os.path.basename(name).startswith(".")


def stem_of(name: str) -> str:
    """A path without its extension."""
    return os.path.splitext(name)[0]


def sample_of(name: str) -> str:
    """What the files of one WebDataset sample share: the path up to the first dot of its name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def is_part(name: str) -> bool:
    """Whether an image may accompany another one of its sample, as 7.seg.png does 7.png.

    A number between the dots, as in cat.0.jpg, makes an image of its own.
    """
    return any(sign.isalpha() for sign in stem_of(name)[len(sample_of(name)) :])
