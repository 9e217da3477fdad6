"""RUN/ranking.json: what hands a ranking over to the report and to `img2vec pretrain`, written and read.

It holds all that is needed to load each teacher again, with the sha256 of its weights.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from tokdiv.certify import Certificate
from tokdiv.config import Settings
from tokdiv.errors import UsageError
from tokdiv.ranking import SCHEMA_VERSION, RankedTeacher, Ranking
from tokdiv.run_config import read_previous
from tokdiv.run_dir import CONFIG, read_json, write_atomic
from tokdiv.settings import check_types
from tokdiv.teachers.spec import LoadedSpec

RANKING = "ranking.json"
REPORT_FILES = ("report.html", "similarity.png", "similarity.svg", "correspondence.png")


def write_ranking(ranking: Ranking, run: Path) -> None:
    """Write ranking.csv and ranking.json; the report of an earlier ranking goes.

    Raises:
        RunError: the disk is full or not writable.
    """
    for name in REPORT_FILES:
        (run / name).unlink(missing_ok=True)
    write_atomic(run / "ranking.csv", ranking.table.to_csv(index=False))
    write_atomic(run / RANKING, json.dumps(ranking.to_dict(), indent=2) + "\n")


def load_ranking(path: str | os.PathLike[str]) -> Ranking:
    """Read a RUN folder or its ranking.json.

    Raises:
        UsageError: it is not there, unfinished, damaged, or of another schema.
    """
    file = Path(path)
    file = file / RANKING if file.is_dir() else file
    if not file.is_file():
        raise UsageError(f"'{file}': {_why_missing(file.parent)}")
    try:
        content = read_json(file)
        version = content["schema_version"]
        if version == SCHEMA_VERSION:
            return _from_dict(content, read_previous(file.parent).rates)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"'{file}' is no ranking of tokdiv: {reason}") from None
    raise UsageError(
        f"'{file}' has schema version {version}, expected {SCHEMA_VERSION}: use the tokdiv that wrote it, or rank "
        f"again"
    )


def _why_missing(folder: Path) -> str:
    if (folder / "checkpoints").is_dir():
        return (
            f"this is a run of img2vec pretrain, no ranking; img2vec.report.write_report({str(folder)!r}) writes "
            f"its page again"
        )
    if (folder / CONFIG).is_file():
        return "this run is not finished: repeat its `tokdiv rank` command"
    return "no such ranking"


def _from_dict(content: dict[str, Any], rates: dict[str, float]) -> Ranking:
    """The inverse of `Ranking.to_dict`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OverflowError: it is damaged.
    """
    known = {field.name for field in fields(Settings)}
    ranking = Ranking(
        data=content["data"],
        settings=Settings(**{k: v for k, v in content["settings"].items() if k in known}),
        certificate=Certificate.from_dict(content["certificate"]),
        teachers=[
            RankedTeacher(**(row | {"spec": LoadedSpec.from_dict(row["spec"])}))
            for row in content["teachers"]
        ],
        best_name=content["best"],
        rates=rates,
    )
    certificate, names = ranking.certificate, ranking.names
    for record in (certificate, *certificate.pairs, *ranking.teachers):
        check_types(record)
    for t in ranking.teachers:
        num_missing = (t.correspondence, t.pixels_correspondence).count(None)
        if num_missing == 1 or (num_missing and t.noise_like is not None):
            raise ValueError(f"the correspondence of '{t.name}' is incomplete")
    _check_data(ranking.data)
    if ranking.best_name not in names:
        raise ValueError(f"its best, {ranking.best_name!r}, is none of its teachers")
    if sorted(certificate.order) != sorted(set(names)) or len(set(names)) != len(names):
        raise ValueError("its certificate is about other teachers")
    pairs = {frozenset((pair.first, pair.second)) for pair in certificate.pairs}
    expected = {frozenset((a, b)) for a in names for b in names if a != b}
    if pairs != expected or len(certificate.pairs) != len(expected):
        raise ValueError("its certificate has other pairs than its teachers make")
    return ranking


def _check_data(data: Mapping[str, Any]) -> None:
    kinds = {"source": str, "fingerprint": str, "images": int, "unusable": int}
    wrong = [key for key, kind in kinds.items() if type(data[key]) is not kind]
    if data["count"] is not None and type(data["count"]) is not int:
        wrong.append("count")
    if wrong or not 0 <= data["unusable"] < data["images"]:
        raise ValueError(f"its data is damaged ({wrong[0] if wrong else 'unusable'})")
