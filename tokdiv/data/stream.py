"""Shards read from front to back: WebDataset streams, and the shuffle buffer of every stream."""

import itertools
import os
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from tokdiv.data.decode import UnusableImage, image_extensions
from tokdiv.data.folder import unread_images
from tokdiv.data.members import DamagedTar, Tar, decompressed
from tokdiv.data.shards import find_shards
from tokdiv.data.source import (
    Item,
    Source,
    add_to_fingerprint,
    begin_fingerprint,
    check_encoded,
    permutation,
    storable,
    unique,
)
from tokdiv.data.tar import (
    LABELS,
    MAX_LABEL_BYTES,
    NO_LABEL,
    is_hidden,
    is_part,
    parse_label,
    sample_of,
    stem_of,
)
from tokdiv.errors import RunError, first_line

TIMEOUT = 60  # seconds without a byte of a shard
MAX_FAILED_SHARDS = 3  # that one after the other cannot be fetched, before the run ends
MAX_SAMPLE_IMAGES = (
    64  # images that share a name up to its first dot: more are not parts of one sample
)

# How many labels of a shard are looked at to tell whether it is sorted by class.
LABELS_LOOKED_AT = 2_000


def open_shard_stream(data: str, rest: str, options: dict[str, str]) -> Source:
    """`wds/SHARDS`: tars read from front to back, shuffled by shards and through a buffer."""
    shards, count, remote = find_shards(data, rest, options)
    names = unique(os.path.basename(shard) for shard in shards)
    digest = begin_fingerprint("shards")
    for name, shard in zip(names, shards):
        add_to_fingerprint(digest, storable(name), -1 if remote else os.path.getsize(shard))
    notes: list[str] = []
    if not remote and _class_sorted(shards):
        notes.append(
            f"{data}: class-sorted shards: a part of the stream is no fair sample of all of it; "
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


def _read_shards(shards: Iterable[tuple[str, str]], notes: list[str]) -> Iterator[tuple[str, Item]]:
    """(shard/member, image) shard after shard.

    The rest of a damaged shard is skipped, with a note.

    Raises:
        RunError: a shard on disk cannot be read, several in a row cannot be fetched, or none has an image.
    """
    total, num_failed = 0, 0
    others = Counter[str]()
    for shard, path in shards:
        num_read, damage, seen = 0, None, Counter[str]()
        try:
            with _open_shard(path) as file:
                for name, item in _images(_tar(file, path), others):
                    seen[name] += 1
                    again = f"#{seen[name]}" if seen[name] > 1 else ""
                    num_read += 1
                    yield f"{shard}/{storable(name)}{again}", item
            num_failed = 0
        except DamagedTar as error:
            damage = str(error)
        except OSError as error:
            damage = f"cannot be read: {first_line(error)}"
            num_failed += 1
            # To go on without a shard that comes back later would give other images to the same positions.
            if "://" not in path or num_failed == MAX_FAILED_SHARDS:
                raise RunError(
                    f"shard '{path}' {damage}: make it available again, and the same command goes on"
                ) from error
        total += num_read
        note = f"{shard} {damage} (after {num_read} images; the rest of it is left out)"
        if damage is not None and note not in notes:
            notes.append(note)
    notes += [note for note in unread_images(others) if note not in notes]
    if not total:
        raise RunError(f"no image in any shard: {'; '.join(notes[:1]) or 'they hold no images'}")


def _open_shard(path: str) -> Any:
    if "://" not in path:
        return open(path, "rb", buffering=0)
    return urllib.request.urlopen(path, timeout=TIMEOUT)


def _tar(file: Any, path: str) -> Tar:
    content, compressed = decompressed(file)
    seekable = not compressed and "://" not in path
    return Tar(content, os.fstat(file.fileno()).st_size if seekable else None)


def _images(tar: Tar, others: Counter[str]) -> Iterator[tuple[str, Item]]:
    """(name, image) of the images of a tar; of a sample, those that accompany its image are left out.

    Those come before the image they accompany as well as after it: they are held until their sample ends.
    """
    sample, has_image, held = "", False, list[tuple[str, Item]]()
    damage = None
    try:
        for member in tar.members():
            extension = os.path.splitext(member.name)[1].lower()
            if member.kind != "file" or is_hidden(member.name):
                continue
            if extension not in image_extensions():
                others[extension] += 1
                continue
            if sample_of(member.name) != sample:
                yield from held
                sample, has_image, held = sample_of(member.name), False, []
            if stem_of(member.name) == sample:
                has_image, held = True, []
            part = is_part(member.name)
            if part and has_image:
                continue
            item = member.name, _content(tar, member.size)
            if part and len(held) < MAX_SAMPLE_IMAGES:
                held.append(item)
            else:
                yield item
    except DamagedTar as error:
        damage = error
    yield from held
    if damage is not None:
        raise damage


def _content(tar: Tar, size: int) -> Item:
    try:
        check_encoded(size)
    except UnusableImage as too_large:
        return too_large
    return tar.read(size)


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
    numbers: list[int] = []
    folders: list[str] = []
    try:
        with _open_shard(path) as file:
            tar = _tar(file, path)
            for member in itertools.islice(tar.members(), 3 * LABELS_LOOKED_AT):
                extension = os.path.splitext(member.name)[1].lower()
                if extension in LABELS and member.size < MAX_LABEL_BYTES:
                    numbers.append(parse_label(tar.read(member.size), extension))
                elif extension in image_extensions():
                    folders.append(os.path.dirname(member.name))
    except (DamagedTar, OSError):
        pass  # reading the shard itself will tell
    return [number for number in numbers if number != NO_LABEL] or folders


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
    index = int(bits.random_raw()) % len(buffer)  # raw draws: see `permutation`
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()


def _num_bytes(item: Item) -> int:
    if isinstance(item, Image.Image):
        return item.width * item.height * len(item.getbands())
    return 0 if isinstance(item, UnusableImage) else len(item)
