"""The score array: one row per image in the order measured, one column per teacher; the one truth of a run.

Rank 0 holds it. It is stored in RUN/state as it grows: `scores-00000.parquet`, ... of CHUNK rows each, of which
only those that changed are written again, and `progress.safetensors`, which says how far the measurement came
and is written last. Each file is written to a temporary name, flushed to the disk and renamed, so whatever
moment a run is killed at, the files are those of one earlier moment or a later one, and rows beyond the
progress are not counted.
"""

import contextlib
import csv
import errno
import io
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from tokdiv.errors import RunError

CHUNK = 16_384  # rows of one file: 2 MB with 10 teachers
MEASURES = (
    "similarity",
    "centred",
    "pooled",
)  # what is kept of every image and teacher, in this order
Scores = NDArray[np.float32]


@dataclass
class Progress:
    """How far a run came.

    Attributes:
        measured: per teacher, how many positions of the order it has seen: all of [0, measured).
        dropped: the teachers that are out, with the image count at which they left.
        finished: the reason why the run ended, or None.
        usable: per teacher, how many images its mean token holds so far.
        token_sums: per teacher, the float64 sum (C,) of the images' mean tokens, added in image order.
    """

    measured: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    finished: str | None = None
    usable: dict[str, int] = field(default_factory=dict)
    token_sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)


class ScoreTable:
    """Scores of (image, teacher), in chunks of rows; NaN where nothing was measured.

    Args:
        teachers: names, in the order of the columns.
        key_of: the key of the image at a position; None where the source is a stream, whose keys are
            recorded as they come.
        folder: where to store it; None keeps it in memory.
    """

    def __init__(
        self, teachers: list[str], key_of: Callable[[int], str] | None, folder: Path | None = None
    ) -> None:
        self.teachers = teachers
        self.folder = folder
        self.progress = Progress(dict.fromkeys(teachers, 0), usable=dict.fromkeys(teachers, 0))
        self.reasons: dict[int, str] = {}  # position -> why the image cannot be used
        self._key_of = key_of
        self._keys: dict[int, str] = {}
        self._chunks: list[Scores] = []  # each (CHUNK, T, len(MEASURES))
        self._changed: set[int] = set()

    @property
    def front(self) -> int:
        """Positions that at least one teacher has seen."""
        return max(self.progress.measured.values(), default=0)

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

    def forget(self, column: int, start: int) -> None:
        """Clear a teacher's scores from a position on: it was dropped there."""
        for number, chunk in enumerate(self._chunks):
            inside = max(start - number * CHUNK, 0)
            if inside < CHUNK and not np.isnan(chunk[inside:, column]).all():
                chunk[inside:, column] = np.nan
                self._changed.add(number)

    def truncate(self, stop: int) -> None:
        """Forget every image from a position on: the run ended there."""
        for column in range(len(self.teachers)):
            self.forget(column, stop)
        self.reasons = {p: reason for p, reason in self.reasons.items() if p < stop}

    def unusable(self, stop: int) -> int:
        """How many of the first `stop` images cannot be used."""
        return sum(position < stop for position in self.reasons)

    def save(self) -> None:
        """Store what changed; the progress goes last, once all that it counts is on the disk.

        Raises:
            RunError: the disk is full or not writable. What was stored before stays whole.
        """
        if self.folder is None:
            return
        for number in sorted(self._changed):
            write_whole(self.folder / f"scores-{number:05d}.parquet", self._parquet(number))
        self._changed.clear()
        progress = self.progress
        fields = {k: getattr(progress, k) for k in ("measured", "dropped", "finished", "usable")}
        sums = {name: np.ascontiguousarray(total) for name, total in progress.token_sums.items()}
        data = safetensors.numpy.save(sums, metadata={"progress": json.dumps(fields)})
        write_whole(self.folder / "progress.safetensors", data)

    def load(self) -> None:
        """Take up what `save` stored, for those of its teachers that are among this table's.

        A damaged chunk, which a power cut can leave on a disk that does not keep its promises, ends the
        measured stretch before it, and one with too few rows ends it there: what is missing is measured
        again. So are all images where the mean tokens hold some of these, as a sum cannot be taken apart.
        """
        assert self.folder is not None, "a table in memory has nothing to load"
        path = self.folder / "progress.safetensors"
        if not path.is_file():
            return
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                stored = json.loads(file.metadata()["progress"])
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError, KeyError, ValueError):
            return
        end = max(stored["measured"].values(), default=0)
        for number in range(-(-end // CHUNK)):
            start = number * CHUNK
            rows = self._load_chunk(number)
            if start + rows < min(start + CHUNK, end):
                end = start + rows
                break
        whole = end == max(stored["measured"].values(), default=0)
        if end - self.unusable(end) < max(stored["usable"].values(), default=0):
            self.reasons.clear()
            return
        names = set(self.teachers)
        progress = self.progress
        progress.measured |= {k: min(v, end) for k, v in stored["measured"].items() if k in names}
        progress.usable |= {k: v for k, v in stored["usable"].items() if k in names}
        progress.token_sums = {k: v for k, v in sums.items() if k in names}
        progress.dropped = {k: v for k, v in stored["dropped"].items() if k in names and v <= end}
        progress.finished = stored["finished"] if whole else None
        self.reasons = {p: r for p, r in self.reasons.items() if p < end}

    def _load_chunk(self, number: int) -> int:
        """Take up a stored chunk; returns how many rows it holds, 0 where it is damaged."""
        assert self.folder is not None
        try:
            path = self.folder / f"scores-{number:05d}.parquet"
            table = pq.read_table(path, page_checksum_verification=True)
        except (OSError, pa.ArrowException):
            return 0
        columns = [
            n
            for n, name in enumerate(self.teachers)
            if f"{MEASURES[0]}:{name}" in table.column_names
        ]
        scores = np.full((len(table), len(columns), len(MEASURES)), np.nan, np.float32)
        for place, column in enumerate(columns):
            for index, measure in enumerate(MEASURES):
                values = table.column(f"{measure}:{self.teachers[column]}")
                scores[:, place, index] = values.to_numpy(zero_copy_only=False)
        self.record(
            table.column("position").to_numpy(),
            table.column("key").to_pylist(),
            table.column("reason").to_pylist(),
            columns,
            scores,
        )
        self._changed.discard(number)
        return len(table)

    def _parquet(self, number: int) -> bytes:
        start = number * CHUNK
        stop = max(start, min(start + CHUNK, self.front))  # a run may end before what it measured
        positions = range(start, stop)
        columns: dict[str, Any] = {
            "position": np.arange(start, stop),
            "key": [self.key(p) for p in positions],
            "reason": pa.array([self.reasons.get(p) for p in positions], pa.string()),
        }
        for column, name in enumerate(self.teachers):
            for index, measure in enumerate(MEASURES):
                values = self._chunks[number][: stop - start, column, index]
                columns[f"{measure}:{name}"] = pa.array(values, from_pandas=True)
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer, write_page_checksum=True)
        return buffer.getvalue()


def write_skipped(path: Path, skipped: Iterable[tuple[str, str]]) -> None:
    """Write skipped.csv: the keys of images that could not be used, and why."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", "reason"])
    writer.writerows(skipped)
    write_whole(path, text.getvalue())


def write_whole(path: Path, data: bytes | str | Callable[[BinaryIO], None]) -> None:
    """Write a file so that it is either the old one or the new one, also after a power cut.

    Args:
        data: the content, or a function that writes it bit by bit.

    Raises:
        RunError: the disk is full, or the place cannot be written to.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else (error.strerror or str(error))
        remedy = "free some space" if full else "make it writable"
        raise RunError(
            f"cannot write '{path}': {why}; what was saved before is whole: {remedy}, and the same command goes on"
        ) from None
