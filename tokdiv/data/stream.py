"""Shards read from front to back: WebDataset streams, and the shuffle buffer of every stream."""

import itertools
import json
import os
import re
import tarfile
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tokdiv.data.folder import IS_IMAGE
from tokdiv.data.source import (
    Item,
    Source,
    add_to_fingerprint,
    begin_fingerprint,
    first_line,
    permutation,
    storable,
    unique,
)
from tokdiv.data.tar import (
    _NO_LABEL,
    COMPRESSED,
    _damage_at_end,
    _forget_members,
    _member_name,
    _parse_label,
    _stem,
)
from tokdiv.errors import RunError, UsageError

TIMEOUT = 60  # seconds without a byte of a shard

# How many labels of a shard are looked at to tell whether it is sorted by class.
_LABELS_LOOKED_AT = 2_000


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


# The shuffle buffer --------------------------------------------------------------------------------

# The shuffle buffer of a stream holds this many images, or fewer once their bytes reach the limit.
BUFFER_IMAGES = 10_000

BUFFER_BYTES = 256 * 2**20


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
