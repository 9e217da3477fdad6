"""A folder of images as a Source."""

import os
from collections import Counter
from collections.abc import Iterator

import numpy as np

from tokdiv.data.source import Source, add_to_fingerprint, begin_fingerprint, storable
from tokdiv.errors import UsageError

EXTENSIONS = ".bmp .gif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp"

IS_IMAGE = frozenset(EXTENSIONS.split())


class NoImages(UsageError):
    """Nothing with the extension of an image was found where images were looked for."""

    def __init__(self, data: str, others: Counter[str]) -> None:
        found = ", ".join(f"{n} {ext or 'without extension'}" for ext, n in others.most_common(4))
        super().__init__(
            f"{data!r} holds no images: found {found or 'nothing'}; looked for {EXTENSIONS}"
        )


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
