"""Which shards DATA means: brace patterns, wildcards, folders of .tar files, URLs."""

import glob
import json
import os
import re
from collections.abc import Iterable, Sequence

from tokdiv.data.members import COMPRESSED
from tokdiv.errors import UsageError

MAX_SHARDS = 1_000_000


def find_shards(
    data: str, rest: str, options: dict[str, str]
) -> tuple[list[str], int | None, bool]:
    """The paths or URLs that `wds/REST` stands for, the number of images where it is known, and whether URLs.

    Raises:
        UsageError: none, some missing, or something else than files and http(s) URLs.
    """
    shards, count = expand_braces(rest), None
    check_schemes(data, shards)
    if any("://" in shard for shard in shards):
        return shards, None, True
    root = os.path.expanduser(rest)
    if os.path.isdir(root):
        shards, count = _shards_of_folder(data, root, options)
    else:
        shards = expand_shards(root)
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing or not shards:
        what = f"no such shard: {missing[0]!r}" if missing else "no .tar files"
        raise UsageError(f"{data!r}: {what} (expected a folder of .tar files or a brace pattern)")
    return shards, count, False


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
        except UsageError:
            raise
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise UsageError(f"{data!r}: {name} does not list splits with filenames") from None
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
            if not entry.name.startswith(".")
            and entry.name.lower().endswith((".tar", *COMPRESSED))
            and os.path.isfile(entry.path)
        )


def check_schemes(data: str, shards: Iterable[str]) -> None:
    """Shards are files, or come over http and https: nothing that runs a command, as pipe: would.

    Args:
        shards: after brace expansion, which can put a scheme together.

    Raises:
        UsageError: another scheme.
    """
    for shard in shards:
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", shard)
        if "|" in shard or (scheme and scheme[1].lower() == "pipe"):
            raise UsageError(
                f"{data!r}: pipe: runs a shell command, which DATA may not; save the shards or give their URLs"
            )
        if "://" not in shard and any("://" in other for other in shards):
            raise UsageError(f"{data!r}: some shards are URLs and some are files: give one kind")
        if "://" in shard and (not scheme or scheme[1].lower() not in ("http", "https")):
            raise UsageError(
                f"{data!r}: shards are read from files, http:// and https://, not from {shard!r}; "
                f"mount them, or give their https URLs"
            )


def expand_shards(path: str) -> list[str]:
    """The paths that a brace pattern or a wildcard for .tar files stands for; else the path."""
    if not path.lower().endswith((".tar", *COMPRESSED)):
        return [path]
    if any(sign in path for sign in "*?") and "{" not in path:
        return sorted(glob.glob(path))
    return expand_braces(path)


def expand_braces(pattern: str) -> list[str]:
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
