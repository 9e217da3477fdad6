"""DATA as the user writes it, opened as a Source."""

import os
import re

from tokdiv.data.datasets import open_hugging_face, open_iterable, open_torchvision
from tokdiv.data.folder import IS_IMAGE, NoImages, open_folder
from tokdiv.data.source import Source
from tokdiv.data.stream import expand_shards, open_shard_stream, pipe_refused, shards_in
from tokdiv.data.tar import open_tars
from tokdiv.errors import UsageError


def open_source(data: str) -> Source:
    """Open DATA for reading.

    data: a folder of images, nested or flat; a .tar of images; shards as a brace pattern
        (`train-{0000..0009}.tar`), a wildcard, or a folder that holds only .tar files; or a scheme
        in timm's notation: `wds/SHARDS` (read as a stream), `hfds/NAME_OR_FOLDER`, `torch/NAME`,
        `tfds/NAME`, `hfids/NAME`. A scheme may end in `:split=NAME` (default: train) and
        `:root=FOLDER`; hfids also in `:num_samples=N`, where the data set does not tell its length. A
        path that exists as it stands wins over a scheme.

    Raises UsageError, in one line that names the value and the remedy.
    """
    data = os.fspath(data)
    path = os.path.expanduser(data)
    if not data:
        raise UsageError(
            "DATA is empty: give a folder of images, a .tar or a scheme such as hfds/NAME"
        )
    if os.path.lexists(path):
        return _open_path(data, path)
    base, options = _split_options(data)
    scheme, _, rest = base.partition("/")
    openers = {
        "wds": open_shard_stream,
        "hfds": open_hugging_face,
        "torch": open_torchvision,
        "tfds": open_iterable,
        "hfids": open_iterable,
    }
    if rest and scheme.lower() in openers:
        return openers[scheme.lower()](data, rest, options)
    if options:
        raise UsageError(
            f"{data!r}: :split= and :root= belong to hfds/, torch/, tfds/, hfids/ and wds/; "
            f"for files, name the folder itself"
        )
    if base.lower().startswith("pipe:"):
        raise UsageError(pipe_refused(data))
    if "://" in base:
        raise UsageError(
            f"{data!r} is a URL: shards are streamed from wds/{data} (needs tokdiv[wds])"
        )
    shards = expand_shards(path)
    if shards != [path]:
        missing = [shard for shard in shards if not os.path.isfile(shard)]
        if missing or not shards:
            what = f"no such shard: {missing[0]!r}" if missing else "no file matches"
            raise UsageError(f"{data!r}: {what} ({len(shards) - len(missing)} are there)")
        return open_tars(data, shards)
    raise UsageError(
        f"{data!r}: no such folder or file (expected a folder of images, a .tar, shards, or one of "
        f"{', '.join(s + '/...' for s in openers)})"
    )


def _split_options(data: str) -> tuple[str, dict[str, str]]:
    """`hfds/name:split=test` -> (`hfds/name`, {split: test})."""
    options: dict[str, str] = {}
    while match := re.fullmatch(r"(.+):(split|root|num_samples)=([^:]+)", data, re.DOTALL):
        data, key, value = match.groups()
        options.setdefault(key, value)
    return data, options


def _open_path(data: str, path: str) -> Source:
    if os.path.isdir(path):
        try:
            return open_folder(data, path)
        except NoImages:
            if shards := shards_in(path):
                return open_tars(data, shards)
            raise
        except OSError as error:
            raise UsageError(f"{data!r} cannot be read: {os.strerror(error.errno or 0)}") from error
    if not os.path.isfile(path):
        raise UsageError(f"{data!r} is neither a folder nor a file (a link to nothing, a device?)")
    if os.path.splitext(path)[1].lower() in IS_IMAGE:
        raise UsageError(f"{data!r} is a single image: name the folder that holds the images")
    return open_tars(data, [path])
