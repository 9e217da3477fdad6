"""RUN/config.json: what is measured and how. By it a run is recognized, and only the same run is resumed."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokdiv.config import Settings
from tokdiv.data.source import Source
from tokdiv.errors import UsageError
from tokdiv.run_dir import CONFIG, read_json, write_atomic
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.versions import versions

SCHEMA_VERSION = 1  # of config.json
# Settings that change the scores or what is concluded from them. More images may always be measured.
BINDING = ("seed", "image_size", "dtype", "confidence", "certify", "tie", "allow_baselines")


def describe(
    source: Source, settings: Settings, specs: Sequence[TeacherSpec], rates: dict[str, float]
) -> dict[str, Any]:
    """The content of config.json.

    Args:
        rates: images per second of each teacher, where it was measured.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "command": sys.argv,
        "world": int(os.environ.get("WORLD_SIZE", 1)),  # number of processes, as torchrun sets it
        "data": {"source": source.name, "count": source.count, "fingerprint": source.fingerprint},
        "settings": dataclasses.asdict(settings),
        "teachers": [spec.to_dict() for spec in specs],
        "versions": versions(),
        "images_per_second": rates,
    }


def write(run: Path, config: dict[str, Any]) -> None:
    """Write RUN/config.json; RunError if the disk is full or not writable."""
    write_atomic(run / CONFIG, json.dumps(config, indent=2) + "\n")


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """What the scores of a run, and the conclusions from them, depend on.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError: the config is not that of a ranking.
    """
    if config["schema_version"] != SCHEMA_VERSION:
        raise ValueError("another schema")
    specs = [TeacherSpec.from_dict(fields) for fields in config["teachers"]]
    return {
        "data": config["data"]["fingerprint"],
        **{key: config["settings"][key] for key in BINDING},
        "teachers": {spec.name: spec.identity() for spec in specs},
    }


def check_same(out: str | os.PathLike[str], new: dict[str, Any], old: dict[str, Any]) -> None:
    """Check that a run may be resumed: the same data, settings and weights. Teachers may join.

    Args:
        out: the run's folder. new, old: what is to be measured now, and its config.json.

    Raises:
        UsageError: it names the first difference, or config.json is damaged.
    """
    now = identity(new)
    try:
        before = identity(old)
        limits = [config["settings"]["max_images"] for config in (old, new)]
        sources = [f"'{c['data']['source']}' of {c['data']['count']} images" for c in (old, new)]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise UsageError(
            f"-o {out}: its config.json is not that of a ranking, or damaged; give another folder, or start "
            f"anew with --no-resume"
        ) from None
    differences: list[tuple[str, Any, Any]] = [
        (key, before[key], now[key]) for key in BINDING if before[key] != now[key]
    ]
    if before["data"] != now["data"]:
        differences.insert(0, ("other data:", sources[0], sources[1]))
    if limits[1] is not None and (limits[0] is None or limits[1] < limits[0]):
        differences.append(("max_images", limits[0] or "all", limits[1]))
    for name, teacher in before["teachers"].items():
        if name not in now["teachers"]:
            differences.append(("the teacher", name, "without it"))
            continue
        other = now["teachers"][name]
        keys = [key for key in teacher if teacher[key] != other[key]]
        differences += [(f"{name}: {key}", teacher[key], other[key]) for key in keys]
    if differences:
        what, was, is_now = differences[0]
        raise UsageError(
            f"-o {out} holds a run with {what} {was}, now {is_now}: repeat it as it was, give another folder, or "
            f"start anew with --no-resume"
        )


@dataclass(frozen=True)
class Previous:
    """What a run leaves to the next one in its folder: the batch size, and images per second of each teacher."""

    batch_size: int | None
    rates: dict[str, float]


def read_previous(run: Path) -> Previous:
    """From RUN/config.json; nothing where that is missing or damaged."""
    try:
        config = read_json(run / CONFIG)
        size = config["settings"].get("batch_size")
        rates = {str(k): float(v) for k, v in config["images_per_second"].items()}
        return Previous(size if type(size) is int and size > 0 else None, rates)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return Previous(None, {})
