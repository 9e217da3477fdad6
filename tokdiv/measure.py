"""The measuring loop: stream images through every teacher, score them, and stop once the order is known.

    DATA -> Batch (views, positions, keys) -> Teacher -> tokens -> similarities -> ScoreTable -> certificate

An image is decoded once for all teachers. Of several processes, number r takes the positions p with
p % world == r. The first process gathers the scores, enters and stores them, judges them at fixed image counts
(looks), and tells the others how to go on. So all of them stop at the same image, whatever their number and
batch size.
"""

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokdiv.config import Settings
from tokdiv.data.loader import Batch, Source, read_batches
from tokdiv.dist import Interruption, Processes, default_workers
from tokdiv.errors import Interrupted, RunError, UsageError
from tokdiv.judge import ENDLESS, Judge, Plan, Share
from tokdiv.progress import progress_bar
from tokdiv.scores import MEASURES
from tokdiv.similarity import pooled_similarity, token_similarity, zero_share
from tokdiv.teachers.load import load_teachers
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher


def load_measurable(
    teachers: Sequence[str | TeacherSpec | Teacher],
    image_size: int | Literal["native"] | None,
    device: torch.device,
    dtype: str,
    compile: bool = False,
) -> list[Teacher]:
    """Load teachers onto the device.

    Raises:
        UsageError: one cannot be loaded, or has a single token, which makes no pair.
    """
    loaded = load_teachers(teachers, image_size=image_size)
    for teacher in loaded:
        if teacher.num_tokens < 2:
            raise UsageError(
                f"{teacher.name} gives K = 1 token at {teacher.size} px, and similarity needs two; use a larger "
                f"--image-size or an earlier block (:blocks=N)"
            )
        teacher.prepare(device, dtype, compile)
    return loaded


def measure(
    judge: Judge,
    teachers: Sequence[Teacher],
    source: Source,
    order: NDArray[np.int64] | None,
    settings: Settings,
    group: Processes,
    interruption: Interruption,
) -> dict[str, float]:
    """Measure until every image is measured or the judge knows enough.

    Args:
        judge: only the first process's is asked.
        order: position -> index into the source; None for a stream.
        settings: with a batch size chosen.

    Returns:
        Images per second of each teacher, of all processes together, by the clock of this one.

    Raises:
        Interrupted: a signal came; everything measured is stored.
        RunError: a teacher gives NaN, the disk is full, another process is gone.
    """
    speed = {teacher.name: (0, 0.0) for teacher in teachers}  # images, seconds
    with progress_bar(
        total=judge.limit if judge.limit < ENDLESS else None,
        initial=judge.table.num_seen,
        unit="image",
        show=group.rank == 0,
    ) as bar:
        while plan := group.on_first(judge.plan):
            steps = _Steps(plan, teachers, source, order, settings, group, speed)
            with contextlib.closing(steps):
                _follow(plan, steps, judge, group, interruption, bar)
    return {name: n / seconds * group.world for name, (n, seconds) in speed.items() if seconds}


def _follow(
    plan: Plan,
    steps: "_Steps",
    judge: Judge,
    group: Processes,
    interruption: Interruption,
    bar: Any,
) -> None:
    """Measure step by step until the plan is done or the judge wants another one."""
    active, batch_rows = plan.columns, plan.batch_rows
    while share := steps.next(active, batch_rows, interruption):
        shares = group.gather(share)
        verdict = group.on_first(judge.take, shares, plan)
        bar.update(max(0, share.stop - bar.n))
        if verdict.signal:
            raise Interrupted(verdict.signal, f"{share.stop:,} images")
        if verdict.replan:
            return
        active, batch_rows = verdict.active, verdict.batch_rows


class _Steps:
    """This process's part of a plan, step by step: read, forward, score.

    On a GPU the next step is computed while the scores of the one before are fetched.
    """

    def __init__(
        self,
        plan: Plan,
        teachers: Sequence[Teacher],
        source: Source,
        order: NDArray[np.int64] | None,
        settings: Settings,
        group: Processes,
        speed: dict[str, tuple[int, float]],
    ) -> None:
        assert settings.batch_size != "auto"
        self.plan, self.teachers, self.group, self.speed = plan, teachers, group, speed
        self.device = group.device
        means = plan.means
        self.means = None if means is None else [torch.from_numpy(m).to(self.device) for m in means]
        length = settings.batch_size * group.world
        starts = range(plan.start, plan.stop, length)
        self._spans = ((start, min(start + length, plan.stop)) for start in starts)
        self._reader = read_batches(
            source,
            order,
            (self._own(start, min(start + length, plan.stop)) for start in starts),
            {teachers[n].size for n in plan.columns},
            workers=settings.workers or default_workers(),
            seed=settings.seed,
            pin_memory=self.device.type == "cuda",
        )
        self._batches = _on_device(self._reader, self.device)
        self._batch: Batch | None = None  # what is left of the batch at hand
        self._start = self._stop = plan.start  # the positions it stands for
        self._failure: str | None = None
        self._launched: deque[_Launched] = deque()

    def next(self, active: list[int], batch_rows: int, interruption: Interruption) -> Share | None:
        """The next step, of at most `batch_rows` images a process, by the `active` teachers; None at the end."""
        ahead = 1 if self.device.type == "cuda" else 0
        while len(self._launched) <= ahead and self._advance():
            stop = min(self._start + batch_rows * self.group.world, self._stop)
            piece = None
            if self._batch is not None:
                cut = int(np.searchsorted(self._batch.positions, stop))
                piece, self._batch = self._batch.split(cut)
            self._launched.append(self._launch(self._start, stop, piece, active))
            self._start = stop
        return self._fetch(self._launched.popleft(), interruption) if self._launched else None

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.close()

    def _own(self, start: int, stop: int) -> NDArray[np.int64]:
        positions = np.arange(start, stop)
        return positions[positions % self.group.world == self.group.rank]

    def _advance(self) -> bool:
        """Get the next batch if the one at hand is used up; False at the end of the plan."""
        if self._start == self._stop:
            span = next(self._spans, None)
            if span is None:
                return False
            self._start, self._stop = span
            try:
                self._batch = next(self._batches, None)  # None past the end of a stream
            except RunError as error:  # told with the share, so that all processes end alike
                self._batch, self._failure = None, str(error)
        return True

    def _launch(self, start: int, stop: int, batch: Batch | None, active: list[int]) -> "_Launched":
        """Start the forward passes and the scores of a step; on a GPU this does not wait for them."""
        columns, num_usable = self.plan.columns, 0 if batch is None else int(batch.usable.sum())
        shape = (num_usable, len(columns), len(MEASURES))
        scores = torch.full(shape, torch.nan, device=self.device)
        dims = [self.teachers[n].dim for n in columns] if self.means is None else []
        mean_tokens = [torch.zeros(num_usable, dim, device=self.device) for dim in dims]
        clocks = []
        for place, n in enumerate(columns):
            if batch is None or not num_usable or n not in active:
                continue
            teacher = self.teachers[n]
            begun = _clock(self.device)
            with torch.inference_mode():
                tokens = _tokens(teacher, batch.views[teacher.size])
                scores[:, place, 0] = token_similarity(tokens)
                if self.means is None:
                    mean_tokens[place] = tokens.float().mean(dim=1)
                else:
                    scores[:, place, 1] = token_similarity(tokens.float() - self.means[place])
                pooled = pooled_similarity(tokens, teacher.grid)
                if pooled is not None:
                    scores[:, place, 2] = pooled
                scores[:, place, 3] = zero_share(tokens)
            clocks.append((teacher.name, begun, _clock(self.device)))
        return _Launched(start, stop, batch, scores, mean_tokens, clocks, self._failure)

    def _fetch(self, launched: "_Launched", interruption: Interruption) -> Share:
        """Wait for the scores of a step, and bring them to the CPU."""
        batch = launched.batch
        num_images = 0 if batch is None else len(batch)
        scores = np.full((num_images, *launched.scores.shape[1:]), np.nan, np.float32)
        if batch is not None:
            scores[batch.usable] = launched.scores.cpu().numpy()
        for name, begun, ended in launched.clocks:
            images, seconds = self.speed[name]
            self.speed[name] = images + len(launched.scores), seconds + _seconds(begun, ended)
        return Share(
            launched.start,
            launched.stop,
            np.empty(0, np.int64) if batch is None else batch.positions,
            [] if batch is None else batch.keys,
            [] if batch is None else batch.reasons,
            scores,
            [tokens.cpu().numpy() for tokens in launched.mean_tokens],
            interruption.signal,
            launched.failure,
        )


@dataclass(frozen=True)
class _Launched:
    """A step whose scores may still be computed on the GPU; `batch` is None past the end of a stream."""

    start: int
    stop: int
    batch: Batch | None
    scores: Tensor  # (num_usable, columns, len(MEASURES))
    mean_tokens: list[Tensor]
    clocks: list[tuple[str, Any, Any]]  # teacher, begun, ended
    failure: str | None


def _tokens(teacher: Teacher, views: Tensor) -> Tensor:
    """(B, K, C); code of the user's own may give another K than for the black image it was tried with."""
    tokens = teacher(views)
    expected = (len(views), teacher.num_tokens, teacher.dim)
    if tokens.shape != expected:
        raise RunError(
            f"{teacher.name} gave tokens of shape {tuple(tokens.shape)}, expected {expected} as for a black image"
        )
    return tokens


def _on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches with their views on the device; on CUDA the copy overlaps the forward passes before it."""
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        if device.type == "cpu":
            yield batch
            continue
        with torch.cuda.stream(copies) if copies else contextlib.nullcontext():
            views = {s: v.to(device, non_blocking=bool(copies)) for s, v in batch.views.items()}
        if copies:
            for view in views.values():
                view.record_stream(torch.cuda.current_stream(device))
            torch.cuda.current_stream(device).wait_stream(copies)
        yield dataclasses.replace(batch, views=views)


def _clock(device: torch.device) -> Any:
    """A point in time; on a GPU one of its stream, so that nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begun: Any, ended: Any) -> float:
    return ended - begun if isinstance(begun, float) else begun.elapsed_time(ended) / 1000
