"""How certain the order is: the evidence for each pair over the images, and the matrix of all pairs."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tokdiv.certify import OrderCertifier, look_schedule
from tokdiv.figures.evidence import evidence_figure
from tokdiv.ranking import Ranking
from tokdiv.report.page import NARROW, inline_figure, signed
from tokdiv.scores import UsableScores

MAX_DESCRIBED = 20  # pairs in the text that stands for the figure


@dataclass(frozen=True)
class Evidence:
    """How the certificate came about, for P pairs of teachers at m looks.

    Attributes:
        images: int64 (m,), the image counts of the looks.
        pairs: P pairs of names, the better rank first.
        log10: float64 (m, P), log10 of each pair's e-value, NaN once the pair was no longer followed.
        decided: for each pair the image count at which it was first decided, or None.
    """

    images: NDArray[np.int64]
    pairs: list[tuple[str, str]]
    log10: NDArray[np.float64]
    decided: list[int | None]


def trace_evidence(ranking: Ranking, scores: UsableScores) -> Evidence:
    """Repeat the certificate's tests over the scores of a run, and record the evidence at each look."""
    names = [teacher.name for teacher in ranking.teachers]
    num_images = ranking.data["images"]
    values = np.full((num_images, len(names)), np.nan, np.float32)
    values[scores.positions] = scores.values
    certifier = OrderCertifier(
        len(names),
        ranking.data["count"],
        delta=1 - ranking.settings.confidence,
        tie=ranking.settings.tie,
        lower=-1 / (min(teacher.spec.num_tokens or 2 for teacher in ranking.teachers) - 1),
        upper=1.0,
    )
    looks = look_schedule(num_images)
    columns = list(combinations(range(len(names)), 2))
    log10 = np.full((len(looks), len(columns)), np.nan)
    decided: list[int | None] = [None] * len(columns)
    seen = 0
    for row, look in enumerate(looks.tolist()):
        certifier.update(values[seen:look])
        seen = look
        for pair in certifier.certificate().pairs:
            column = columns.index((min(pair.first, pair.second), max(pair.first, pair.second)))
            if pair.state == "decided" and decided[column] is None:
                decided[column] = look
            if certifier.measured[[pair.first, pair.second]].all():
                log10[row, column] = pair.evidence
    return Evidence(looks, [(names[n], names[m]) for n, m in columns], log10, decided)


def draw_evidence(ranking: Ranking, evidence: Evidence, colors: dict[str, str]) -> Markup:
    """The figure of the evidence over the images."""
    pairs = [ranking.pair(first, second) for first, second in evidence.pairs]
    with np.errstate(over="ignore"):
        values = 10.0**evidence.log10
    threshold = len(pairs) / (1 - ranking.settings.confidence)

    def draw(width: float) -> Figure:
        return evidence_figure(
            evidence.images,
            values,
            [f"{pair.first} < {pair.second}" for pair in pairs],
            [pair.state == "tie" for pair in pairs],
            threshold,
            colors,
            width=width,
        )

    described = [
        f"{pair.first} before {pair.second} "
        + (f"decided within {count:,} images" if count else pair.state)
        for pair, count in zip(pairs[:MAX_DESCRIBED], evidence.decided)
    ]
    return inline_figure(
        draw(6.5),
        f"Evidence for the order of each pair against the images seen: {'; '.join(described)}.",
        f"The most that a bet against equal means has grown to. A pair is decided at {threshold:,.4g}: the number "
        f"of pairs divided by the probability of error. A line has the color of the more diverse teacher, and its "
        f"marker is filled with that of the other.",
        narrow=draw(NARROW),
    )


def pair_matrix(ranking: Ranking, evidence: Evidence) -> list[list[dict[str, Any] | None]]:
    """A row and a column per teacher, best first: the state of each pair above the diagonal, else None."""
    implied = ranking.certificate.decided()
    decided = {frozenset(pair): count for pair, count in zip(evidence.pairs, evidence.decided)}
    rows: list[list[dict[str, Any] | None]] = []
    for n, first in enumerate(ranking.teachers):
        row: list[dict[str, Any] | None] = [None] * (n + 1)
        for second in ranking.teachers[n + 1 :]:
            pair = ranking.pair(first.name, second.name)
            follows = pair.state == "open" and (first.name, second.name) in implied
            row.append(
                {
                    "state": pair.state,
                    "label": "follows" if follows else pair.state,
                    "gap": signed(pair.gap),
                    "low": signed(pair.low),
                    "high": signed(pair.high),
                    "decided": decided[frozenset((first.name, second.name))],
                }
            )
        rows.append(row)
    return rows
