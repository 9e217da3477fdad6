"""Images in .tar files: indexed, so that any is one read away, or streamed shard after shard."""

import json
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokdiv.data.folder import IS_IMAGE, NoImages, class_folders
from tokdiv.data.source import Source, add_to_fingerprint, begin_fingerprint, storable, unique
from tokdiv.errors import UsageError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

_NO_LABEL = -(2**63)


def open_tars(data: str, paths: list[str]) -> Source:
    """Tars, indexed by the offsets of their members, so that any image is one read away.

    Keys are the members' names, with several tars `shard.tar/member`. Labels come from the .cls or
    .json beside each image (WebDataset's convention), else from folders.

    Raises UsageError: compressed, no tar, nothing whole in it; NoImages.
    """
    names: list[str] = []
    # Arrays, not lists of integers: an index of a million images stays below 200 MB.
    shard_of, offsets, sizes, labels = array("i"), array("q"), array("q"), array("q")
    notes: list[str] = []
    others: Counter[str] = Counter()
    digest = begin_fingerprint("tar")
    for number, shard in enumerate(unique(os.path.basename(path) for path in paths)):
        _refuse_compressed(paths[number])
        prefix = f"{shard}/" if len(paths) > 1 else ""
        begin, links = len(names), []
        waiting: dict[str, int] = {}
        for member in _index_tar(paths[number], notes):
            extension = os.path.splitext(member.name)[1].lower()
            stem = prefix + _stem(member.name)
            again = len(names) > begin and _stem(names[-1]) == stem
            if extension in (".cls", ".json"):
                label = _parse_label(member.content, extension)
                if not again:
                    if waiting.get(stem, _NO_LABEL) == _NO_LABEL or extension == ".cls":
                        waiting[stem] = label  # its image is still to come
                elif labels[-1] == _NO_LABEL or extension == ".cls":
                    for at in range(len(names) - 1, begin - 1, -1):
                        if _stem(names[at]) != stem:
                            break
                        labels[at] = label
            if extension not in IS_IMAGE:
                others[extension] += 1
            elif member.link is not None:
                links.append(member)
            else:
                labels.append(waiting.pop(stem, labels[-1] if again else _NO_LABEL))
                names.append(prefix + member.name)
                shard_of.append(number)
                offsets.append(member.offset)
                sizes.append(member.size)
        if links:  # another name of a file that came before
            places = {names[at]: at for at in range(begin, len(names))}
            for member in links:
                if (at := places.get(f"{prefix}{member.link}", -1)) >= 0:
                    names.append(prefix + member.name)
                    for column in (shard_of, offsets, sizes, labels):
                        column.append(column[at])
    if not names:
        raise NoImages(data, others)
    keys = unique(storable(name) for name in names)
    for key, size in zip(keys, sizes):
        add_to_fingerprint(digest, key, size)
    numbers, classes = _labels_of_tar(names, labels, len(paths) > 1)

    def read(index: int) -> bytes:
        # Opened each time: a handle for each of thousands of shards would exceed the limit.
        with open(paths[shard_of[index]], "rb", buffering=0) as file:
            return _read_at(file.fileno(), offsets[index], sizes[index])

    return Source(
        name=data,
        count=len(keys),
        fingerprint=digest.hexdigest(),
        labels=numbers,
        classes=classes,
        warnings=notes,
        key_of=lambda index: keys[index],
        reader=read,
    )


def _refuse_compressed(path: str) -> None:
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except OSError as error:
        raise UsageError(f"{path!r} cannot be read: {os.strerror(error.errno or 0)}") from error
    if path.lower().endswith(COMPRESSED) or start[:2] == b"\x1f\x8b":
        raise UsageError(
            f"{path!r} is compressed, which allows no random access: unpack it to a .tar or a "
            f"folder first (images hardly shrink)"
        )


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int
    link: str | None = None  # for a hard link, the name of its file
    content: bytes = b""  # of a .cls or .json


def _index_tar(path: str, notes: list[str]) -> Iterator[_Member]:
    """The regular files and hard links of a tar, by a walk over its headers.

    A damaged tar gives the members before the damage, and a note.
    """
    num_bytes = os.path.getsize(path)
    num_members, damage = 0, None
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                while (info := tar.next()) is not None:
                    _forget_members(tar)
                    name = _member_name(info.name)
                    if os.path.basename(name).startswith("."):
                        continue
                    if info.islnk():
                        yield _Member(name, 0, 0, link=_member_name(info.linkname))
                    elif info.isreg() and info.sparse is None:
                        if info.offset_data + info.size > num_bytes:
                            damage = "is cut off"
                            break
                        content = b""
                        if name.endswith((".cls", ".json")) and info.size < 65536:
                            file = tar.extractfile(info)
                            assert file is not None
                            content = file.read()
                        num_members += 1
                        yield _Member(name, info.offset_data, info.size, content=content)
            except (tarfile.TarError, EOFError):
                damage = "is damaged"
            if damage is None:
                damage = _damage_at_end(path, tar.offset)
    except tarfile.TarError:
        raise UsageError(
            f"{path!r} is no .tar of images (DATA is a folder of images, a .tar, shards or a scheme)"
        ) from None
    except OSError as error:
        raise UsageError(f"{path!r} cannot be read: {os.strerror(error.errno or 0)}") from error
    if damage is not None:
        if not num_members:
            raise UsageError(f"{path!r} {damage} before its first whole file: fetch it again")
        notes.append(f"{path} {damage} after {num_members} files; those before are used")


def _forget_members(tar: Any) -> None:
    """Drop the headers that tarfile keeps, at a kilobyte each."""
    tar.members = []


def _damage_at_end(path: str, offset: int) -> str | None:
    """What is wrong where a tar's walk ended: it must end in a block of zeros."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(512)
    if len(block) < 512:
        return "has no end mark and may be cut off"
    return "is damaged" if any(block) else None


def _read_at(handle: int, offset: int, size: int) -> bytes:
    parts = []
    while size > 0:
        part = os.pread(handle, size, offset)
        if not part:
            raise OSError("the tar ends before the image does")
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _member_name(name: str) -> str:
    return name.removeprefix("./").lstrip("/")


def _stem(name: str) -> str:
    """What the files of one WebDataset sample share: the path up to the first dot of its name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _parse_label(content: bytes, extension: str) -> int:
    """The class number in a .cls, or under "label", "cls" or "class" in a .json; else _NO_LABEL."""
    try:
        if extension == ".cls":
            return int(content)
        fields = json.loads(content)
        values = [fields.get(name) for name in ("label", "cls", "class")]
    except (ValueError, AttributeError):
        return _NO_LABEL
    numbers = (v for v in values if isinstance(v, int) and not isinstance(v, bool))
    return next(numbers, _NO_LABEL)


def _labels_of_tar(
    names: list[str], labels: "array[int]", sharded: bool
) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels from .cls or .json beside every image, else from folders below what all share."""
    numbers = np.array(labels, np.int64)
    if not (numbers == _NO_LABEL).any():
        return numbers, None
    inner = [name.partition("/")[2] for name in names] if sharded else names
    shared = os.path.commonpath({os.path.dirname(name) for name in inner})
    return class_folders([name[len(shared) :].lstrip("/") for name in inner])
