"""Write RUN/report.html and RUN's figure from the files in RUN.

Only the similarity maps need DATA and the teachers as well; where those are not on this machine, the page says so.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tokdiv.data.source import Source
from tokdiv.figures.similarity import similarity_figure
from tokdiv.figures.style import save_figure, teacher_colors
from tokdiv.hand_over import REPORT_FILES, load_ranking
from tokdiv.ranking import RankedTeacher, Ranking
from tokdiv.report.caveats import caveats
from tokdiv.report.commands import pretrain_command, rank_command
from tokdiv.report.correspondence import draw_correspondence, figure_of_correspondence
from tokdiv.report.evidence import draw_evidence, pair_matrix, trace_evidence
from tokdiv.report.maps import similarity_maps
from tokdiv.report.page import (
    MAX_SKIPPED,
    NARROW,
    inline_figure,
    percent,
    read_skipped,
    render,
    signed,
)
from tokdiv.run_dir import CONFIG, read_json, write_atomic
from tokdiv.scores import read_scores
from tokdiv.teachers.teacher import Teacher

MAX_OPEN_PAIRS = 10  # remarks on pairs that are not decided


def write_report(
    run: str | os.PathLike[str],
    ranking: Ranking | None = None,
    *,
    source: Source | None = None,
    teachers: Sequence[Teacher] | None = None,
    device: str = "auto",
) -> Path:
    """Write RUN/report.html, RUN/similarity.png, RUN/similarity.svg and RUN/correspondence.png.

    Args:
        run: the folder that `tokdiv rank` wrote.
        ranking, source, teachers: what `tokdiv.rank` holds at its end; by default, what RUN names is loaded.
            Nothing is downloaded: without DATA the page has no maps, without weights none of that teacher.
        device: where teachers that are loaded here compute their maps.

    Returns:
        The path of the page.

    Raises:
        UsageError: no finished RUN, or its scores are missing or those of another ranking.
        RunError: the disk is full or not writable.
    """
    folder = Path(run)
    ranking = ranking or load_ranking(folder)
    scores = read_scores(folder, ranking.names, ranking.num_usable)
    colors = teacher_colors([teacher.name for teacher in ranking.teachers])
    figure = _similarity_figure(ranking, scores.values, colors, width=6.5)
    for name in ("similarity.png", "similarity.svg"):
        save_figure(figure, folder / name)
    measured = [t for t in ranking.teachers if t.correspondence is not None]
    if measured:
        save_figure(figure_of_correspondence(measured, colors), folder / "correspondence.png")
    means = ", ".join(f"{t.name} {t.mean_similarity:.4f}" for t in ranking.teachers)
    evidence = trace_evidence(ranking, scores) if len(ranking.teachers) > 1 else None
    # A single look is a point, and no curve.
    has_curve = evidence is not None and len(evidence.images) > 1
    maps, without_maps = similarity_maps(ranking, scores, source, teachers, device, colors)
    try:  # how the run was made; the result does not need it
        config = read_json(folder / CONFIG)
    except (OSError, ValueError):
        config = {}
    skipped = read_skipped(folder / "skipped.csv")
    page = render(
        "ranking.html",
        ranking=ranking,
        best=ranking[ranking.best_name],
        lead=_lead(ranking),
        colors=colors,
        labels={t.name: _label(t, ranking.best_name) for t in ranking.teachers},
        confidence=percent(ranking.settings.confidence),
        similarity=inline_figure(
            figure,
            f"Distribution of the token similarity of each image and mean with interval, by teacher: {means}.",
            "Each row shows the distribution of the images' token similarity, and its mean with the interval. "
            "Further left is more diverse.",
            narrow=_similarity_figure(ranking, scores.values, colors, width=NARROW),
        ),
        correspondence=draw_correspondence(measured, colors) if measured else None,
        noise=ranking.about_noise(),
        matrix=pair_matrix(ranking, evidence) if evidence else [],
        evidence=draw_evidence(ranking, evidence, colors) if evidence and has_curve else None,
        max_open_pairs=MAX_OPEN_PAIRS,
        maps=maps,
        without_maps=without_maps,
        caveats=caveats(ranking),
        skipped=skipped[:MAX_SKIPPED],
        num_skipped=len(skipped),
        settings=dataclasses.asdict(ranking.settings),
        versions=config.get("versions", {}),
        repeat=rank_command(folder, ranking, config),
        pretrain=pretrain_command(folder, ranking, config),
    )
    write_atomic(folder / REPORT_FILES[0], page)
    return folder / REPORT_FILES[0]


def _similarity_figure(
    ranking: Ranking, scores: NDArray[np.float32], colors: dict[str, str], width: float
) -> Figure:
    teachers = ranking.teachers
    return similarity_figure(
        [teacher.name for teacher in teachers],
        scores,
        [teacher.ci_low for teacher in teachers],
        [teacher.ci_high for teacher in teachers],
        [teacher.baseline for teacher in teachers],
        best=ranking.best_name,
        colors=colors,
        confidence=ranking.settings.confidence,
        width=width,
    )


def _label(teacher: RankedTeacher, best: str) -> str:
    """A name, marked in words and not by color alone."""
    marks = [*(["best"] if teacher.name == best else []), *(["baseline"] * teacher.baseline)]
    if teacher.noise_like and not teacher.baseline:
        marks.append("noise-like")
    return f"{teacher.name} ({', '.join(marks)})" if marks else teacher.name


def _lead(ranking: Ranking) -> str:
    """By how much the winner leads, in a sentence."""
    best, other = ranking[ranking.best_name], ranking.next_best
    if other is None:
        nothing = "There is nothing to compare it with:"
        if len(ranking.teachers) == 1:
            return f"{nothing} it is the only candidate."
        return f"{nothing} no other candidate is a trained teacher."
    pair = ranking.pair(best.name, other.name)
    interval = (
        f"{percent(ranking.settings.confidence)} interval {signed(pair.low)} to {signed(pair.high)}"
    )
    if pair.low == pair.high:
        interval = "measured on every image, so exact"
    direction = "higher" if pair.gap >= 0 else "lower"
    gap = f"The next, {other.name}, has a mean similarity {abs(pair.gap):.4f} {direction} ({interval})"
    if (best.name, other.name) in ranking.certificate.decided():
        return f"{gap}: certified to be less diverse."
    if pair.state == "tie":
        return f"{gap}: a tie, as the gap is certified to be below {ranking.settings.tie:g}."
    return f"{gap}: not decided."
