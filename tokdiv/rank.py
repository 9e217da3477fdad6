"""The main job, from top to bottom: open DATA and RUN, load the teachers, measure, rank, write, report."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tokdiv import run_config
from tokdiv.autotune import choose_batch_size, compiles, expected_images
from tokdiv.config import Settings
from tokdiv.data.open import open_source
from tokdiv.data.source import Source, permutation
from tokdiv.dist import Processes, caught_signals, choose_dtype, processes
from tokdiv.errors import first_line
from tokdiv.hand_over import write_ranking
from tokdiv.judge import Judge
from tokdiv.measure import load_measurable, measure
from tokdiv.noise import measure_correspondence
from tokdiv.ranking import Ranking, make_ranking
from tokdiv.run_dir import open_run_dir
from tokdiv.scores import ScoreTable, check_labels
from tokdiv.state import State
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher

log = logging.getLogger(__name__)


def rank(
    data: str | os.PathLike[str],
    teachers: Sequence[str | TeacherSpec | Teacher],
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = True,
    report: bool = True,
    max_images: int | None = None,
    confidence: float = 0.99,
    certify: Literal["order", "best", "none"] = "order",
    tie: float = 0.002,
    batch_size: int | Literal["auto"] = "auto",
    workers: int | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
    seed: int = 0,
    image_size: int | Literal["native"] | None = None,
    correspondence_images: int = 256,
    allow_baselines: bool = False,
) -> Ranking:
    """Rank teachers by the diversity of their tokens on the user's images.

    Args:
        data: a folder of images, a .tar, shards, or a data set in timm's notation (`tokdiv.data.open`).
        teachers: SPECs, TeacherSpecs, or Teachers made in code; labels must be unique.
        out: the folder RUN to write and to resume from; None keeps everything in memory.
        resume: go on with the RUN that is there; False moves it to RUN.bak-N.
        report: write RUN/report.html and its figure; `tokdiv report RUN` does it later.
        max_images, confidence, certify, tie, batch_size, workers, device, dtype, compile, seed, image_size,
            correspondence_images, allow_baselines: see `tokdiv.config.Settings`, or `tokdiv rank --help`.

    Returns:
        The ranking: `.table` (a DataFrame, best first), `.best` (a TeacherSpec), `.certificate`.

    Raises:
        UsageError: a mistake in the call, a RUN of other settings, data or weights.
        RunError: no usable image, a teacher that yields NaN, a full disk, a lost process.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 came; the state is stored.
    """
    given = dict(locals())
    settings = Settings(**{name: given[name] for name in given.keys() & vars(Settings).keys()})
    with ExitStack() as stack:
        group = stack.enter_context(processes(device))
        source = open_source(os.fspath(data))
        num_warned = _warn(source.warnings, group)
        permuted = source.permutable and source.count is not None
        order = permutation(source.count or 0, seed) if permuted else None

        settings = dataclasses.replace(settings, dtype=choose_dtype(dtype, group.device))  # type: ignore[arg-type]
        total = expected_images(source.count, max_images, certify)
        num_images = None if total is None else -(-total // group.world)  # of this process
        compiled = compiles(compile, group.device, num_images)
        loaded = load_measurable(teachers, image_size, group.device, settings.dtype, compiled)
        names, specs = [t.name for t in loaded], [t.spec for t in loaded]
        check_labels(names)

        run, previous = None, run_config.Previous(None, {})
        config = run_config.describe(source, settings, specs, {})
        if out is not None:
            same = partial(run_config.check_same, out, config)
            run = group.on_first(stack.enter_context, open_run_dir(out, same, resume=resume))
            previous = group.on_first(run_config.read_previous, run)
            if previous.batch_size is None:  # a folder without config.json is not resumed
                group.on_first(run_config.write, run, config)
        key_of = None if order is None else partial(_key, source, order)
        table = ScoreTable(names, key_of)
        state = State(run / "state", run_config.identity(config)) if run else None
        if state:
            group.on_first(state.load, table)
        interruption = stack.enter_context(caught_signals())
        found = measure_correspondence(loaded, source, order, settings, group, interruption, run)
        noise_like = [found[name].noise_like if name in found else None for name in names]
        judge = Judge(table, state, loaded, source, settings, noise_like)
        if batch_size == "auto":
            size = previous.batch_size
            if size is None and not group.broadcast(judge.finished):
                size = group.broadcast(choose_batch_size(loaded, num_images))
            settings = dataclasses.replace(settings, batch_size=size or "auto")
        if run:
            config = run_config.describe(source, settings, specs, previous.rates)
            group.on_first(run_config.write, run, config)

        speed = measure(judge, loaded, source, order, settings, group, interruption)

        certificate, rates = judge.certifier.certificate(), previous.rates | speed
        dtypes = {t.name: str(t.dtype).removeprefix("torch.") for t in loaded}
        result = (table, certificate, specs, source, settings, dtypes, rates, found)
        ranking = group.on_first(make_ranking, *result)
        _warn(source.warnings[num_warned:], group)
        if run:
            group.on_first(run_config.write, run, config | {"images_per_second": rates})
            group.on_first(table.write_results, run, ranking.names)
            group.on_first(write_ranking, ranking, run)  # last: where it is, all else is there too
        if run and report and group.rank == 0:
            _report(run, ranking, source, loaded)
    return ranking


def _warn(warnings: Sequence[str], group: Processes) -> int:
    for warning in warnings if group.rank == 0 else ():
        log.warning("%s", warning)
    return len(warnings)


def _key(source: Source, order: NDArray[np.int64], position: int) -> str:
    return source.key(int(order[position]))


def _report(run: Path, ranking: Ranking, source: Source, teachers: Sequence[Teacher]) -> None:
    """Write the report. A failure here is only a warning: the run itself is complete."""
    try:
        from tokdiv.report.build import write_report

        write_report(run, ranking, source=source, teachers=teachers)
    except Exception as error:
        log.warning(
            "%s is complete, but its report could not be written (%s): `tokdiv report %s` tries again",
            *(run, first_line(error), run),
        )
