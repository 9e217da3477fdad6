"""RUN/config.json: what is measured and how. By it a run is recognized, and only the same run is resumed."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokdiv.config import Settings
from tokdiv.data.source import Source
from tokdiv.errors import UsageError
from tokdiv.run_dir import CONFIG, read_json, versions, write_atomic
from tokdiv.teachers.spec import TeacherSpec

SCHEMA_VERSION = 1
# Settings that change the scores or what is concluded from them. More images may always be measured.
BINDING = ("seed", "image_size", "dtype", "confidence", "certify", "tie", "allow_baselines")


def write_config(
    folder: Path,
    source: Source,
    settings: Settings,
    specs: Sequence[TeacherSpec],
    rates: dict[str, float],
) -> None:
    """Write RUN/config.json.

    Args:
        rates: images per second of each teacher, where it was measured.

    Raises:
        RunError: the disk is full or not writable.
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        "command": sys.argv,
        "world": int(os.environ.get("WORLD_SIZE", 1)),  # number of processes, as torchrun sets it
        "data": {"source": source.name, "count": source.count, "fingerprint": source.fingerprint},
        "settings": dataclasses.asdict(settings),
        "teachers": [spec.to_dict() for spec in specs],
        "versions": versions(),
        "images_per_second": rates,
    }
    write_atomic(folder / CONFIG, json.dumps(content, indent=2) + "\n")


def stored_config(folder: Path) -> dict[str, Any]:
    """RUN/config.json; empty where there is none that can be read."""
    try:
        return read_json(folder / CONFIG)
    except (OSError, ValueError):
        return {}


def stored_rates(config: dict[str, Any]) -> dict[str, float]:
    """Images per second of each teacher when it was last measured, by its config.json."""
    try:
        return {str(name): float(rate) for name, rate in config["images_per_second"].items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def stored_batch_size(config: dict[str, Any]) -> int | None:
    """The batch size that a run was measured with, by its config.json."""
    settings = config.get("settings")
    size = settings.get("batch_size") if isinstance(settings, dict) else None
    return size if isinstance(size, int) else None


def check_same_run(
    out: str | os.PathLike[str],
    config: dict[str, Any],
    source: Source,
    settings: Settings,
    specs: Sequence[TeacherSpec],
) -> None:
    """Check that a run may be resumed: the same data, settings and weights. Teachers may join.

    Raises:
        UsageError: it names the first difference, or config.json is damaged.
    """
    try:
        if config["schema_version"] != SCHEMA_VERSION:
            raise KeyError("schema_version")
        data = {key: config["data"][key] for key in ("source", "count", "fingerprint")}
        before = {key: config["settings"][key] for key in (*BINDING, "max_images")}
        teachers = [TeacherSpec.from_dict(fields) for fields in config["teachers"]]
    except (UsageError, KeyError, ValueError, TypeError, AttributeError):
        raise UsageError(
            f"-o {out}: its config.json is not that of a ranking, or damaged; give another folder, or start "
            f"anew with --no-resume"
        ) from None

    def refuse(what: str, before: Any, now: Any) -> UsageError:
        return UsageError(
            f"-o {out} holds a run with {what} {before}, now {now}: repeat it as it was, give another folder, or "
            f"start anew with --no-resume"
        )

    if data["fingerprint"] != source.fingerprint:
        old = f"'{data['source']}' of {data['count']} images"
        raise refuse("other data:", old, f"'{source.name}' of {source.count} images")
    for key in BINDING:
        if before[key] != getattr(settings, key):
            raise refuse(key, before[key], getattr(settings, key))
    old_max, new_max = before["max_images"], settings.max_images
    if new_max is not None and (old_max is None or new_max < old_max):
        raise refuse("max_images", old_max or "all", new_max)
    identities = {spec.name: spec.identity() for spec in specs}
    for spec in teachers:
        if spec.name not in identities:
            raise refuse("the teacher", spec.name, "without it")
        old_identity, new = spec.identity(), identities[spec.name]
        for key in [*old_identity, *new]:
            if old_identity.get(key) != new.get(key):
                raise refuse(f"{spec.name}: {key}", old_identity.get(key), new.get(key))
