"""From the score array to the ranking, and the folder RUN that hands it over.

RUN/ranking.json is the contract with everything behind it (the report, `img2vec pretrain`): it holds all that is
needed to load each teacher again, with the sha256 of its weights.
"""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from tokdiv import __version__
from tokdiv.certify import Certificate, confidence_sequence
from tokdiv.errors import RunError, UsageError
from tokdiv.scores import CHUNK, ScoreTable, write_skipped, write_whole
from tokdiv.teachers.spec import LoadedSpec, TeacherSpec

if TYPE_CHECKING:
    from tokdiv.data.source import Source
    from tokdiv.measure import Settings

Name = TypeVar("Name", int, str)

SCHEMA_VERSION = 1
# Settings that change scores or what is concluded from them; a RUN is only resumed with the same. More
# images are no contradiction: they go on where the others ended.
BINDING = ("seed", "image_size", "dtype", "confidence", "certify", "tie", "allow_baselines")
SPEC_IDENTITY = (
    "architecture",
    "sha256",
    "size",
    "block",
    "norm",
    "mean",
    "std",
    "arguments",
    "seed",
)


@dataclass(frozen=True)
class RankedTeacher:
    """A row of the ranking.

    Attributes:
        name, rank (from 1), baseline, spec: which teacher, and how to load it again.
        mean_similarity: mean over the images of the token similarity.
        diversity: 1 - that.
        ci_low, ci_high: confidence sequence of the mean similarity over all of DATA; those of all
            teachers hold together with the run's confidence.
        images: usable images measured.
        dtype: of the forward passes that the scores hold for.
        centred_similarity: of tokens minus the teacher's mean token; None where there were too few images.
        similarity_7x7: of tokens pooled to a 7 x 7 grid; None for a coarser grid.
    """

    name: str
    rank: int
    baseline: bool
    spec: LoadedSpec
    mean_similarity: float
    diversity: float
    ci_low: float
    ci_high: float
    images: int
    dtype: str
    centred_similarity: float | None = None
    similarity_7x7: float | None = None


@dataclass(frozen=True)
class Ranking:
    """The result of `tokdiv.rank`, and the content of ranking.json.

    Attributes:
        data: source, count, fingerprint, and how many images were looked at and unusable.
        settings: those of the run.
        certificate: certified, confidence, pairs by name.
        teachers: best first.
        best_name: the winner, a trained teacher if there is one.
        rates: images per second of each teacher, on this machine; not part of the hand-over.
    """

    data: dict[str, Any]
    settings: dict[str, Any]
    certificate: dict[str, Any]
    teachers: list[RankedTeacher]
    best_name: str
    rates: dict[str, float] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def best(self) -> TeacherSpec:
        """The winner, as `load_teacher` and `img2vec.train` take it."""
        return self[self.best_name].spec

    @property
    def certified(self) -> bool:
        """Whether every pair is decided or tied."""
        return bool(self.certificate["certified"])

    def __getitem__(self, name: str) -> RankedTeacher:
        return next(teacher for teacher in self.teachers if teacher.name == name)

    @property
    def table(self) -> pd.DataFrame:
        """One row per teacher, best first."""
        rows = []
        for teacher in self.teachers:
            row = {
                f.name: getattr(teacher, f.name)
                for f in dataclasses.fields(teacher)
                if f.name != "spec"
            }
            spec = teacher.spec
            row |= {
                key: getattr(spec, key)
                for key in ("num_tokens", "dim", "parameters", "norm", "method")
            }
            rows.append(row | {"weights": spec.weights, "sha256": spec.sha256})
        return pd.DataFrame(rows).astype({"centred_similarity": float, "similarity_7x7": float})

    def to_dict(self) -> dict[str, Any]:
        """The content of ranking.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "data": self.data,
            "settings": self.settings,
            "certificate": self.certificate,
            "teachers": [dataclasses.asdict(teacher) for teacher in self.teachers],
            "best": self.best_name,
        }

    @property
    def next_best(self) -> RankedTeacher | None:
        """The one that would win without the winner; None where no other one may."""
        eligible = eligible_teachers(
            [t.spec for t in self.teachers], self.settings["allow_baselines"]
        )
        others = [self.teachers[n] for n in eligible if self.teachers[n].name != self.best_name]
        return others[0] if others else None

    def pair(self, first: str, second: str) -> dict[str, Any]:
        """What the certificate says of two teachers, its gap that of `second` above `first`."""
        names = {first, second}
        pair = next(p for p in self.certificate["pairs"] if {p["first"], p["second"]} == names)
        if pair["first"] == first:
            return pair
        turned = {"gap": -pair["gap"] + 0.0, "low": -pair["high"], "high": -pair["low"]}
        return pair | {"first": first, "second": second} | turned

    def decided(self) -> set[tuple[str, str]]:
        """All (a, b) where a is certified to be more diverse than b, also by way of others."""
        pairs = self.certificate["pairs"]
        return _consequences({(p["first"], p["second"]) for p in pairs if p["state"] == "decided"})

    def _contenders(self) -> set[str]:
        """Who may win and is not certified to stand below another one that may."""
        eligible = eligible_teachers(
            [t.spec for t in self.teachers], self.settings["allow_baselines"]
        )
        names = {self.teachers[n].name for n in eligible}
        return names - {worse for better, worse in self.decided() if better in names}

    def order_by(self, column: str) -> list[str]:
        """The trained teachers by another measure, most diverse first; those without it left out.

        Args:
            column: centred_similarity or similarity_7x7.
        """
        trained = [t for t in self.teachers if not t.baseline and getattr(t, column) is not None]
        return [t.name for t in sorted(trained, key=lambda teacher: getattr(teacher, column))]

    def verdict(self) -> str:
        """How far the result is certain, and what it was measured on, in a sentence."""
        of_best = self.settings["certify"] == "best"
        certified = self.certificate["best_certified"] if of_best else self.certified
        state = (
            f"{'Winner' if of_best else 'Order'} {'certified' if certified else 'not certified'}"
        )
        seen, count = self.data["images"], self.data["count"]
        images = f"{seen:,} images" if count is None else f"{seen:,} of {count:,} images"
        if len(self.teachers) < 2:
            return f"Measured on {images}, scored in {self._dtypes()}."
        return (
            f"{state} at {self.certificate['confidence']:.6g} confidence from {images}, scored in "
            f"{self._dtypes()}."
        )

    def _dtypes(self) -> str:
        """ "bfloat16", or "bfloat16 (a, b in float32)" where some teachers were measured otherwise."""
        asked = self.settings["dtype"]
        others = [teacher.name for teacher in self.teachers if teacher.dtype != asked]
        return f"{asked} ({', '.join(others)} in float32)" if others else asked

    def remarks(self) -> list[str]:
        """What a user of this ranking should know, a sentence each."""
        return [
            *self.about_the_winner(),
            *self.about_the_certificate(),
            *self.about_the_measure(),
        ]

    def about_the_winner(self) -> list[str]:
        """The remarks on what the winner is."""
        best, remarks = self[self.best_name], []
        if best.baseline and not self.settings["allow_baselines"]:
            remarks.append(
                f"All candidates are baselines: '{best.name}' is the most diverse of them, but no trained "
                f"teacher was measured."
            )
        above = [t.name for t in self.teachers if t.baseline and t.rank < best.rank]
        if above:
            remarks.append(
                f"The baseline{'s' * (len(above) > 1)} {', '.join(above)} stand{'s' * (len(above) == 1)} above "
                f"the winner: raw signals and untrained networks are diverse without meaning, so diversity "
                f"alone does not make them teachers."
            )
        ties = self.certificate["co_winners"]
        if ties:
            remarks.append(
                f"The winner is tied with {', '.join(ties)} (gap below {self.settings['tie']:g})."
            )
        return remarks

    def about_the_certificate(self) -> list[str]:
        """The remarks on what is certain and what is not."""
        certificate, remarks = self.certificate, []
        if len(self.teachers) < 2:
            remarks.append(
                "One teacher alone: it was measured, with an interval; there is nothing to order."
            )
        names = {teacher.name for teacher in self.teachers}
        if self.settings["certify"] == "best":
            names = set() if certificate["best_certified"] else self._contenders()
        for pair in certificate["pairs"]:
            if pair["state"] == "open" and {pair["first"], pair["second"]} <= names:
                more = pair["more_images"]
                if self.data["images"] == self.data["count"]:
                    about = "no image is left: those that could not be used keep it open"
                elif more:
                    about = f"about {more:,} images more would settle it"
                else:
                    about = "more images may settle it"
                remarks.append(
                    f"Not decided within {pair['images']:,} images: {pair['first']} before {pair['second']}, gap "
                    f"{pair['gap']:.4f} ({pair['low']:.4f} to {pair['high']:.4f}); {about}."
                )
        if certificate["approximate"]:
            remarks.append(
                "The guarantees are approximate: a stream of shards cannot be put in uniformly random order."
            )
        if self.data["unusable"]:
            remarks.append(
                f"{self.data['unusable']:,} of {self.data['images']:,} images could not be used: skipped.csv."
            )
        return remarks

    def about_the_measure(self) -> list[str]:
        """The remarks on measures by which another one would win, and on teachers that no file holds."""
        own = [t.name for t in self.teachers if t.spec.is_custom]
        remarks = [
            f"{name} is made by code of your own: it cannot be loaded again without that code."
            for name in own
        ]
        trained = [t for t in self.teachers if not t.baseline]
        for column, what in (
            ("centred_similarity", "Centred at its mean token"),
            ("similarity_7x7", "Pooled to a 7x7 grid"),
        ):
            order = self.order_by(column)
            comparable = [t.name for t in trained if t.name in order]
            if len(order) > 1 and order[0] != comparable[0]:
                remarks.append(f"{what}, {order[0]} would come first.")
        return remarks

    def write(self, folder: Path, table: ScoreTable) -> None:
        """Write what RUN hands over: ranking, scores, skipped images. `tokdiv.report.build` draws it.

        Raises:
            RunError: the disk is full or not writable.
        """
        columns = {teacher.name: table.teachers.index(teacher.name) for teacher in self.teachers}
        write_whole(folder / "scores.parquet", lambda file: _write_scores(file, table, columns))
        skipped = ((table.key(p), reason) for p, reason in sorted(table.reasons.items()))
        write_skipped(folder / "skipped.csv", skipped)
        write_whole(folder / "ranking.csv", self.table.to_csv(index=False))
        # The hand-over goes last: where it is, everything else is there too.
        write_whole(folder / "ranking.json", json.dumps(self.to_dict(), indent=2) + "\n")


def _write_scores(file: BinaryIO, table: ScoreTable, columns: dict[str, int]) -> None:
    """scores.parquet: a row an image that could be used, a stretch at a time, so that memory stays small."""
    fields = [("position", pa.int64()), ("key", pa.string())]
    schema = pa.schema([*fields, *((name, pa.float32()) for name in columns)])
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, table.front, CHUNK):
            stop = min(start + CHUNK, table.front)
            usable = [p for p in range(start, stop) if p not in table.reasons]
            scores = table.rows(start, stop)[np.array(usable, dtype=np.int64) - start]
            arrays = [pa.array(usable, pa.int64()), pa.array([table.key(p) for p in usable])]
            arrays += [pa.array(scores[:, n], from_pandas=True) for n in columns.values()]
            writer.write_table(pa.table(arrays, schema=schema))


def load_ranking(path: str | os.PathLike[str]) -> Ranking:
    """Read a RUN folder or its ranking.json.

    Raises:
        UsageError: it is not there, unfinished, or of another schema.
    """
    file = Path(path)
    file = file / "ranking.json" if file.is_dir() else file
    if not file.is_file():
        why = "no such ranking"
        if (file.parent / "checkpoints").is_dir():
            why = (
                f"this is a run of img2vec pretrain, no ranking; its page is written anew by "
                f"img2vec.report.write_report({str(file.parent)!r})"
            )
        elif (file.parent / "config.json").is_file():
            why = "this run is not finished: repeat its `tokdiv rank` command"
        raise UsageError(f"'{file}': {why}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION:
            raise UsageError(
                f"'{file}' has schema version {content['schema_version']}, expected {SCHEMA_VERSION}: use the "
                f"tokdiv that wrote it, or rank again"
            )
        teachers = [
            RankedTeacher(**(row | {"spec": LoadedSpec.from_dict(row["spec"])}))
            for row in content["teachers"]
        ]
        if content["best"] not in [teacher.name for teacher in teachers]:
            raise ValueError(f"its best, {content['best']!r}, is none of its teachers")
        return Ranking(
            content["data"],
            content["settings"],
            content["certificate"],
            teachers,
            content["best"],
            stored_rates(file.parent),
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"'{file}' is no ranking of tokdiv: {error}") from None


def eligible_teachers(specs: Sequence[TeacherSpec], allow_baselines: bool) -> list[int]:
    """Which may win: baselines only where they are allowed, or alone."""
    trained = [n for n, spec in enumerate(specs) if not spec.baseline]
    return list(range(len(specs))) if allow_baselines or not trained else trained


def decided_pairs(certificate: Certificate) -> set[tuple[int, int]]:
    """All (n, m) where n is certified to be more diverse than m, also by way of others.

    A teacher that was dropped is no longer compared, but whoever beats what beat it beats it too; all
    decisions hold together with the certificate's confidence, hence so does what follows from them.
    """
    return _consequences({(p.first, p.second) for p in certificate.pairs if p.state == "decided"})


def _consequences(better: set[tuple[Name, Name]]) -> set[tuple[Name, Name]]:
    """(n, m) for all n that stand above an m, be it by way of others."""
    every = sorted({n for pair in better for n in pair})
    all_of_them = set(better)
    for k, n, m in itertools.product(every, repeat=3):
        if (n, k) in all_of_them and (k, m) in all_of_them:
            all_of_them.add((n, m))
    return all_of_them


def certified_best(certificate: Certificate, eligible: Sequence[int]) -> list[int]:
    """The eligible teachers that are decided or tied against every other eligible one."""
    settled = decided_pairs(certificate)
    for pair in certificate.pairs:
        if pair.state == "tie":
            settled |= {(pair.first, pair.second), (pair.second, pair.first)}
    return [n for n in eligible if all((n, m) in settled for m in eligible if m != n)]


def make_ranking(
    table: ScoreTable,
    certificate: Certificate,
    specs: Sequence[LoadedSpec],
    source: "Source",
    settings: "Settings",
    dtypes: dict[str, str],
    rates: dict[str, float],
) -> Ranking:
    """Put the teachers in order, with the intervals of their means.

    Raises:
        RunError: not one image could be used.
    """
    front = table.front
    unusable = table.unusable(front)
    if front == 0 or unusable == front:
        reason = f"'{table.key(0)}': {table.reasons[0]}" if front else "there are none"
        raise RunError(
            f"none of the {front:,} images of '{source.name}' could be used (the first: {reason})"
        )
    alpha = (1 - settings.confidence) / len(specs)  # so that the intervals hold together
    rows = []
    for place, n in enumerate(certificate.order):
        spec = specs[n]
        images = table.progress.measured[spec.name]
        x = table.column(n, images).astype(np.float64)
        bounds = confidence_sequence(
            x,
            source.count,
            alpha,
            lower=-1 / (spec.num_tokens - 1),
            upper=1.0,
            times=np.array([images]),
        )
        mean = float(np.nanmean(x))
        rows.append(
            RankedTeacher(
                name=spec.name,
                rank=place + 1,
                baseline=spec.baseline,
                spec=spec,
                mean_similarity=mean,
                diversity=1 - mean,
                ci_low=float(bounds.low[-1]),
                ci_high=float(bounds.high[-1]),
                images=int((~np.isnan(x)).sum()),
                dtype=dtypes[spec.name],
                centred_similarity=_mean(table.column(n, front, "centred")),
                similarity_7x7=_mean(table.column(n, front, "pooled")),
            )
        )
    eligible = eligible_teachers(specs, settings.allow_baselines)
    best = next(row for n, row in zip(certificate.order, rows) if n in eligible)
    return Ranking(
        data={
            "source": source.name,
            "count": source.count,
            "fingerprint": source.fingerprint,
            "images": front,
            "unusable": unusable,
        },
        settings=dataclasses.asdict(settings),
        certificate=_named(certificate, [spec.name for spec in specs], best.name, eligible),
        teachers=rows,
        best_name=best.name,
        rates=rates,
    )


def _mean(values: np.ndarray) -> float | None:
    present = values[~np.isnan(values)].astype(np.float64)
    return float(present.mean()) if len(present) else None


def _named(
    certificate: Certificate, names: list[str], best: str, eligible: list[int]
) -> dict[str, Any]:
    """The certificate as JSON, its pairs by name, whether it holds for the winner, and who shares its place."""
    content = certificate.to_dict()
    for pair in content["pairs"]:
        pair["first"], pair["second"] = names[pair["first"]], names[pair["second"]]
    content["order"] = [names[n] for n in certificate.order]
    ties = [{p["first"], p["second"]} for p in content["pairs"] if p["state"] == "tie"]
    content["best_certified"] = len(names) > 1 and bool(certified_best(certificate, eligible))
    content["co_winners"] = [
        names[n] for n in certificate.order if {best, names[n]} in ties and n in eligible
    ]
    return content


@contextlib.contextmanager
def open_run(
    out: str | os.PathLike[str],
    source: "Source",
    settings: "Settings",
    specs: Sequence[TeacherSpec],
    resume: bool,
) -> Iterator[Path]:
    """Make the folder RUN or find it fit to be gone on with; gives the folder of its state, this process's alone.

    Raises:
        UsageError: it holds something else, or a run of other settings, data or weights, or cannot be
            written to, or another process writes to it.
    """
    folder = Path(out)
    lock = FileLock(folder / "state" / ".lock", timeout=0)
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"-o {folder}: is a file; give a folder")
        config = folder / "config.json"
        # A run killed at its very start leaves no more than these.
        begun = {".config.json.part", "state"}
        if folder.is_dir() and any(f.name not in begun for f in folder.iterdir()):
            if not config.is_file():
                raise UsageError(
                    f"-o {folder}: the folder is not empty and holds no run; give another one"
                )
            if resume:
                _check_same(_old_config(config), folder, source, settings, specs)
            else:
                if (folder / "state").is_dir():
                    with lock:
                        pass  # nobody else writes to it
                folder.rename(_free_backup(folder))
        state = folder / "state"
        state.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"-o {folder}: another process is writing to it; wait for it, or give another folder"
        ) from None
    except OSError as error:
        raise UsageError(
            f"-o {folder}: cannot be written to ({error.strerror}); give another folder"
        ) from None
    try:
        write_config(folder, source, settings, specs)
        yield state
    finally:
        lock.release()


def write_config(
    out: str | os.PathLike[str],
    source: "Source",
    settings: "Settings",
    specs: Sequence[TeacherSpec],
    rates: dict[str, float] | None = None,
) -> None:
    """Write RUN/config.json: what is measured, how, how fast (`Ranking.rates`), and by which versions."""
    content = _config(source, settings, specs)
    content["images_per_second"] = stored_rates(out) | (rates or {})
    write_whole(Path(out) / "config.json", json.dumps(content, indent=2) + "\n")


def stored_rates(out: str | os.PathLike[str]) -> dict[str, float]:
    """Images per second of each teacher when it was last measured in the folder RUN, where that is known."""
    try:
        content = json.loads((Path(out) / "config.json").read_text(encoding="utf-8"))
        return {str(name): float(rate) for name, rate in content["images_per_second"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def stored_batch_size(out: str | os.PathLike[str]) -> int | None:
    """The batch size that the run in the folder RUN was measured with; None where there is none."""
    config = Path(out) / "config.json"
    if not config.is_file():
        return None
    size = _old_config(config)["settings"].get("batch_size")
    return size if isinstance(size, int) else None


def _old_config(file: Path) -> dict[str, Any]:
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
        if (
            old["schema_version"] == SCHEMA_VERSION
            and {"source", "count", "fingerprint"} <= old["data"].keys()
            and {*BINDING, "max_images"} <= old["settings"].keys()
            and all({"name", *SPEC_IDENTITY} <= teacher.keys() for teacher in old["teachers"])
        ):
            return old
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UsageError(
        f"-o {file.parent}: its config.json is not that of a ranking, or damaged; give another folder, or "
        f"start anew with --no-resume"
    )


def _free_backup(folder: Path) -> Path:
    folder, number = folder.resolve(), 1
    while (backup := folder.with_name(f"{folder.name}.bak-{number}")).exists():
        number += 1
    return backup


def versions() -> dict[str, str]:
    """Of this package and of what its numbers depend on."""
    import timm
    import torch
    import torchvision

    return {
        "tokdiv": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a subclass of str, which no checkpoint may hold
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
    }


def _config(source: "Source", settings: "Settings", specs: Sequence[TeacherSpec]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "command": sys.argv,
        "world": int(os.environ.get("WORLD_SIZE", 1)),  # number of processes, as torchrun sets it
        "data": {"source": source.name, "count": source.count, "fingerprint": source.fingerprint},
        "settings": dataclasses.asdict(settings),
        "teachers": [spec.to_dict() for spec in specs],
        "versions": versions(),
    }


def _check_same(
    old: dict[str, Any],
    folder: Path,
    source: "Source",
    settings: "Settings",
    specs: Sequence[TeacherSpec],
) -> None:
    """Whether a run may go on: the same data, settings and weights; teachers may join, images be more."""
    remedy = "repeat it as it was, give another folder, or start anew with --no-resume"

    def refuse(what: str, before: Any, now: Any) -> UsageError:
        return UsageError(f"-o {folder} holds a run with {what} {before}, now {now}: {remedy}")

    if old["data"]["fingerprint"] != source.fingerprint:
        before = f"'{old['data']['source']}' of {old['data']['count']} images"
        raise refuse("other data:", before, f"'{source.name}' of {source.count} images")
    for key in BINDING:
        if old["settings"][key] != getattr(settings, key):
            raise refuse(key, old["settings"][key], getattr(settings, key))
    before, now = old["settings"]["max_images"], settings.max_images
    if now is not None and (before is None or now < before):
        raise refuse("max_images", before or "all", now)
    teachers = {spec.name: json.loads(json.dumps(spec.to_dict())) for spec in specs}
    for stored in old["teachers"]:
        name = stored["name"]
        if name not in teachers:
            raise refuse("the teacher", name, "without it")
        for key in SPEC_IDENTITY:
            if stored[key] != teachers[name][key]:
                raise refuse(f"{name}: {key}", stored[key], teachers[name][key])
