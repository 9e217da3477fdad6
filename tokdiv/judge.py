"""The first process's part of a ranking: enter the scores, judge them at fixed image counts, say how to go on."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokdiv.certify import Certificate, OrderCertifier, look_schedule
from tokdiv.config import Settings
from tokdiv.data.loader import UNREAD
from tokdiv.data.source import Source
from tokdiv.errors import RunError
from tokdiv.ranking import MAX_ZERO_TOKENS, eligible_teachers
from tokdiv.scores import Scores, ScoreTable
from tokdiv.state import State
from tokdiv.teachers.teacher import Teacher

MEAN_IMAGES = 256  # usable images that the mean token of `centred_similarity` is made of
# The scores are stored after the first step that ends SAVE_SECONDS after the last time or later, and a step slower
# than STEP_SECONDS is halved: a killed run loses the sum of both at most, which is under half a minute.
SAVE_SECONDS = 12
STEP_SECONDS = 15
ENDLESS = 1 << 40  # the length of a stream that does not tell it


@dataclass(frozen=True)
class Plan:
    """The next positions to measure: [start, stop), by the teachers in `columns`.

    means: the mean token (C,) of each; None while it is being taken. batch_rows: the most images of a process and
    step.
    """

    start: int
    stop: int
    columns: list[int]
    means: list[NDArray[np.float32]] | None
    batch_rows: int


@dataclass(frozen=True)
class Share:
    """What one process measured of a step, the positions [start, stop).

    positions: (n,) of its own. keys, reasons: n each. scores: (n, len(plan.columns), 4) float32, NaN for unusable
    images and dropped teachers. mean_tokens: per column (num_usable, C) while mean tokens are being taken. signal:
    the signal that came, or 0. failure: why DATA cannot be read any further, or None.
    """

    start: int
    stop: int
    positions: NDArray[np.int64]
    keys: list[str]
    reasons: list[str | None]
    scores: Scores
    mean_tokens: list[NDArray[np.float32]]
    signal: int
    failure: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The first process's answer to a step: who is still measured, in steps of how many rows, or what ends it."""

    active: list[int]
    batch_rows: int
    replan: bool
    signal: int


class Judge:
    """The first process's part: enter the scores, judge them at the looks, store them, say how to go on.

    Args:
        table: the scores so far, which are judged at once.
        state: where they are stored; None keeps them in memory.
        noise_like: of each teacher; None where it is not known.

    Attributes:
        limit: how many images there are to measure at most.
        certifier: what the scores up to the last look prove.
    """

    def __init__(
        self,
        table: ScoreTable,
        state: State | None,
        teachers: Sequence[Teacher],
        source: Source,
        settings: Settings,
        noise_like: Sequence[bool | None],
    ) -> None:
        self.table, self.state, self.teachers, self.settings = table, state, teachers, settings
        self._noise_like = noise_like
        limits = (settings.max_images, source.count, ENDLESS)
        self.limit = min(limit for limit in limits if limit is not None)
        self.certifier = OrderCertifier(
            len(teachers),
            source.count,
            delta=1 - settings.confidence,
            tie=settings.tie,
            lower=-1 / (min(teacher.num_tokens for teacher in teachers) - 1),
            upper=1.0,
            approximate=not source.permutable,
        )
        self._zeros = np.zeros(
            len(teachers)
        )  # sum of the share of zero tokens, up to the last look
        self._num_usable = np.zeros(len(teachers))
        self._mode = settings.certify if len(teachers) > 1 else "none"
        self._looks = look_schedule(self.limit)
        self._judged = 0
        self._batch_rows = ENDLESS  # whole batches, until one takes too long
        self._saved = self._answered = time.monotonic()
        # A resumed run goes on at the images it has: earlier looks were judged when they were due. The last
        # one is judged again, as more images may be allowed by now, or a teacher joined.
        table.reopen()
        self._first_look = table.num_seen
        self._look()

    @property
    def active(self) -> list[int]:
        """The columns of the teachers that are still measured."""
        dropped = self.table.progress.dropped
        return [n for n, teacher in enumerate(self.teachers) if teacher.name not in dropped]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to measure or to learn."""
        return self.table.progress.finished is not None

    @property
    def eligible(self) -> list[int]:
        """The columns of the teachers that may win, by what is known at the last look."""
        shares = self._zeros / np.maximum(self._num_usable, 1)
        specs = [teacher.spec for teacher in self.teachers]
        allow = self.settings.allow_baselines
        return eligible_teachers(specs, shares.tolist(), self._noise_like, allow)

    def _num_measured(self, column: int) -> int:
        return self.table.progress.measured[self.teachers[column].name]

    def plan(self) -> Plan | None:
        """What to measure next; None when nothing is left to measure or to learn.

        A teacher that joined later is first brought to where the others are, on the same images. And a
        plan ends where the mean token is complete: it never holds more than the images still wanted.
        """
        if self.finished:
            return None
        progress = self.table.progress
        start = min(map(self._num_measured, self.active))
        columns = [n for n in self.active if self._num_measured(n) == start]
        joined_at = [self._num_measured(n) for n in self.active if n not in columns]
        stop = min([self.limit, *joined_at])
        names = [self.teachers[n].name for n in columns]
        missing = MEAN_IMAGES - progress.num_averaged[names[0]]
        if missing > 0:
            return Plan(start, min(stop, start + missing), columns, None, self._batch_rows)
        means = [(progress.token_sums[name] / MEAN_IMAGES).astype(np.float32) for name in names]
        return Plan(start, stop, columns, means, self._batch_rows)

    def take(self, shares: list[Share], plan: Plan) -> Verdict:
        """Enter the scores of a step, and judge every look that they complete.

        Raises:
            RunError: DATA is gone, a teacher gave NaN, none may win, or the disk is full.
        """
        if failures := [share.failure for share in shares if share.failure]:
            self._forget_unread()
            self._store()
            raise RunError(failures[0])
        start, stop = shares[0].start, shares[0].stop
        # Without those that were dropped after a GPU had begun with this step.
        active = [n for n in plan.columns if n in self.active]
        places = [plan.columns.index(n) for n in active]
        for share in shares:
            scores = share.scores[:, places]
            self.table.record(share.positions, share.keys, share.reasons, active, scores)
        num_images = sum(len(share.positions) for share in shares)
        if num_images < stop - start:  # a stream ended
            stop = self.limit = start + num_images
            self._looks = look_schedule(self.limit)
        nan = self._first_nan(shares, plan)
        self.table.advance(active, nan.position if nan else stop)
        looked = self._look()
        if plan.means is None:
            self._add_mean_tokens(shares, plan)
        # Behind the look that ends the run, or drops the teacher, NaN does not count.
        moot = nan is not None and (self.finished or nan.column not in self.active)
        signal = max(share.signal for share in shares)
        num_rows = -(-(shares[0].stop - start) // len(shares))
        self._save(num_rows, now=bool(looked or self.finished or nan or signal))
        if nan and not moot:
            raise RunError(
                f"{self.teachers[nan.column].name} gives NaN or infinite tokens for the image '{nan.key}': its "
                f"weights are damaged, or the network cannot compute in --dtype {self.settings.dtype}"
            )
        active = [n for n in active if n in self.active]
        replan = self.finished or moot or stop >= min(plan.stop, self.limit)
        return Verdict(active, self._batch_rows, replan, signal)

    def _forget_unread(self) -> None:
        """Forget the last images, if they could not be read: it was DATA that failed, not they."""
        stop, reasons = self.table.num_seen, self.table.reasons
        while reasons.get(stop - 1, "").startswith(UNREAD):
            stop -= 1
        self.table.go_back(stop)

    def _save(self, num_rows: int, now: bool) -> None:
        """Store the scores if it is time, and keep the steps short enough for that.

        Args:
            num_rows: images of a process in the step that ends.
        """
        seconds = time.monotonic() - self._answered
        if seconds > STEP_SECONDS:
            self._batch_rows = max(1, min(num_rows, self._batch_rows) // 2)
        elif seconds < STEP_SECONDS / 2.5:
            self._batch_rows = min(ENDLESS, self._batch_rows * 2)
        if now or time.monotonic() - self._saved > SAVE_SECONDS:
            self._store()
            self._saved = time.monotonic()
        self._answered = time.monotonic()

    def _store(self) -> None:
        if self.state:
            self.state.save(self.table)

    def _first_nan(self, shares: list[Share], plan: Plan) -> "_Nan | None":
        """The first usable image that an active teacher has no score for."""
        found = []
        for share in shares:
            usable = np.array([reason is None for reason in share.reasons], dtype=bool)
            for place, n in enumerate(plan.columns):
                if n in self.active:
                    for row in np.flatnonzero(usable & np.isnan(share.scores[:, place, 0]))[:1]:
                        found.append(_Nan(int(share.positions[row]), n, share.keys[row]))
        return min(found, key=lambda nan: (nan.position, nan.column), default=None)

    def _add_mean_tokens(self, shares: list[Share], plan: Plan) -> None:
        usable = [[reason is None for reason in share.reasons] for share in shares]
        positions = np.concatenate([share.positions[rows] for share, rows in zip(shares, usable)])
        order = np.argsort(positions)
        tokens = [
            np.concatenate([share.mean_tokens[place] for share in shares])[order]
            for place in range(len(plan.columns))
        ]
        self.table.add_mean_tokens(positions[order].tolist(), plan.columns, tokens)

    def _look(self) -> bool:
        """Judge every look up to where all teachers are measured; returns whether there was one."""
        table, looked = self.table, False
        while not self.finished:
            num_complete = min(map(self._num_measured, self.active))
            due = self._looks[self._looks >= max(self._judged + 1, self._first_look)]
            if not len(due) or due[0] > num_complete:
                if num_complete >= self.limit:  # a stream ended at a look that was judged before
                    table.finish("every image", num_complete)
                break
            look = int(due[0])
            scores, zeros = (table.rows(self._judged, look, m) for m in ("similarity", "zeros"))
            self.certifier.update(scores)
            self._zeros += np.nansum(zeros, axis=0, dtype=np.float64)
            self._num_usable += (~np.isnan(zeros)).sum(axis=0)
            self._judged, looked = look, True
            if not self.eligible:
                names = ", ".join(t.name for t in self.teachers if not t.spec.baseline)
                raise RunError(
                    f"{names}: more than {MAX_ZERO_TOKENS:.0%} of the tokens are zero, so the weights are damaged "
                    f"or missing, and no other teacher is left that may win: give other teachers, and another -o"
                )
            certificate = self.certifier.certificate()
            for n in self._losers(certificate):
                table.drop(n, look)
            if reason := self._reason_to_end(certificate):
                table.finish(reason, look)
        return looked

    def _reason_to_end(self, certificate: Certificate[int]) -> str | None:
        if self._mode == "best" and certificate.best_of(self.eligible):
            return "best certified"
        if self._mode == "order" and certificate.certified:
            return "order certified"
        if self._judged >= self.limit:
            endless = self.limit < (self.settings.max_images or ENDLESS)
            return "every image" if endless else "max images"
        return None

    def _losers(self, certificate: Certificate[int]) -> list[int]:
        """The teachers to drop: certified not to be the best."""
        # At the limit nothing is saved by it, and with more images allowed the next look would be another.
        if self._mode != "best" or self._judged >= self.limit:
            return []
        better = certificate.decided()
        return [m for m in self.active if any((n, m) in better for n in self.eligible)]


@dataclass(frozen=True)
class _Nan:
    """Where a score is NaN: the position and the key of the image, and the teacher's column."""

    position: int
    column: int
    key: str
