"""The score array: one row per image in the order measured, one column per teacher; all results come from it.

The first process holds it in memory; `tokdiv.state` stores it while it grows. At the end it becomes
RUN/scores.parquet and RUN/skipped.csv.
"""

import csv
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokdiv.errors import UsageError, first_line
from tokdiv.run_dir import write_atomic

log = logging.getLogger(__name__)

CHUNK = 16_384  # rows of one file: 2 MB with 10 teachers
MEASURES = ("similarity", "centred", "pooled", "zeros")  # per image and teacher, in this order
SCORES, SKIPPED = "scores.parquet", "skipped.csv"
Scores = NDArray[np.float32]


def column_name(teacher: str, measure: str = "similarity") -> str:
    """The column of one teacher and measure in a parquet file."""
    return teacher if measure == "similarity" else f"{measure}:{teacher}"


def _schema(teachers: Sequence[str], measures: Sequence[str]) -> pa.Schema:
    columns = [column_name(teacher, measure) for teacher in teachers for measure in measures]
    fields = [("position", pa.int64()), ("key", pa.string()), ("reason", pa.string())]
    return pa.schema([*fields, *((column, pa.float32()) for column in columns)])


def check_labels(teachers: Sequence[str]) -> None:
    """Raise UsageError if two columns of a parquet file would have one name."""
    for teacher in teachers:
        if teacher != teacher.encode(errors="replace").decode():
            raise UsageError(f"the label {teacher!r} is no Unicode text; write LABEL=SPEC")
    names = _schema(teachers, MEASURES).names
    for teacher in teachers:
        if names.count(teacher) > 1:
            raise UsageError(
                f"{teacher}: this label names another column of the scores; write LABEL=SPEC"
            )


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        measured: per teacher, how many positions of the order it has seen: all of [0, measured).
        dropped: the teachers that are out, with the image count at which they left.
        finished: the reason why the run ended, or None.
        num_averaged: per teacher, how many usable images its mean token is made of so far.
        token_sums: per teacher, the float64 sum (C,) of the images' mean tokens, added in image order.
    """

    measured: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    finished: str | None = None
    num_averaged: dict[str, int] = field(default_factory=dict)
    token_sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def num_seen(self) -> int:
        """Positions that at least one teacher has seen."""
        return max(self.measured.values(), default=0)


class ScoreTable:
    """Scores of (image, teacher), in chunks of rows; NaN where nothing was measured.

    Args:
        teachers: names, in the order of the columns.
        key_of: the key of the image at a position; None where the source is a stream, whose keys are
            recorded as they come.
    """

    def __init__(self, teachers: list[str], key_of: Callable[[int], str] | None) -> None:
        self.teachers = teachers
        self.progress = Progress(
            dict.fromkeys(teachers, 0), num_averaged=dict.fromkeys(teachers, 0)
        )
        self.reasons: dict[int, str] = {}  # position -> why the image cannot be used
        self._key_of = key_of
        self._keys: dict[int, str] = {}
        self._chunks: list[Scores] = []  # each (CHUNK, T, len(MEASURES))
        self._changed: set[int] = set()

    @property
    def num_seen(self) -> int:
        """Positions that at least one teacher has seen."""
        return self.progress.num_seen

    def key(self, position: int) -> str:
        """The key of the image at a position of the order."""
        return self._key_of(position) if self._key_of else self._keys[position]

    def record(
        self,
        positions: NDArray[np.int64],
        keys: list[str],
        reasons: list[str | None],
        columns: list[int],
        scores: Scores,
    ) -> None:
        """Enter the scores of some images.

        Args:
            positions: (n,) of the images.
            keys, reasons: n each; a reason for images that cannot be used.
            columns: the teachers that measured them.
            scores: (n, len(columns), 3) float32, NaN in the rows of unusable images.
        """
        if not len(positions):
            return
        while len(self._chunks) * CHUNK <= positions.max():
            self._chunks.append(
                np.full((CHUNK, len(self.teachers), len(MEASURES)), np.nan, np.float32)
            )
        for number in np.unique(positions // CHUNK):
            rows = positions // CHUNK == number
            inside = (positions[rows] % CHUNK)[:, None]
            self._chunks[number][inside, columns] = scores[rows]
            self._changed.add(int(number))
        for position, key, reason in zip(positions.tolist(), keys, reasons):
            if reason is not None:
                self.reasons[position] = reason
            if self._key_of is None:
                self._keys[position] = key

    def rows(self, start: int, stop: int, measure: str = "similarity") -> Scores:
        """(stop - start, T) of one measure; NaN rows are unusable images."""
        index = MEASURES.index(measure)
        first, last = start // CHUNK, -(-stop // CHUNK)
        parts = [
            chunk[max(start - n * CHUNK, 0) : stop - n * CHUNK, :, index]
            for n, chunk in enumerate(self._chunks[first:last], start=first)
        ]
        return np.concatenate(parts) if parts else np.empty((0, len(self.teachers)), np.float32)

    def column(self, column: int, stop: int, measure: str = "similarity") -> Scores:
        """(stop,) of one teacher and one measure; NaN for unusable and unmeasured images."""
        index = MEASURES.index(measure)
        parts = [
            chunk[: max(stop - n * CHUNK, 0), column, index] for n, chunk in enumerate(self._chunks)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def advance(self, columns: Iterable[int], stop: int) -> None:
        """Note that these teachers have seen all positions before `stop`."""
        for column in columns:
            self.progress.measured[self.teachers[column]] = stop

    def add_mean_tokens(
        self, positions: Sequence[int], columns: Sequence[int], tokens: Sequence[Scores]
    ) -> None:
        """Add usable images to the mean tokens, one by one, so that the sum does not depend on the batches.

        Images that a teacher has not seen yet by its progress are left out, as their scores are.

        Args:
            positions: n, ascending.
            columns: the teachers that measured them.
            tokens: for each of them (n, C), the mean token of each image.
        """
        for column, rows in zip(columns, tokens):
            name = self.teachers[column]
            total = self.progress.token_sums.get(name, np.zeros(rows.shape[1]))
            for position, row in zip(positions, rows):
                if position < self.progress.measured[name]:
                    total = total + row
                    self.progress.num_averaged[name] += 1
            self.progress.token_sums[name] = total

    def drop(self, column: int, stop: int) -> None:
        """Take a teacher out after `stop` images; later scores of it are cleared."""
        self.progress.dropped[self.teachers[column]] = stop
        self.advance([column], stop)
        self._clear(column, stop)

    def finish(self, reason: str, stop: int) -> None:
        """End the run after `stop` images: later ones are forgotten."""
        self.progress.finished = reason
        self._forget(stop)

    def go_back(self, stop: int) -> None:
        """Forget every image from `stop` on; they are measured again when the run is resumed."""
        progress = self.progress
        progress.dropped = {name: at for name, at in progress.dropped.items() if at <= stop}
        self._forget(stop)

    def resume(self, stored: Progress, end: int) -> None:
        """Go on from a stored progress whose scores were entered.

        Args:
            end: the scores of the positions before it are there.
        """
        if end - self.unusable(end) < max(stored.num_averaged.values(), default=0):
            self.reasons.clear()
            return
        names, progress = set(self.teachers), self.progress
        progress.measured |= {k: min(v, end) for k, v in stored.measured.items() if k in names}
        progress.num_averaged |= {k: v for k, v in stored.num_averaged.items() if k in names}
        progress.token_sums = {k: v for k, v in stored.token_sums.items() if k in names}
        progress.dropped = {k: v for k, v in stored.dropped.items() if k in names and v <= end}
        progress.finished = stored.finished if end == stored.num_seen else None
        self.reasons = {p: r for p, r in self.reasons.items() if p < end}

    def reopen(self) -> None:
        """Let a run that had finished go on: more images are allowed, or a teacher joined."""
        self.progress.finished = None

    def _forget(self, stop: int) -> None:
        for column, name in enumerate(self.teachers):
            self.progress.measured[name] = min(self.progress.measured[name], stop)
            self._clear(column, stop)
        self.reasons = {p: reason for p, reason in self.reasons.items() if p < stop}

    def _clear(self, column: int, start: int) -> None:
        for number, chunk in enumerate(self._chunks):
            inside = max(start - number * CHUNK, 0)
            if inside < CHUNK and not np.isnan(chunk[inside:, column]).all():
                chunk[inside:, column] = np.nan
                self._changed.add(number)

    def unusable(self, stop: int) -> int:
        """How many of the first `stop` images cannot be used."""
        return sum(position < stop for position in self.reasons)

    def pop_changed(self) -> set[int]:
        """Numbers of the chunks that changed since this was last asked."""
        changed, self._changed = self._changed, set()
        return changed

    def to_arrow(
        self, start: int, stop: int, teachers: Sequence[str], measures: Sequence[str] = MEASURES
    ) -> pa.Table:
        """The positions [start, stop) within one chunk, unusable images included."""
        positions = range(start, stop)
        arrays = [
            pa.array(positions, pa.int64()),
            pa.array([self.key(p) for p in positions], pa.string()),
            pa.array([self.reasons.get(p) for p in positions], pa.string()),
        ]
        chunk = self._chunks[start // CHUNK][: stop - start]
        for column in map(self.teachers.index, teachers):
            for index in map(MEASURES.index, measures):
                arrays.append(pa.array(chunk[:, column, index], from_pandas=True))
        return pa.table(arrays, schema=_schema(teachers, measures))

    def take_arrow(self, stored: pa.Table) -> None:
        """Enter what `to_arrow` gave, for those of its teachers that are among this table's."""
        columns = [n for n, name in enumerate(self.teachers) if name in stored.column_names]
        scores = np.full((len(stored), len(columns), len(MEASURES)), np.nan, np.float32)
        for place, column in enumerate(columns):
            for index, measure in enumerate(MEASURES):
                values = stored.column(column_name(self.teachers[column], measure))
                scores[:, place, index] = values.to_numpy(zero_copy_only=False)
        positions = stored.column("position").to_numpy()
        keys, reasons = (stored.column(name).to_pylist() for name in ("key", "reason"))
        self.record(positions, keys, reasons, columns, scores)

    def write_results(self, folder: Path, teachers: Sequence[str]) -> None:
        """Write RUN/scores.parquet (a row per usable image) and RUN/skipped.csv.

        Args:
            teachers: in the order of the columns.

        Raises:
            RunError: the disk is full or not writable.
        """
        schema = _schema(teachers, MEASURES[:1])
        schema = schema.remove(schema.get_field_index("reason"))

        def write(file: object) -> None:
            with pq.ParquetWriter(file, schema) as writer:
                for start in range(0, self.num_seen, CHUNK):  # so that memory stays small
                    stop = min(start + CHUNK, self.num_seen)
                    rows = self.to_arrow(start, stop, teachers, MEASURES[:1])
                    usable = rows.filter(pc.is_null(rows.column("reason")))
                    writer.write_table(usable.select(schema.names))

        write_atomic(folder / SCORES, write)
        write_skipped(folder, ((self.key(p), why) for p, why in sorted(self.reasons.items())))


def write_skipped(folder: Path, skipped: Iterable[tuple[str, str]]) -> None:
    """Write skipped.csv: the keys of images that could not be used, and why."""
    text, rows = io.StringIO(), list(skipped)
    csv.writer(text, lineterminator="\n").writerows([("key", "reason"), *rows])
    write_atomic(folder / SKIPPED, text.getvalue())
    if rows:
        log.warning("unusable images skipped: %s (see %s)", f"{len(rows):,}", folder / SKIPPED)


@dataclass(frozen=True)
class UsableScores:
    """What RUN/scores.parquet holds of n usable images and T teachers.

    positions: (n,) in the order of the run, ascending. keys: n names. values: (n, T) float32, NaN where a
    dropped teacher was not measured.
    """

    positions: NDArray[np.int64]
    keys: pa.ChunkedArray
    values: Scores


def read_scores(run: Path, teachers: Sequence[str], num_usable: int) -> UsableScores:
    """Read RUN/scores.parquet.

    Args:
        teachers: the columns of `values`.
        num_usable: how many images the ranking was made of.

    Raises:
        UsageError: the file is missing, damaged, or holds other scores.
    """
    path, remedy = run / SCORES, "repeat the `tokdiv rank` command"
    try:
        table = pq.read_table(path)
        columns = [table.column(column_name(name)).to_numpy() for name in teachers]
        values = np.stack(columns, axis=1).astype(np.float32, copy=False)
        scores = UsableScores(table.column("position").to_numpy(), table.column("key"), values)
    except FileNotFoundError:
        raise UsageError(f"'{path}': no such file; {remedy}") from None
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise UsageError(
            f"'{path}' does not hold the scores of this ranking ({first_line(error)}); {remedy}"
        ) from None
    if len(values) != num_usable:
        raise UsageError(
            f"'{path}' holds {len(values):,} images, the ranking was made of {num_usable:,}; {remedy}"
        )
    return scores
