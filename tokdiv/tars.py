"""Images in .tar files: indexed, so that any is one read away, or streamed shard after shard."""

import itertools
import json
import os
import re
import tarfile
import urllib.request
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokdiv.errors import RunError, UsageError
from tokdiv.sources import (
    IS_IMAGE,
    Item,
    NoImages,
    Source,
    add_to_fingerprint,
    begin_fingerprint,
    class_folders,
    first_line,
    permutation,
    shuffled,
    storable,
    unique,
)

TIMEOUT = 60  # seconds without a byte of a shard

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

# How many labels of a shard are looked at to tell whether it is sorted by class.
_LABELS_LOOKED_AT = 2_000

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


# Streams -----------------------------------------------------------------------------------------


def open_shard_stream(data: str, rest: str, options: dict[str, str]) -> Source:
    """`wds/SHARDS`: tars read from front to back, shuffled by shards and through a buffer."""
    shards = _expand_braces(rest)
    remote = any("://" in shard for shard in shards)
    count: int | None = None
    _check_schemes(data, shards)
    if not remote:
        root = os.path.expanduser(rest)
        if os.path.isdir(root):
            shards, count = _shards_of_folder(data, root, options)
        else:
            shards = expand_shards(root)
        missing = [shard for shard in shards if not os.path.isfile(shard)]
        if missing or not shards:
            what = f"no such shard: {missing[0]!r}" if missing else "no .tar files"
            raise UsageError(
                f"{data!r}: {what} (expected a folder of .tar files or a brace pattern)"
            )
    names = unique(os.path.basename(shard) for shard in shards)
    digest = begin_fingerprint("shards")
    for name, shard in zip(names, shards):
        add_to_fingerprint(digest, storable(name), -1 if remote else os.path.getsize(shard))
    notes: list[str] = []
    if not remote and _class_sorted(shards):
        notes.append(
            f"{data}: class-sorted shards: a part of the stream is no fair sample of the whole; "
            f"shuffle the images before sharding, or read them by index (without wds/)"
        )

    def samples(seed: int) -> Iterator[tuple[str, Item]]:
        ordered = ((names[i], shards[i]) for i in permutation(len(shards), seed))
        return shuffled(_read_shards(ordered, notes), seed)

    return Source(
        name=data,
        count=count,
        fingerprint=digest.hexdigest(),
        permutable=False,
        warnings=notes,
        open_stream=samples,
    )


def _shards_of_folder(
    data: str, root: str, options: dict[str, str]
) -> tuple[list[str], int | None]:
    """The .tar files of a folder, or those that its _info.json gives for the split."""
    for name in ("_info.json", "info.json"):
        path = os.path.join(root, name)
        if not os.path.isfile(path):
            continue
        try:
            with open(path, encoding="utf-8") as file:
                splits = json.load(file)["splits"]
            split = options.get("split", "train")
            if split not in splits:
                raise UsageError(f"{data!r}: no split {split!r}; {name} has {', '.join(splits)}")
            shards = [os.path.join(root, shard) for shard in splits[split]["filenames"]]
            return shards, int(splits[split]["num_samples"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{data!r}: {name} does not list splits with filenames") from error
    if "split" in options:
        raise UsageError(
            f"{data!r}: split= needs an _info.json in {root!r}, which lists the splits"
        )
    return shards_in(root), None


def shards_in(root: str) -> list[str]:
    """The .tar files (compressed ones too) that lie in a folder, by name."""
    with os.scandir(root) as entries:
        return sorted(
            entry.path
            for entry in entries
            if not entry.name.startswith(".") and entry.name.lower().endswith((".tar", *COMPRESSED))
        )


def _read_shards(
    shards: Iterable[tuple[str, str]], notes: list[str]
) -> Iterator[tuple[str, bytes]]:
    """(shard/member, bytes) of the first image of each sample, shard after shard.

    What is left of a damaged shard is skipped, with a note.
    """
    total = 0
    for shard, path in shards:
        num_read, damage, seen = 0, None, Counter[str]()
        try:
            with _open_shard(path) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
                last = None
                for info in tar:
                    _forget_members(tar)
                    name = _member_name(info.name)
                    if not info.isreg() or os.path.basename(name).startswith("."):
                        continue
                    stem = _stem(name)
                    if os.path.splitext(name)[1].lower() not in IS_IMAGE or stem == last:
                        continue
                    member = tar.extractfile(info)
                    assert member is not None
                    content = member.read()
                    if len(content) < info.size:
                        raise tarfile.ReadError("unexpected end of data")
                    last = stem
                    seen[name] += 1
                    again = f"#{seen[name]}" if seen[name] > 1 else ""
                    num_read += 1
                    yield f"{shard}/{storable(name)}{again}", content
                if path.endswith(".tar") and "://" not in path:
                    damage = _damage_at_end(path, tar.offset)
        except (tarfile.TarError, EOFError, OSError) as error:
            damage = f"is damaged: {first_line(error)}"
        total += num_read
        note = f"{shard} {damage} (after {num_read} images; the rest of it is left out)"
        if damage is not None and note not in notes:
            notes.append(note)
    if not total:
        raise RunError(f"no image in any shard: {'; '.join(notes[:1]) or 'they hold no images'}")


def _open_shard(path: str) -> Any:
    if "://" not in path:
        return open(path, "rb")
    return urllib.request.urlopen(path, timeout=TIMEOUT)


def _check_schemes(data: str, shards: Iterable[str]) -> None:
    """Shards are files, or come over http and https: nothing that runs a command, as pipe: would.

    Args:
        shards: after brace expansion, which can put a scheme together.

    Raises:
        UsageError: another scheme.
    """
    for shard in shards:
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", shard)
        if "|" in shard or (scheme and scheme[1].lower() == "pipe"):
            raise UsageError(pipe_refused(data))
        if "://" not in shard and any("://" in other for other in shards):
            raise UsageError(f"{data!r}: some shards are URLs and some are files: give one kind")
        if "://" in shard and (not scheme or scheme[1].lower() not in ("http", "https")):
            raise UsageError(
                f"{data!r}: shards are read from files, http:// and https://, not from {shard!r}; "
                f"mount them, or give their https URLs"
            )


def _class_sorted(shards: list[str]) -> bool:
    """Whether the shards look sorted by class: one class a shard, or classes in order within it.

    Labels are those of .cls and .json members, else the members' folders.
    """
    first = _labels_of_shard(shards[0])
    if len(first) < 16:
        return False
    if len(set(first)) == 1:
        last = _labels_of_shard(shards[-1])
        return len(set(last)) == 1 and last[0] != first[0]
    runs = 1 + sum(a != b for a, b in itertools.pairwise(first))
    return runs == len(set(first)) and 2 * runs <= len(first)


def _labels_of_shard(path: str) -> list[Any]:
    numbers: list[Any] = []
    folders: list[Any] = []
    try:
        with tarfile.open(path, "r:*") as tar:
            for info in itertools.islice(tar, 3 * _LABELS_LOOKED_AT):
                _forget_members(tar)
                extension = os.path.splitext(info.name)[1].lower()
                if extension in (".cls", ".json") and info.isreg() and info.size < 65536:
                    member = tar.extractfile(info)
                    assert member is not None
                    if (label := _parse_label(member.read(), extension)) != _NO_LABEL:
                        numbers.append(label)
                elif extension in IS_IMAGE:
                    folders.append(os.path.dirname(info.name))
    except (tarfile.TarError, EOFError, OSError):
        pass  # reading the shard itself will tell
    return numbers or folders


def pipe_refused(data: str) -> str:
    return f"{data!r}: pipe: runs a shell command, which DATA may not; save the shards or give their URLs"


def expand_shards(path: str) -> list[str]:
    """The paths that a brace pattern or a wildcard for .tar files stands for; else the path."""
    if not path.lower().endswith((".tar", *COMPRESSED)):
        return [path]
    if any(sign in path for sign in "*?") and "{" not in path:
        import glob

        return sorted(glob.glob(path))
    return _expand_braces(path)


MAX_SHARDS = 1_000_000


def _expand_braces(pattern: str) -> list[str]:
    """`a-{08..11}.tar` and `{a,b}.tar` as the shell has them, numbers padded alike.

    Raises:
        UsageError: more than a million shards.
    """
    patterns = [pattern]
    while any(choices := [_first_choices(text) for text in patterns]):
        if sum(len(found) or 1 for found in choices) > MAX_SHARDS:
            raise UsageError(f"{pattern!r} stands for more than {MAX_SHARDS:,} shards")
        patterns = [
            full for text, found in zip(patterns, choices) for full in (list(found) or [text])
        ]
    return patterns


def _first_choices(pattern: str) -> Sequence[str]:
    """What the first brace of a pattern stands for, the rest left as it is; empty without one."""
    for match in re.finditer(r"\{([^{}]*)\}", pattern):
        body, before, after = match[1], pattern[: match.start()], pattern[match.end() :]
        if numbers := re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", body):
            first, last = numbers.groups()
            if int(last) - int(first) >= MAX_SHARDS:
                raise UsageError(f"{pattern!r} stands for more than {MAX_SHARDS:,} shards")
            padded = first.startswith("0") or last.startswith("0")
            width = max(len(first), len(last)) if padded else 0
            choices = [str(n).zfill(width) for n in range(int(first), int(last) + 1)]
        elif "," in body:
            choices = body.split(",")
        else:
            continue
        return [before + choice + after for choice in choices]
    return ()
