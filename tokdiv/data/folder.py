"""A folder of images as a Source."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tokdiv.data.decode import image_extensions, unread_extensions
from tokdiv.data.source import (
    Item,
    Source,
    add_to_fingerprint,
    begin_fingerprint,
    read_file,
    storable,
)
from tokdiv.errors import UsageError


class NoImages(UsageError):
    """Nothing with the extension of an image was found where images were looked for."""

    def __init__(self, data: str, others: Counter[str]) -> None:
        found = ", ".join(f"{n} {ext or 'without extension'}" for ext, n in others.most_common(4))
        remedy = "".join(f"; {note}" for note in unread_images(others))
        if others[".tar"]:
            remedy += "; unpack the .tar files in it, or name the folder that holds them alone"
        super().__init__(
            f"{data!r} holds no images: found {found or 'nothing'}; looked for "
            f"{' '.join(sorted(image_extensions()))}{remedy}"
        )


def unread_images(others: Counter[str]) -> list[str]:
    """What to do about files, counted by extension, that are images but cannot be read: a line for each kind."""
    return [
        f"{others[ext]} {ext} {'file is' if others[ext] == 1 else 'files are'} left out: {remedy}"
        for ext, remedy in unread_extensions().items()
        if others[ext]
    ]


def open_folder(data: str, root: str) -> Source:
    """The images of a folder, at any depth, in the order of their paths.

    Raises NoImages; UsageError where a folder in it cannot be read.
    """
    paths: list[str] = []
    left_out = _LeftOut()
    digest = begin_fingerprint("folder")
    for path, size in _walk(root, left_out):
        paths.append(path)
        add_to_fingerprint(digest, storable(path), size)
    if not paths:
        raise NoImages(data, left_out.extensions)
    labels, classes = class_folders(paths)

    def read(index: int) -> Item:
        return read_file(os.path.join(root, paths[index]))

    return Source(
        name=data,
        count=len(paths),
        fingerprint=digest.hexdigest(),
        labels=labels,
        classes=classes,
        warnings=[f"{data}: {note}" for note in left_out.notes()],
        key_of=lambda index: storable(paths[index]),
        reader=read,
    )


@dataclass
class _LeftOut:
    """What a walk left out.

    extensions: of files that are no images. runs: folders of earlier runs.
    links: links to folders that are read anyway. special: FIFOs, sockets and devices.
    """

    extensions: Counter[str] = field(default_factory=Counter)
    runs: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        notes = unread_images(self.extensions)
        if count := self.extensions[".tar"]:
            notes.append(f"{count} .tar files beside the images are left out")
        for paths, what in (
            (self.runs, "folders of earlier runs are left out"),
            (self.links, "links to folders that are read anyway are left out"),
            (self.special, "FIFOs, sockets or devices are left out"),
        ):
            if paths:
                notes.append(f"{len(paths)} {what}, as {storable(paths[0])!r}")
        return notes


def _walk(root: str, left_out: _LeftOut) -> Iterator[tuple[str, int]]:
    """(path below root with /, size) of each image, in the order of the paths.

    Links are followed, but each folder is read once. A link to nothing or to itself is given, with size -1,
    so that it shows up among the unusable images.
    """
    inside = os.path.realpath(root)
    seen = {_identity(root)}
    stack = [("", iter(_entries(root)))]
    while stack:
        prefix, entries = stack[-1]
        for name, entry, is_folder in entries:
            path = prefix + name
            if not is_folder:
                if (size := _size_of_image(entry, path, left_out)) is not None:
                    yield path, size
                continue
            try:
                identity = _identity(entry.path)
                if _is_run(entry.path):
                    left_out.runs.append(path)
                elif identity in seen or (entry.is_symlink() and _is_walked(entry.path, inside)):
                    left_out.links.append(path)
                else:
                    seen.add(identity)
                    stack.append((path + "/", iter(_entries(entry.path))))
                    break
            except OSError as error:
                raise UsageError(
                    f"{entry.path!r} cannot be read: {os.strerror(error.errno or 0)}; "
                    f"allow it or move it out of DATA"
                ) from error
        else:
            stack.pop()


def _entries(folder: str) -> list[tuple[str, os.DirEntry[str], bool]]:
    """(name, entry, is it a folder) of what is not hidden, in the order in which paths sort."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    found = [(entry.name, entry, _is_folder(entry)) for entry in visible]
    # With its "/", a folder sorts among its siblings as the paths below it do.
    return sorted(found, key=lambda item: item[0] + "/" if item[2] else item[0])


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be read
        return False


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_walked(link: str, root: str) -> bool:
    """Whether a link leads to a folder below root that the walk comes to itself."""
    inner = os.path.relpath(os.path.realpath(link), root)
    return not any(part.startswith(".") for part in inner.split(os.sep) if inner != ".")


def _size_of_image(entry: os.DirEntry[str], path: str, left_out: _LeftOut) -> int | None:
    """The size of a file that looks like an image, -1 of a link that leads nowhere; None of everything else."""
    extension = os.path.splitext(entry.name)[1].lower()
    if extension not in image_extensions():
        left_out.extensions[extension] += 1
        return None
    try:
        status = entry.stat()
    except OSError:
        return -1
    if not stat.S_ISREG(status.st_mode):
        left_out.special.append(path)
        return None
    return status.st_size


def _is_run(folder: str) -> bool:
    """Whether a folder is a RUN, OUT or RACE: its pictures are no data."""
    config = Path(folder, "config.json")
    try:
        if config.stat().st_size > 2**24:
            return False
        content = json.loads(config.read_bytes())
        return isinstance(content["data"]["fingerprint"], str) and "versions" in content
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def class_folders(paths: list[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels by the first folder of each path, where every image lies in one."""
    if any("/" not in path for path in paths):
        return None, None
    names = sorted({path[: path.index("/")] for path in paths})
    number = {name: index for index, name in enumerate(names)}
    labels = np.fromiter((number[path[: path.index("/")]] for path in paths), np.int64, len(paths))
    return labels, [storable(name) for name in names]
