"""DATA as the user writes it, opened as a Source."""

import dataclasses
import os
import re

from tokdiv.data.datasets import (
    is_hugging_face_folder,
    open_hugging_face,
    open_iterable,
    open_torchvision,
)
from tokdiv.data.decode import image_extensions
from tokdiv.data.folder import NoImages, open_folder
from tokdiv.data.shards import check_schemes, expand_shards, shards_in
from tokdiv.data.source import Source, max_encoded_bytes, storable
from tokdiv.data.stream import open_shard_stream
from tokdiv.data.tar import open_tars
from tokdiv.errors import UsageError

OPENERS = {
    "wds": open_shard_stream,
    "hfds": open_hugging_face,
    "torch": open_torchvision,
    "tfds": open_iterable,
    "hfids": open_iterable,
}


def open_source(data: str) -> Source:
    """Open DATA for reading.

    Args:
        data: a folder of images, nested or flat; a .tar of images; shards as a brace pattern
            (`train-{0000..0009}.tar`), a wildcard, or a folder that holds only .tar files; a Hugging Face
            data set on disk (save_to_disk, Parquet); or a scheme in timm's notation: `wds/SHARDS` (read as a
            stream), `hfds/NAME_OR_FOLDER`, `torch/NAME`, `tfds/NAME`, `hfids/NAME`. A scheme may end in
            `:split=NAME` (default: train; hfds also takes parts, as train[:10%]) and `:root=FOLDER`; hfids
            also in `:num_samples=N`, where the data set does not tell its length. A path that exists as it
            stands wins over a scheme.

    Raises:
        UsageError: in one line that names the value and the remedy.
    """
    data = os.fspath(data)
    if not data:
        raise UsageError(
            "DATA is empty: give a folder of images, a .tar or a scheme such as hfds/NAME"
        )
    if "\0" in data:
        raise UsageError(f"{data!r}: a path has no null characters")
    max_encoded_bytes()  # a mistake in it is one of the call
    path = os.path.expanduser(data)
    source = _open_path(data, path) if os.path.lexists(path) else _open_name(data, path)
    if not source.count and source.permutable:
        raise UsageError(f"{data!r} holds no images")
    return dataclasses.replace(source, name=storable(data))


def _open_name(data: str, path: str) -> Source:
    """Open what is no path: a scheme, or a pattern of shards."""
    base, options = _split_options(data)
    scheme, _, rest = base.partition("/")
    if rest and scheme.lower() in OPENERS:
        return OPENERS[scheme.lower()](data, rest, options)
    if options:
        raise UsageError(
            f"{data!r}: :split= and :root= belong to hfds/, torch/, tfds/, hfids/ and wds/; "
            f"for files, name the folder itself"
        )
    if "://" in base:
        raise UsageError(f"{data!r} is a URL: name it wds/{data} to stream its shards")
    check_schemes(data, [base])
    shards = expand_shards(path)
    if shards != [path]:
        missing = [shard for shard in shards if not os.path.isfile(shard)]
        if missing or not shards:
            what = f"no such shard: {missing[0]!r}" if missing else "no file matches"
            raise UsageError(f"{data!r}: {what} ({len(shards) - len(missing)} are there)")
        return open_tars(data, shards)
    raise UsageError(
        f"{data!r}: no such folder or file (expected a folder of images, a .tar, shards, or one of "
        f"{', '.join(s + '/...' for s in OPENERS)})"
    )


def _split_options(data: str) -> tuple[str, dict[str, str]]:
    """`hfds/name:split=test` -> (`hfds/name`, {split: test})."""
    options: dict[str, str] = {}
    value = r"(?>\[[^\]]*\]|[^:])+"  # the colon of train[:10%] belongs to it
    while match := re.fullmatch(rf"(.+):(split|root|num_samples)=({value})", data, re.DOTALL):
        data, key, given = match.groups()
        options.setdefault(key, given)
    return data, options


def _open_path(data: str, path: str) -> Source:
    if os.path.isdir(path):
        try:
            return open_folder(data, path)
        except NoImages:
            if shards := shards_in(path):
                return open_tars(data, shards)
            if is_hugging_face_folder(path):
                return open_hugging_face(data, path, {})
            raise
        except OSError as error:
            raise UsageError(f"{data!r} cannot be read: {os.strerror(error.errno or 0)}") from error
    if not os.path.isfile(path):
        raise UsageError(f"{data!r} is neither a folder nor a file (a link to nothing, a device?)")
    if os.path.splitext(path)[1].lower() in image_extensions():
        raise UsageError(f"{data!r} is a single image: name the folder that holds the images")
    return open_tars(data, [path])
