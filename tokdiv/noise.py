"""Which teachers are noise-like: the correspondence phase of a ranking, before the images are scored.

    DATA -> two crops an image -> Teacher -> tokens -> correspondence, beside that of raw pixels on the same grid

The first usable images of the run's order are cropped twice, the same for all teachers (`tokdiv.correspondence`).
A teacher that does not find places better than raw pixels do is noise-like, and does not win. The phase has its own
small table in RUN/state, and is resumed like the scores.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokdiv.certify import confidence_sequence
from tokdiv.config import Settings
from tokdiv.correspondence import correspondence, crop_views, draw_crops, pixel_cells
from tokdiv.data.loader import fill_batches
from tokdiv.data.source import Source
from tokdiv.dist import Interruption, Processes, default_workers
from tokdiv.errors import Interrupted, RunError
from tokdiv.progress import progress_bar
from tokdiv.run_dir import digest, write_atomic
from tokdiv.similarity import local_minus_distant, outlier_share
from tokdiv.teachers.teacher import Teacher

MARGIN = 0.02  # a teacher has to find this much more of the tokens than raw pixels do
LOOKS = 4  # looks at undecided teachers between the asked number of images and twice that
BATCH = 32  # images of a step and process, two views each
MEASURES = ("correspondence", "pixels", "outliers", "local_minus_distant")  # per image and teacher
FILE = "correspondence.parquet"


@dataclass(frozen=True)
class Correspondence:
    """What the phase found out about one teacher.

    Attributes:
        correspondence: mean over the images, in [0, 1]; low, high: its confidence sequence.
        pixels: the same of raw pixels on this teacher's grid, on the same crops.
        noise_like: True or False once that is certain, else None.
        images: usable images measured.
        outlier_tokens: share of the tokens whose norm is over 4 times the median norm of their image.
        local_minus_distant: mean cosine of near tokens minus that of distant ones (LDS).
    """

    correspondence: float
    low: float
    high: float
    pixels: float
    noise_like: bool | None
    images: int
    outlier_tokens: float
    local_minus_distant: float


@dataclass
class Table:
    """The images of the phase in the order of the run, on the first process.

    Attributes:
        teachers: labels.
        num_seen: positions that were read, unusable ones included.
        positions: of the usable images, ascending.
        scores: (n, T, len(MEASURES)) float32; NaN where so coarse a grid has no token in both crops.
    """

    teachers: list[str]
    num_seen: int = 0
    positions: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    scores: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        self.scores = np.empty((0, len(self.teachers), len(MEASURES)), np.float32)

    def extend(self, shares: Sequence["_Share"], stop: int) -> None:
        """Enter the positions up to `stop`, which all processes measured together."""
        positions = np.concatenate([share.positions for share in shares])
        order = np.argsort(positions)
        scores = np.concatenate([share.scores for share in shares])
        self.positions = np.concatenate([self.positions, positions[order]])
        self.scores = np.concatenate([self.scores, scores[order]])
        self.num_seen = stop


def measure_correspondence(
    teachers: Sequence[Teacher],
    source: Source,
    order: NDArray[np.int64] | None,
    settings: Settings,
    group: Processes,
    interruption: Interruption,
    run: Path | None,
) -> dict[str, Correspondence]:
    """Measure the correspondence of each teacher on the first usable images.

    They are `settings.correspondence_images`, and up to twice as many while it is not certain for a trained teacher
    whether it is noise-like.

    Args:
        order: position -> index into the source; None for a stream.
        run: the folder RUN, where the phase is stored; None keeps it in memory.

    Returns:
        For each label what was found, on every process; empty where no image is to be measured or can be used.

    Raises:
        Interrupted: a signal came; everything measured is stored.
        RunError: a teacher gives NaN, the disk is full, another process is gone.
    """
    wanted = settings.correspondence_images
    if not wanted:
        return {}
    phase = _Phase(teachers, source, settings, run)
    if run:
        group.on_first(phase.load)
    with progress_bar(
        total=min(wanted, source.count or wanted),
        desc="correspondence",
        unit="image",
        show=group.rank == 0,
    ) as bar:
        while span := group.on_first(phase.next_span):
            for start, share in _measure(span, teachers, source, order, settings, group):
                stop = min(start + BATCH * group.world, span[1])
                shares = group.gather(share)
                group.on_first(phase.take, shares, stop)
                bar.update(max(0, group.on_first(phase.__len__) - bar.n))
                if signal := group.max(interruption.signal):
                    raise Interrupted(signal, f"{start:,} images of the correspondence phase")
    return group.on_first(phase.results)


class _Phase:
    """The first process's part: what to measure next, the table, what it proves."""

    def __init__(
        self,
        teachers: Sequence[Teacher],
        source: Source,
        settings: Settings,
        run: Path | None,
    ) -> None:
        self.teachers, self.source, self.settings = teachers, source, settings
        self.table = Table([teacher.name for teacher in teachers])
        self.file = run / "state" / FILE if run else None
        self.identity = digest(
            {
                "data": source.fingerprint,
                "seed": settings.seed,
                "dtype": settings.dtype,
                "teachers": [{"name": t.name, **t.spec.identity()} for t in teachers],
            }
        )
        self.ended = False  # a stream did

    def __len__(self) -> int:
        return len(self.table.positions)

    def next_span(self) -> tuple[int, int] | None:
        """The next positions; None once enough is measured, or nothing is left.

        A span ends where a look is due, whatever the batch size, so that a run always stops at the same image.
        """
        wanted, have = self.settings.correspondence_images, len(self)
        looks = [wanted + wanted * n // LOOKS for n in range(LOOKS + 1)]
        due = next((look for look in looks if look > have), None)
        left = None if self.source.count is None else self.source.count - self.table.num_seen
        if due is None or left == 0 or self.ended or (have >= wanted and not self._undecided()):
            return None
        length = due - have if left is None else min(due - have, left)
        return self.table.num_seen, self.table.num_seen + length

    def _undecided(self) -> bool:
        found = self.results()
        return any(found[t.name].noise_like is None for t in self.teachers if not t.spec.baseline)

    def take(self, shares: list["_Share"], stop: int) -> None:
        """Enter a step and store it.

        Raises:
            RunError: a teacher gave NaN, or the disk is full.
        """
        read = sum(share.num_read for share in shares)
        if self.table.num_seen + read < stop:
            stop, self.ended = self.table.num_seen + read, True
        for share in shares:
            if share.nan:
                raise RunError(
                    f"{share.nan} gives NaN or infinite tokens for a crop: its weights are damaged, or the network "
                    f"cannot compute in --dtype {self.settings.dtype}"
                )
        self.table.extend(shares, stop)
        self.save()

    def results(self) -> dict[str, Correspondence]:
        """What the images so far say of each teacher."""
        if not len(self):
            return {}
        alpha = (1 - self.settings.confidence) / len(self.teachers)
        return {
            name: _result(self.table.scores[:, column].astype(np.float64), alpha)
            for column, name in enumerate(self.table.teachers)
        }

    def save(self) -> None:
        """Store the table."""
        if self.file is None:
            return
        columns = {"position": pa.array(self.table.positions)}
        for n, name in enumerate(self.table.teachers):
            for m, measure in enumerate(MEASURES):
                columns[f"{measure}:{name}"] = pa.array(self.table.scores[:, n, m])
        stored = pa.table(columns)
        about = {
            "identity": self.identity,
            "num_seen": str(self.table.num_seen),
            "content": _content_digest(self.identity, self.table),
        }
        buffer = io.BytesIO()
        pq.write_table(stored.replace_schema_metadata(about), buffer)
        self.file.parent.mkdir(exist_ok=True)
        write_atomic(self.file, buffer.getvalue())

    def load(self) -> None:
        """Read what `save` stored of the same run; anything else is measured again."""
        assert self.file is not None
        with contextlib.suppress(OSError, pa.ArrowException, KeyError, ValueError, TypeError):
            stored = pq.read_table(self.file)
            about = {k.decode(): v.decode() for k, v in (stored.schema.metadata or {}).items()}
            table = Table(self.table.teachers, int(about["num_seen"]))
            table.positions = stored.column("position").to_numpy().astype(np.int64)
            columns = [
                [stored.column(f"{measure}:{name}").to_numpy() for measure in MEASURES]
                for name in table.teachers
            ]
            table.scores = np.array(columns, np.float32).transpose(2, 0, 1)
            if about["content"] == _content_digest(self.identity, table):
                self.table = table


def _content_digest(identity: str, table: Table) -> str:
    """Binds the stored numbers to the run that they belong to."""
    numbers = (table.positions, np.ascontiguousarray(table.scores))
    return digest([identity, table.num_seen, *(array.tobytes().hex() for array in numbers)])


def _result(scores: NDArray[np.float64], alpha: float) -> Correspondence:
    """From (n, len(MEASURES)) scores of one teacher; alpha: the probability of each interval to be wrong."""
    found, pixels, outliers, near = scores.T
    low, high = _bounds(found, alpha, 0.0, 1.0)
    gain_low, gain_high = _bounds(found - pixels, alpha, -1.0, 1.0)
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a mean of nothing is NaN
        means = [float(np.nanmean(values)) for values in (found, pixels, outliers, near)]
    noise_like = False if gain_low > MARGIN else True if gain_high < MARGIN else None
    num_images = int((~np.isnan(found)).sum())
    return Correspondence(means[0], low, high, means[1], noise_like, num_images, *means[2:])


def _bounds(
    values: NDArray[np.float64], alpha: float, lower: float, upper: float
) -> tuple[float, float]:
    """The confidence sequence of a mean after all these images.

    As of draws from an endless source: the crops are drawn too, so that even all images of DATA are a sample.
    """
    times = np.array([len(values)])
    found = confidence_sequence(values, None, alpha, lower, upper, times=times)
    return float(found.low[-1]), float(found.high[-1])


# Measuring ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Share:
    """What one process measured of a step.

    positions: (n,) of its usable images. scores: (n, T, len(MEASURES)). num_read: images read, usable or not.
    nan: the label of a teacher that gave NaN, or "".
    """

    positions: NDArray[np.int64]
    scores: NDArray[np.float32]
    num_read: int
    nan: str


class _Crops:
    """The memory of a batch: both views of each image, for each size of view, and where they are."""

    def __init__(self, positions: NDArray[np.int64], sizes: set[int], seed: int) -> None:
        self.positions, self.seed = positions, seed
        self.views = {
            size: torch.empty(2, len(positions), 3, size, size, dtype=torch.uint8) for size in sizes
        }
        self.boxes = np.zeros((2, len(positions), 4), np.int64)

    def write(self, row: int, image: Tensor | None) -> None:
        if image is None:
            return
        crops = draw_crops(image.shape[1], image.shape[2], self.seed, int(self.positions[row]))
        self.boxes[0, row], self.boxes[1, row] = crops.first, crops.second
        for size, views in self.views.items():
            for side, view in enumerate(crop_views(image, crops, size)):
                views.numpy()[side, row] = view.numpy()


def _measure(
    span: tuple[int, int],
    teachers: Sequence[Teacher],
    source: Source,
    order: NDArray[np.int64] | None,
    settings: Settings,
    group: Processes,
) -> Iterator[tuple[int, _Share]]:
    """This process's share of each step of a span, with the position at which the step begins."""
    starts = range(*span, BATCH * group.world)
    sizes = {teacher.size for teacher in teachers}

    def own(start: int) -> NDArray[np.int64]:
        positions = np.arange(start, min(start + BATCH * group.world, span[1]))
        return positions[positions % group.world == group.rank]

    batches = fill_batches(
        source,
        order,
        (_Crops(own(start), sizes, settings.seed) for start in starts),
        workers=settings.workers or default_workers(),
        seed=settings.seed,
    )
    with contextlib.closing(batches):
        for start, filled in zip(starts, batches):
            usable = np.array([reason is None for reason in filled.reasons], dtype=bool)
            rows = np.flatnonzero(usable)
            yield start, _score(filled.batch, rows, len(usable), teachers, group.device)


@torch.inference_mode()
def _score(
    crops: _Crops,
    rows: NDArray[np.int64],
    num_read: int,
    teachers: Sequence[Teacher],
    device: torch.device,
) -> _Share:
    scores = np.full((len(rows), len(teachers), len(MEASURES)), np.nan, np.float32)
    box_a, box_b = torch.from_numpy(crops.boxes[:, rows])
    nan = ""
    for column, teacher in enumerate(teachers if len(rows) else ()):
        views = [crops.views[teacher.size][side][rows].to(device) for side in (0, 1)]
        first, second = (teacher(view) for view in views)
        if not (first.isfinite().all() and second.isfinite().all()):
            nan = nan or teacher.name
        cells_a, cells_b = (pixel_cells(teacher.normalize(v), teacher.grid) for v in views)
        values = (
            correspondence(first, second, box_a, box_b, teacher.grid),
            correspondence(cells_a, cells_b, box_a, box_b, teacher.grid),
            outlier_share(first),
            local_minus_distant(first, teacher.grid),
        )
        scores[:, column] = torch.stack([v.float().cpu() for v in values], dim=1).numpy()
    return _Share(crops.positions[rows], scores, num_read, nan)
