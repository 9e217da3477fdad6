"""The main job: stream images through every teacher, score them, and stop when the order is known.

    DATA -> Batch(views, positions, keys) -> Teacher -> tokens -> similarity -> score array -> certificate

An image is decoded once for all teachers. With several processes, process r takes the positions p of the order
with p % world == r; rank 0 gathers the scores, judges them at fixed image counts (looks), stores them, and tells
the others how to go on, so that all of them stop at the same image whatever their number and batch size.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tokdiv.autotune import choose_batch_size, compiles, expected_images
from tokdiv.certify import Certificate, OrderCertifier, look_schedule
from tokdiv.data.loader import Batch, Source, permutation, read_batches
from tokdiv.data.open import open_source
from tokdiv.dist import Processes, choose_dtype, processes
from tokdiv.errors import Interrupted, RunError, SharedError, UsageError
from tokdiv.ranking import (
    Ranking,
    certified_best,
    decided_pairs,
    eligible_teachers,
    make_ranking,
    open_run,
    stored_batch_size,
    stored_rates,
    write_config,
)
from tokdiv.scores import MEASURES, Scores, ScoreTable
from tokdiv.similarity import pooled_similarity, token_similarity
from tokdiv.teachers.load import load_teachers
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher

MEAN_IMAGES = 256  # usable images that the mean token of `centred_similarity` is taken from
SAVE_SECONDS = 12  # the first step to end later than this after a store is stored as well
STEP_SECONDS = (
    15  # a slower step is halved, so that at most the sum of both can be lost: under half a minute
)
ENDLESS = 1 << 40  # stands for the length of a stream that does not tell it


@dataclass(frozen=True)
class Settings:
    """How to rank; the command line's options (see `tokdiv rank --help`)."""

    max_images: int | None = None
    confidence: float = 0.99
    certify: Literal["order", "best", "none"] = "order"
    tie: float = 0.002
    batch_size: int | Literal["auto"] = "auto"
    workers: int | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    seed: int = 0
    image_size: int | Literal["native"] | None = None
    allow_baselines: bool = False

    def __post_init__(self) -> None:
        choices = {"certify": ("order", "best", "none"), "dtype": ("auto", "float32", "bfloat16")}
        for name, allowed in {**choices, "compile": ("auto", "on", "off")}.items():
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"{name} = {getattr(self, name)!r}: expected one of {', '.join(allowed)}"
                )
        for name in ("confidence", "tie"):
            if not isinstance(getattr(self, name), (int, float)):
                raise UsageError(f"{name} = {getattr(self, name)!r}: expected a number")
        if not 0.5 < self.confidence < 1:
            raise UsageError(
                f"confidence = {self.confidence}: expected a number between 0.5 and 1, as 0.99"
            )
        if not 0 <= self.tie < 1:
            raise UsageError(f"tie = {self.tie}: expected a number from 0 to 1, as 0.002")
        for name in ("max_images", "batch_size", "workers"):
            value = getattr(self, name)
            if value is None or (name == "batch_size" and value == "auto"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                auto = " or 'auto'" if name == "batch_size" else ""
                raise UsageError(f"{name} = {value!r}: expected 1 or more{auto}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"seed = {self.seed!r}: expected 0 or more")
        size = self.image_size
        if size not in (None, "native") and not (isinstance(size, int) and size >= 1):
            raise UsageError(f"image_size = {size!r}: expected pixels, or 'native'")


def rank(
    data: str | os.PathLike[str],
    teachers: Sequence[str | TeacherSpec | Teacher],
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = True,
    **settings: Any,
) -> Ranking:
    """Rank teachers by the diversity of their tokens on the user's images.

    Args:
        data: a folder of images, a .tar, shards, or a data set in timm's notation (`tokdiv.data.loader`).
        teachers: SPECs, TeacherSpecs, or Teachers made in code; labels must be unique.
        out: the folder RUN to write and to resume from; None keeps everything in memory.
        resume: go on with the RUN that is there; False moves it to RUN.bak-N.
        **settings: the fields of `Settings`, as max_images=1000.

    Returns:
        The ranking: `.table` (a DataFrame, best first), `.best` (a TeacherSpec), `.certificate`.

    Raises:
        UsageError: a mistake in the call, a RUN of other settings, data or weights.
        RunError: no usable image, a teacher that yields NaN, a full disk, a lost process.
        Interrupted: SIGINT or SIGTERM came; the state is stored.
    """
    unknown = set(settings) - {f.name for f in dataclasses.fields(Settings)}
    if unknown:
        raise UsageError(f"rank() takes no setting '{unknown.pop()}'")
    chosen = Settings(**settings)
    with (
        processes(chosen.device) as group,
        _interruptible() as interruption,
        contextlib.ExitStack() as stack,
    ):
        source = open_source(os.fspath(data))
        warned = _warn(source.warnings, group)
        chosen = dataclasses.replace(chosen, dtype=choose_dtype(chosen.dtype, group.device))  # type: ignore[arg-type]
        images = expected_images(source.count, chosen.max_images, chosen.certify)
        share = None if images is None else -(-images // group.world)  # of this process
        loaded = _load(teachers, chosen, share, group)
        order = (
            permutation(source.count, chosen.seed) if source.permutable and source.count else None
        )
        judge = None
        if group.rank == 0:
            key_of = (
                (lambda position: source.key(int(order[position]))) if order is not None else None
            )
            folder = None
            if out:
                if chosen.batch_size == "auto" and resume:
                    chosen = dataclasses.replace(
                        chosen, batch_size=stored_batch_size(out) or "auto"
                    )
                run = open_run(out, source, chosen, [t.spec for t in loaded], resume)
                folder = stack.enter_context(run)
            table = ScoreTable([t.name for t in loaded], key_of, folder)
            if folder is not None:
                table.load()
            judge = _Judge(table, loaded, source, chosen)
        size = group.broadcast(chosen.batch_size)
        if size == "auto" and group.broadcast(judge is not None and judge.plan() is not None):
            size = group.broadcast(choose_batch_size(loaded, share))
            chosen = dataclasses.replace(chosen, batch_size=size)
            if judge is not None and out:
                write_config(out, source, chosen, [t.spec for t in loaded])
        worker = _Worker(loaded, source, order, chosen, group, interruption)
        _measure(judge, worker)
        if judge is None:
            return group.broadcast(None)
        rates = {
            name: worker.images[name] / s * group.world for name, s in worker.seconds.items() if s
        }
        dtypes = {t.name: str(t.dtype).removeprefix("torch.") for t in loaded}
        ranking = make_ranking(
            judge.table,
            judge.certifier.certificate(),
            [t.spec for t in loaded],
            source,
            chosen,
            dtypes,
            rates,
        )
        _warn(source.warnings[warned:], group)
        if out:
            write_config(out, source, chosen, [t.spec for t in loaded], rates)
            ranking = dataclasses.replace(ranking, rates=stored_rates(out))
            ranking.write(Path(out), judge.table)
        group.broadcast(ranking)
    if out:
        _report(Path(out), ranking, source, loaded)
    return ranking


def _report(folder: Path, ranking: Ranking, source: Source, teachers: list[Teacher]) -> None:
    """Show the run, which is whole: what fails in drawing it is said and spoils nothing."""
    try:
        from tokdiv.report.build import FILES, write_report

        for name in FILES:  # those of an earlier end would show another ranking
            (folder / name).unlink(missing_ok=True)
        write_report(folder, ranking, source=source, teachers=teachers)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        print(
            f"warning: {folder} is whole, but its report could not be written ({reason}): "
            f"`tokdiv report {folder}` tries again",
            file=sys.stderr,
        )


def _warn(warnings: Sequence[str], group: Processes) -> int:
    """Print warnings once, by the first process; returns how many there were."""
    for warning in warnings if group.rank == 0 else ():
        print(f"warning: {warning}", file=sys.stderr)
    return len(warnings)


def _measure(judge: "_Judge | None", worker: "_Worker") -> None:
    """Plan, measure, judge, until nothing is left to measure or to learn. `judge` is rank 0's alone."""
    group = worker.group
    if judge:
        judge.rows = judge.batch_size = worker.batch_size
    total = judge.limit if judge and judge.limit < ENDLESS else None
    done = judge.table.front if judge else 0
    with tqdm(total=total, initial=done, unit="image", disable=None if judge else True) as bar:
        while plan := group.broadcast(judge.plan() if judge else None):
            worker.rows = worker.rows or worker.batch_size
            steps = worker.steps(plan)
            for start, stop, step in steps:
                shares = group.gather(step)
                answer = judge.judge(shares, plan, start, stop) if judge and shares else None
                verdict: _Verdict = group.broadcast(answer)
                bar.update(max(0, stop - bar.n))
                if verdict.error:
                    raise SharedError(verdict.error)
                if verdict.signal:
                    raise Interrupted(verdict.signal, f"{stop:,} images")
                if verdict.replan:
                    break
                worker.active, worker.rows = verdict.active, verdict.rows
            steps.close()


def _load(
    teachers: Sequence[str | TeacherSpec | Teacher],
    settings: Settings,
    images: int | None,
    group: Processes,
) -> list[Teacher]:
    """Every teacher on its device; K = 1 is an error, as no pair of tokens exists.

    Args:
        images: how many this process is likely to measure; None where nobody knows.
    """
    compiled = compiles(settings.compile, group.device, images)
    loaded = load_teachers(teachers, image_size=settings.image_size)
    for teacher in loaded:
        if teacher.name in ("position", "key"):  # columns of scores.parquet
            raise UsageError(
                f"{teacher.name}: this label names another column of the scores; write LABEL=SPEC"
            )
        if teacher.num_tokens < 2:
            raise UsageError(
                f"{teacher.name} gives K = 1 token at {teacher.size} px: token similarity is undefined; "
                f"use a larger --image-size or an earlier block (:blocks=N)"
            )
        teacher.prepare(group.device, settings.dtype, compiled)
    return loaded


@dataclass(frozen=True)
class _Step:
    """What one process measured of a step: a stretch of positions, shared out over the processes.

    scores: (n, A, 3) float32 for the A active teachers, NaN for unusable images. mean_tokens: per active
    teacher (num_usable, C), while the mean token is being taken. signal: that came meanwhile, or 0.
    """

    positions: NDArray[np.int64]
    keys: list[str]
    reasons: list[str | None]
    scores: Scores
    mean_tokens: list[NDArray[np.float32]]
    signal: int


@dataclass(frozen=True)
class _Plan:
    """The next positions to measure, [start, stop), by the teachers in the columns `active`.

    means: the mean token (C,) of each; None while it is being taken.
    """

    start: int
    stop: int
    active: list[int]
    means: list[NDArray[np.float32]] | None


@dataclass(frozen=True)
class _Verdict:
    """Rank 0's answer to a step: who goes on, in steps of how many rows a process, or why it ends."""

    active: list[int]
    rows: int
    replan: bool = False
    signal: int = 0
    error: str | None = None


class _Judge:
    """Rank 0's part: enter scores, judge them at the looks, store them, say how to go on.

    `batch_size`, and `rows`, the images that a process takes in a step, are settled once there is something to
    measure.
    """

    rows = batch_size = 1

    def __init__(
        self, table: ScoreTable, teachers: list[Teacher], source: Source, settings: Settings
    ) -> None:
        self.table = table
        self.teachers = teachers
        self.settings = settings
        self.mode = settings.certify if len(teachers) > 1 else "none"
        self.limit = min(settings.max_images or ENDLESS, source.count or ENDLESS)
        self.looks = np.fromiter(look_schedule(self.limit), np.int64)
        self.judged = 0
        self.certifier = OrderCertifier(
            len(teachers),
            source.count,
            delta=1 - settings.confidence,
            tie=settings.tie,
            lower=-1 / (min(t.num_tokens for t in teachers) - 1),
            upper=1.0,
            approximate=not source.permutable,
        )
        self.eligible = eligible_teachers([t.spec for t in teachers], settings.allow_baselines)
        # A resumed run goes on at the images it has: earlier looks were judged when they were due. The
        # last one is judged anew, as more images may be allowed, or a teacher joined.
        self.resumed = table.front
        table.progress.finished = None
        self._saved = self._answered = time.monotonic()

    @property
    def active(self) -> list[int]:
        """The columns of the teachers that are still measured."""
        return [n for n, t in enumerate(self.teachers) if t.name not in self.table.progress.dropped]

    def plan(self) -> _Plan | None:
        """What to measure next; None when nothing is left to measure or to learn.

        A teacher that joined later is first brought to where the others are, on the same images. And a
        plan ends where the mean token is complete: it never holds more than the images still wanted.
        """
        self._look()
        progress = self.table.progress
        measured = {n: progress.measured[self.teachers[n].name] for n in self.active}
        start = min(measured.values())
        if not progress.finished and start >= self.limit:
            progress.finished = "every image"  # a stream ended at a look that was judged before
        if progress.finished:
            return None
        active = [n for n, count in measured.items() if count == start]
        stop = min([self.limit, *(count for count in measured.values() if count > start)])
        wanted = MEAN_IMAGES - progress.usable[self.teachers[active[0]].name]
        if wanted > 0:
            return _Plan(start, min(stop, start + wanted), active, None)
        sums = [progress.token_sums[self.teachers[n].name] for n in active]
        return _Plan(
            start, stop, active, [(total / MEAN_IMAGES).astype(np.float32) for total in sums]
        )

    def judge(self, steps: list[_Step], plan: _Plan, start: int, stop: int) -> _Verdict:
        """Enter the scores of the positions [start, stop), and judge every look that they complete."""
        progress = self.table.progress
        columns = plan.active
        gone = [place for place, n in enumerate(columns) if n not in self.active]
        for step in steps:
            step.scores[:, gone] = np.nan  # launched on a GPU before they were dropped
            self.table.record(step.positions, step.keys, step.reasons, columns, step.scores)
        positions = np.sort(np.concatenate([step.positions for step in steps]))
        if len(positions) < stop - start:  # a stream ended
            stop = self.limit = start + len(positions)
            self.looks = np.fromiter(look_schedule(self.limit), np.int64)
        error = self._check(steps, columns)
        if error:
            stop = error[0]
        for n in columns:
            if n in self.active:
                progress.measured[self.teachers[n].name] = stop
        looked = self._look()
        if plan.means is None:
            self._add_mean_tokens(steps, columns)
        # What lies behind the look that ends the run, or drops the teacher, does not count.
        moot = error is not None and (progress.finished is not None or error[1] not in self.active)
        error = None if moot else error
        signal_number = max(step.signal for step in steps)
        now = time.monotonic()
        if now - self._answered > STEP_SECONDS:
            self.rows = max(1, self.rows // 2)
        elif now - self._answered < STEP_SECONDS / 2.5:
            self.rows = min(self.batch_size, self.rows * 2)
        ends = bool(progress.finished or error or signal_number)
        if looked or ends or now - self._saved > SAVE_SECONDS:
            self.table.save()
            self._saved = time.monotonic()
        self._answered = time.monotonic()
        return _Verdict(
            [n for n in columns if n in self.active],
            self.rows,
            replan=progress.finished is not None or moot or stop >= min(plan.stop, self.limit),
            signal=signal_number,
            error=error[2] if error else None,
        )

    def _check(self, steps: list[_Step], columns: list[int]) -> tuple[int, int, str] | None:
        """The first usable image with a score that is not a number, whose it is, and what to say of it."""
        found = []
        for step in steps:
            usable = np.array([reason is None for reason in step.reasons], dtype=bool)
            for place, n in enumerate(columns):
                if n in self.active:
                    for row in np.flatnonzero(usable & np.isnan(step.scores[:, place, 0]))[:1]:
                        found.append((int(step.positions[row]), n, step.keys[row]))
        if not found:
            return None
        position, n, key = min(found)
        return (
            position,
            n,
            f"{self.teachers[n].name} gives NaN or infinite tokens for the image '{key}': its weights are "
            f"damaged, or the network does not bear --dtype {self.settings.dtype}",
        )

    def _add_mean_tokens(self, steps: list[_Step], columns: list[int]) -> None:
        """Add images one by one in their order, so that the sum is the same for any number of processes.

        Those behind the look that ended the run are left out, as their scores are: another teacher may
        join, and the run go on from that look.
        """
        rows: list[tuple[int, list[NDArray[np.float32]]]] = []
        for step in steps:
            usable = [
                p for p, reason in zip(step.positions.tolist(), step.reasons) if reason is None
            ]
            rows += [(p, [tokens[i] for tokens in step.mean_tokens]) for i, p in enumerate(usable)]
        progress = self.table.progress
        for position, tokens in sorted(rows, key=lambda row: row[0]):
            for place, n in enumerate(columns):
                name = self.teachers[n].name
                if position >= progress.measured[name]:
                    continue
                total = progress.token_sums.get(name, np.zeros(len(tokens[place])))
                progress.token_sums[name] = total + tokens[place]
                progress.usable[name] += 1

    def _look(self) -> bool:
        """Judge every look up to where all teachers are measured; whether there was one."""
        progress, looked = self.table.progress, False
        while progress.finished is None:
            front = min(progress.measured[self.teachers[n].name] for n in self.active)
            ahead = self.looks[self.looks >= max(self.judged + 1, self.resumed)]
            if not len(ahead) or ahead[0] > front:
                break
            look = int(ahead[0])
            self.certifier.update(self.table.rows(self.judged, look))
            self.judged = look
            looked = True
            dropped = self._decide(self.certifier.certificate())
            for n in dropped:
                progress.dropped[self.teachers[n].name] = look
                progress.measured[self.teachers[n].name] = look
                self.table.forget(n, look)
            if progress.finished:
                for name, count in progress.measured.items():
                    progress.measured[name] = min(count, look)
                self.table.truncate(look)
        return looked

    def _decide(self, certificate: Certificate) -> list[int]:
        """Whether the run is over, and which teachers are certified not to be the best."""
        progress = self.table.progress
        if self.judged >= self.limit:
            progress.finished = (
                "every image"
                if self.limit < (self.settings.max_images or ENDLESS)
                else "max images"
            )
        if self.mode == "order" and certificate.certified:
            progress.finished = "order certified"
        if self.mode == "best" and certified_best(certificate, self.eligible):
            progress.finished = "best certified"
        # At the limit nothing is saved by a drop, and with more images allowed the next look is another.
        if self.mode != "best" or self.judged >= self.limit:
            return []
        better = decided_pairs(certificate)
        return [m for m in self.active if any((n, m) in better for n in self.eligible)]


@dataclass
class _Worker:
    """Every process's part: decode, forward, score."""

    teachers: list[Teacher]
    source: Source
    order: NDArray[np.int64] | None
    settings: Settings
    group: Processes
    interruption: "_Interruption"
    active: list[int] = field(default_factory=list)
    rows: int = 0  # images a process takes in one step
    images: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        auto = self.settings.batch_size == "auto"  # a run with nothing left to measure
        self.batch_size = 1 if auto else int(self.settings.batch_size)

    def steps(self, plan: _Plan) -> Generator[tuple[int, int, _Step], None, None]:
        """Measure a plan step by step: (start, stop) of the positions, and this process's share of them.

        On a GPU the next step is launched before the scores of this one are waited for.
        """
        self.active = plan.active
        device = self.group.device
        means = [torch.from_numpy(mean).to(device) for mean in plan.means] if plan.means else None
        spans = _spans(plan.start, plan.stop, self.batch_size * self.group.world)
        batches = read_batches(
            self.source,
            self.order,
            (np.arange(start, stop)[self._own(start, stop)] for start, stop in spans),
            {self.teachers[n].size for n in plan.active},
            workers=self.settings.workers
            or max(1, (os.cpu_count() or 1) // self.group.local_world),
            seed=self.settings.seed,
            pin_memory=device.type == "cuda",
        )
        in_flight: deque[tuple[int, int, _Launched]] = deque()
        try:
            moved = _on_device(batches, device)
            for start, stop in _spans(plan.start, plan.stop, self.batch_size * self.group.world):
                batch = next(moved, None)  # None past the end of a stream
                while start < stop:
                    cut = min(start + self.rows * self.group.world, stop)
                    piece = None
                    if batch is not None:
                        piece, batch = batch.split(int(np.searchsorted(batch.positions, cut)))
                    in_flight.append((start, cut, self._launch(piece, means, plan.active)))
                    if len(in_flight) > (device.type == "cuda"):
                        begin, end, launched = in_flight.popleft()
                        yield begin, end, launched.finish()
                    start = cut
            for begin, end, launched in in_flight:
                yield begin, end, launched.finish()
        finally:
            batches.close()

    def _own(self, start: int, stop: int) -> NDArray[np.bool_]:
        return np.arange(start, stop) % self.group.world == self.group.rank

    def _launch(
        self, piece: Batch | None, means: list[Tensor] | None, columns: list[int]
    ) -> "_Launched":
        """Start the forward passes and the scores of a piece; on a GPU they run on while this returns."""
        if piece is None:
            return _Launched(None, [], [], self)
        num_usable = int(piece.usable.sum())
        device = self.group.device
        scores = [
            torch.full((num_usable, len(MEASURES)), torch.nan, device=device) for _ in columns
        ]
        mean_tokens = [
            torch.zeros(num_usable, self.teachers[n].dim, device=device) for n in columns
        ]
        clocks = []
        for place, n in enumerate(columns):
            if n not in self.active or not num_usable:
                continue
            teacher = self.teachers[n]
            begun = _clock(device)
            with torch.inference_mode():
                tokens = teacher(piece.views[teacher.size])
                expected = (num_usable, teacher.num_tokens, teacher.dim)
                if tokens.shape != expected:  # code of the user's own may do so
                    raise RunError(
                        f"{teacher.name} gave tokens of shape {tuple(tokens.shape)}, expected {expected} as "
                        f"for a black image"
                    )
                scores[place][:, 0] = token_similarity(tokens)
                if means is None:
                    mean_tokens[place] = tokens.float().mean(dim=1)
                else:
                    scores[place][:, 1] = token_similarity(tokens.float() - means[place])
                pooled = pooled_similarity(tokens, teacher.grid)
                if pooled is not None:
                    scores[place][:, 2] = pooled
            clocks.append((teacher.name, begun, _clock(device)))
            self.images[teacher.name] += num_usable
        return _Launched(piece, scores, mean_tokens if means is None else [], self, clocks)


@dataclass
class _Launched:
    """A piece on its way: its scores may still be under way on the GPU."""

    piece: Batch | None
    scores: list[Tensor]
    mean_tokens: list[Tensor]
    worker: _Worker
    clocks: list[tuple[str, Any, Any]] = field(default_factory=list)

    def finish(self) -> _Step:
        """Wait for the scores, and bring them to the CPU."""
        signal_number = self.worker.interruption.number
        if self.piece is None:
            empty = np.empty((0, len(self.worker.active), len(MEASURES)), np.float32)
            return _Step(np.empty(0, np.int64), [], [], empty, [], signal_number)
        piece = self.piece
        scores = np.full((len(piece), len(self.scores), len(MEASURES)), np.nan, np.float32)
        if self.scores:
            scores[piece.usable] = torch.stack(self.scores, dim=1).cpu().numpy()
        for name, begun, ended in self.clocks:
            self.worker.seconds[name] += _seconds(begun, ended)
        means = [tokens.cpu().numpy() for tokens in self.mean_tokens]
        return _Step(piece.positions, piece.keys, piece.reasons, scores, means, signal_number)


def _spans(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    while start < stop:
        yield start, min(start + length, stop)
        start += length


def _on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches with their views on the device; on CUDA the copy overlaps the forward pass before it."""
    if device.type == "cpu":
        yield from batches
        return
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        views = {}
        for size, view in batch.views.items():
            if copies is None:
                views[size] = view.to(device)
                continue
            with torch.cuda.stream(copies):
                views[size] = view.to(device, non_blocking=True)
            views[size].record_stream(torch.cuda.current_stream(device))
        if copies is not None:
            torch.cuda.current_stream(device).wait_stream(copies)
        yield dataclasses.replace(batch, views=views)


def _clock(device: torch.device) -> Any:
    """A point in time: of the GPU's stream where there is one, so that nothing has to wait for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begun: Any, ended: Any) -> float:
    return ended - begun if isinstance(begun, float) else begun.elapsed_time(ended) / 1000


@dataclass
class _Interruption:
    """The signal that asked to stop, or 0."""

    number: int = 0


@contextlib.contextmanager
def _interruptible() -> Iterator[_Interruption]:
    """Note SIGINT and SIGTERM instead of dying of them; a second SIGINT ends at once."""
    interruption = _Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # signals go to the main thread, which is the caller's
        return

    def note(number: int, frame: Any) -> None:
        if interruption.number == signal.SIGINT == number:
            raise KeyboardInterrupt
        interruption.number = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
