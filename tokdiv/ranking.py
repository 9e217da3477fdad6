"""From the score array to the ranking: the teachers in order, and what a user should know about it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tokdiv.certify import Certificate, Pair, confidence_sequence
from tokdiv.config import Settings
from tokdiv.data.source import Source, storable
from tokdiv.errors import RunError
from tokdiv.noise import Correspondence
from tokdiv.scores import ScoreTable
from tokdiv.teachers.spec import LoadedSpec, TeacherSpec

SCHEMA_VERSION = 1  # of ranking.json
MAX_ZERO_TOKENS = 0.01  # a teacher with a larger share of zero tokens cannot win


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
        zero_tokens: share of the tokens that are zero. Their cosines count as 0, so they look diverse.
        correspondence, correspondence_low, correspondence_high: share of tokens that find their place in another
            view, with its confidence sequence; None where it was not measured.
        pixels_correspondence: the same of raw pixels on this teacher's grid.
        noise_like: whether it finds places no better than raw pixels do; None where that is not known.
        outlier_tokens: share of the tokens whose norm is over 4 times the median norm of their image.
        local_minus_distant: mean cosine of near tokens minus that of distant ones (LDS).
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
    zero_tokens: float = 0.0
    correspondence: float | None = None
    correspondence_low: float | None = None
    correspondence_high: float | None = None
    pixels_correspondence: float | None = None
    noise_like: bool | None = None
    outlier_tokens: float | None = None
    local_minus_distant: float | None = None


@dataclass(frozen=True)
class Ranking:
    """The result of `tokdiv.rank`, and the content of ranking.json.

    Attributes:
        data: source, count, fingerprint, and how many images were looked at and unusable.
        settings: those of the run.
        certificate: what is certain about the order; its pairs name the teachers.
        teachers: best first.
        best_name: the winner, a trained teacher if there is one.
        rates: images per second of each teacher, on this machine; not part of the hand-over.
    """

    data: dict[str, Any]
    settings: Settings
    certificate: Certificate[str]
    teachers: list[RankedTeacher]
    best_name: str
    rates: dict[str, float] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def best(self) -> LoadedSpec:
        """The winner, as `load_teacher` and `img2vec.pretrain` take it."""
        return self[self.best_name].spec

    @property
    def certified(self) -> bool:
        """Whether every pair is decided or tied."""
        return self.certificate.certified

    @property
    def best_certified(self) -> bool:
        """Whether the winner is decided or tied against every other teacher that may win."""
        return len(self.teachers) > 1 and bool(self.certificate.best_of(self.eligible))

    @property
    def co_winners(self) -> list[str]:
        """Teachers tied with the winner, best first."""
        tied = [{p.first, p.second} for p in self.certificate.pairs if p.state == "tie"]
        return [
            n for n in self.certificate.order if {self.best_name, n} in tied and n in self.eligible
        ]

    @property
    def eligible(self) -> list[str]:
        """The teachers that may win, best first."""
        specs = [teacher.spec for teacher in self.teachers]
        zero_tokens = [teacher.zero_tokens for teacher in self.teachers]
        noise_like = [teacher.noise_like for teacher in self.teachers]
        allow = self.settings.allow_baselines
        indices = eligible_teachers(specs, zero_tokens, noise_like, allow)
        return [self.teachers[n].name for n in indices]

    @property
    def next_best(self) -> RankedTeacher | None:
        """The one that would win without the winner; None where no other one may."""
        others = [name for name in self.eligible if name != self.best_name]
        return self[others[0]] if others else None

    @property
    def names(self) -> list[str]:
        """The labels, best first."""
        return [teacher.name for teacher in self.teachers]

    @property
    def num_usable(self) -> int:
        """Images that could be used."""
        return self.data["images"] - self.data["unusable"]

    def __getitem__(self, name: str) -> RankedTeacher:
        return next(teacher for teacher in self.teachers if teacher.name == name)

    @property
    def table(self) -> pd.DataFrame:
        """One row per teacher, best first."""
        own = [f.name for f in dataclasses.fields(RankedTeacher) if f.name != "spec"]
        of_spec = ("num_tokens", "dim", "parameters", "norm", "method", "weights", "sha256")
        rows = [
            {name: getattr(teacher, name) for name in own}
            | {name: getattr(teacher.spec, name) for name in of_spec}
            for teacher in self.teachers
        ]
        for row in rows:  # pandas takes no path that is no UTF-8
            row.update({k: storable(v) for k, v in row.items() if isinstance(v, str)})
        return pd.DataFrame(rows).astype({"centred_similarity": float, "similarity_7x7": float})

    def pair(self, first: str, second: str) -> Pair[str]:
        """What is known of two teachers, in this order: the gap is that of `second` above `first`."""
        names = {first, second}
        pair = next(p for p in self.certificate.pairs if {p.first, p.second} == names)
        if pair.first == first:
            return pair
        gap = -pair.gap + 0.0  # no -0.0
        return dataclasses.replace(
            pair, first=first, second=second, gap=gap, low=-pair.high, high=-pair.low
        )

    def order_by(self, column: str) -> list[str]:
        """The trained teachers by another measure, most diverse first; those without it left out.

        Args:
            column: centred_similarity or similarity_7x7.
        """
        trained = [t for t in self.teachers if not t.baseline and getattr(t, column) is not None]
        return [t.name for t in sorted(trained, key=lambda teacher: getattr(teacher, column))]

    def verdict(self) -> str:
        """How far the result is certain, and what it was measured on, in one or two sentences."""
        num_seen, count = self.data["images"], self.data["count"]
        images = f"{num_seen:,} images" if count is None else f"{num_seen:,} of {count:,} images"
        dtype: str = self.settings.dtype
        if others := [teacher.name for teacher in self.teachers if teacher.dtype != dtype]:
            dtype += f" ({', '.join(others)} in float32)"
        if len(self.teachers) < 2:
            return f"Measured on {images}, scored in {dtype}."
        of_best = self.settings.certify == "best"
        certified = self.best_certified if of_best else self.certified
        state = (
            f"{'Winner' if of_best else 'Order'} {'certified' if certified else 'not certified'}"
        )
        confidence = f"{self.certificate.confidence:.6g} confidence"
        return f"{state} at {confidence} from {images}, scored in {dtype}."

    def remarks(self) -> list[str]:
        """What a user of this ranking should know, a sentence each."""
        winner, certificate = self.about_the_winner(), self.about_the_certificate()
        return [*winner, *certificate, *self.about_the_measure()]

    def about_the_winner(self) -> list[str]:
        """Remarks on what the winner is."""
        best, remarks = self[self.best_name], []
        if best.baseline and not self.settings.allow_baselines:
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
        remarks += self.about_noise()
        for t in self.teachers:
            if not t.baseline and t.zero_tokens > MAX_ZERO_TOKENS:
                remarks.append(
                    f"{t.name} cannot win: {t.zero_tokens:.0%} of its tokens are zero, so its weights are damaged "
                    f"or missing."
                )
        if self.co_winners:
            names = ", ".join(self.co_winners)
            remarks.append(f"The winner is tied with {names} (gap below {self.settings.tie:g}).")
        return remarks

    def about_noise(self) -> list[str]:
        """Remarks on trained teachers whose tokens are not, or may not be, about the image."""
        remarks = []
        for t in self.teachers:
            if t.baseline or t.noise_like is not True:
                continue
            found = (
                f"its tokens find {t.correspondence:.3f} of their places in another view, raw pixels "
                f"{t.pixels_correspondence:.3f}"
            )
            if t.name == self.best_name:
                remarks.append(
                    f"No trained teacher is fit to win: {t.name} is only the most diverse of them, and noise-like "
                    f"({found})."
                )
            else:
                remarks.append(
                    f"{t.name} is noise-like and cannot win: {found}. Its training failed, or its weights did not "
                    f"load."
                )
        best = self[self.best_name]
        if best.correspondence is not None and best.noise_like is None:
            remarks.append(
                f"It is not certain that {best.name} is not noise-like (correspondence {best.correspondence:.3f}, "
                f"raw pixels {best.pixels_correspondence:.3f}): it takes more images."
            )
        return remarks

    def about_the_certificate(self) -> list[str]:
        """Remarks on what is certain and what is not."""
        remarks = []
        if len(self.teachers) < 2:
            remarks.append("One teacher only: it has an interval, but there is nothing to order.")
        for pair in self.certificate.pairs:
            if pair.state != "open" or not {pair.first, pair.second} <= self._in_question():
                continue
            if self.data["images"] == self.data["count"]:
                about = "no image is left: those that could not be used keep it open"
            elif pair.more_images:
                about = f"about {pair.more_images:,} images more would settle it"
            else:
                about = "more images may settle it"
            remarks.append(
                f"Not decided within {pair.images:,} images: {pair.first} before {pair.second}, gap "
                f"{pair.gap:.4f} ({pair.low:.4f} to {pair.high:.4f}); {about}."
            )
        if self.certificate.approximate:
            remarks.append(
                "The guarantees are approximate: a stream of shards cannot be put in uniformly random order."
            )
        if num_unusable := self.data["unusable"]:
            num_seen = self.data["images"]
            remarks.append(
                f"{num_unusable:,} of {num_seen:,} images could not be used: skipped.csv."
            )
        return remarks

    def _in_question(self) -> set[str]:
        """The teachers whose open pairs matter: all, or for `best` those that may still win."""
        if self.settings.certify != "best":
            return {teacher.name for teacher in self.teachers}
        if self.best_certified:
            return set()
        eligible = set(self.eligible)
        return eligible - {b for a, b in self.certificate.decided() if a in eligible}

    def about_the_measure(self) -> list[str]:
        """Remarks on measures by which another teacher would win, and on teachers that no file holds."""
        remarks = [
            f"{t.name} is made by code of your own: it cannot be loaded again without that code."
            for t in self.teachers
            if t.spec.is_custom
        ]
        trained = [t.name for t in self.teachers if not t.baseline]
        for column, what in (
            ("centred_similarity", "Centred at its mean token"),
            ("similarity_7x7", "Pooled to a 7x7 grid"),
        ):
            order = self.order_by(column)
            if len(order) > 1 and order[0] != next(name for name in trained if name in order):
                remarks.append(f"{what}, {order[0]} would come first.")
        return remarks

    def to_dict(self) -> dict[str, Any]:
        """The content of ranking.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "data": self.data,
            "settings": dataclasses.asdict(self.settings),
            "certificate": self.certificate.to_dict()
            | {"best_certified": self.best_certified, "co_winners": self.co_winners},
            "teachers": [dataclasses.asdict(teacher) for teacher in self.teachers],
            "best": self.best_name,
        }


def eligible_teachers(
    specs: Sequence[TeacherSpec],
    zero_tokens: Sequence[float],
    noise_like: Sequence[bool | None],
    allow_baselines: bool,
) -> list[int]:
    """Indices of the teachers that may win.

    Baselines are among them only if they are allowed, or if there is nothing else; trained teachers only if their
    tokens are not zero (HOG's are, where an image is flat) and not noise. If all trained ones are noise-like, they
    may win nevertheless, so that the most diverse of them is named.
    """
    everyone = range(len(specs))
    trained = [n for n in everyone if not specs[n].baseline]
    alive = [n for n in trained if zero_tokens[n] <= MAX_ZERO_TOKENS]
    clean = [n for n in alive if noise_like[n] is not True]
    if allow_baselines or not trained:
        return [n for n in everyone if specs[n].baseline or n in clean]
    return clean or alive


def make_ranking(
    table: ScoreTable,
    certificate: Certificate[int],
    specs: Sequence[LoadedSpec],
    source: Source,
    settings: Settings,
    dtypes: dict[str, str],
    rates: dict[str, float],
    found: Mapping[str, Correspondence],
) -> Ranking:
    """Put the teachers in order, with the intervals of their means.

    Args:
        found: by label, what the correspondence phase found; empty where it was left out.

    Raises:
        RunError: not one image could be used.
    """
    num_seen = table.num_seen
    num_unusable = table.unusable(num_seen)
    if num_unusable == num_seen:
        reason = f"'{table.key(0)}': {table.reasons[0]}" if num_seen else "there are none"
        raise RunError(
            f"none of the {num_seen:,} images of '{source.name}' could be used (the first: {reason})"
        )
    alpha = (1 - settings.confidence) / len(specs)  # so that the intervals hold together
    teachers = []
    for rank, n in enumerate(certificate.order, start=1):
        spec = specs[n]
        images = table.progress.measured[spec.name]
        x = table.column(n, images).astype(np.float64)
        lower = -1 / (spec.num_tokens - 1)
        times = np.array([images])
        bounds = confidence_sequence(x, source.count, alpha, lower, upper=1.0, times=times)
        mean = float(np.nanmean(x))
        teachers.append(
            RankedTeacher(
                name=spec.name,
                rank=rank,
                baseline=spec.baseline,
                spec=spec,
                mean_similarity=mean,
                diversity=1 - mean,
                ci_low=float(bounds.low[-1]),
                ci_high=float(bounds.high[-1]),
                images=int((~np.isnan(x)).sum()),
                dtype=dtypes[spec.name],
                centred_similarity=_mean(table.column(n, num_seen, "centred")),
                similarity_7x7=_mean(table.column(n, num_seen, "pooled")),
                zero_tokens=_mean(table.column(n, num_seen, "zeros")) or 0.0,
                **_of_correspondence(found.get(spec.name)),
            )
        )
    zero_tokens = {teacher.name: teacher.zero_tokens for teacher in teachers}
    shares = [zero_tokens[spec.name] for spec in specs]
    noise_like = [found[s.name].noise_like if s.name in found else None for s in specs]
    eligible = eligible_teachers(specs, shares, noise_like, settings.allow_baselines)
    data = {"source": source.name, "count": source.count, "fingerprint": source.fingerprint}
    return Ranking(
        data=data | {"images": num_seen, "unusable": num_unusable},
        settings=settings,
        certificate=certificate.named([spec.name for spec in specs]),
        teachers=teachers,
        best_name=specs[next(n for n in certificate.order if n in eligible)].name,
        rates=rates,
    )


def _of_correspondence(found: Correspondence | None) -> dict[str, Any]:
    """The fields of RankedTeacher that the correspondence phase fills in."""
    if found is None:
        return {}
    values = {
        "correspondence": found.correspondence,
        "correspondence_low": found.low,
        "correspondence_high": found.high,
        "pixels_correspondence": found.pixels,
        "noise_like": found.noise_like,
        "outlier_tokens": found.outlier_tokens,
        "local_minus_distant": found.local_minus_distant,
    }
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _mean(values: np.ndarray) -> float | None:
    present = values[~np.isnan(values)].astype(np.float64)
    return float(present.mean()) if len(present) else None
