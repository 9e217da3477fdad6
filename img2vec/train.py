"""Pretraining, from top to bottom: data, teacher, student, the loop, the student's export.

img2vec pretrain photos/ --teacher dino_resnet50 -o runs/pretrain
torchrun --nproc-per-node 8 -m img2vec pretrain photos/ --teacher dino_resnet50 -o runs/pretrain
"""

import contextlib
import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from img2vec.checkpoint import model_state
from img2vec.config import Config, make_config
from img2vec.data import Batch, Plan, View, images_per_epoch, plan_epoch, read_epoch
from img2vec.evaluate.online import prepare_knn
from img2vec.export import export_student
from img2vec.log import SKIPPED, RunLog, Skipped, check_wandb, finite, log_headline
from img2vec.model import make_model, make_student
from img2vec.optim import learning_rate
from img2vec.resume import (
    Progress,
    check_same_run,
    load_last,
    resume_run,
    save_run,
    student_export,
)
from img2vec.step import StepResult, Training, make_training, train_step
from img2vec.teacher import open_teacher
from tokdiv import __version__
from tokdiv.autotune import check_compiler
from tokdiv.data.open import open_source
from tokdiv.data.source import Source
from tokdiv.dist import (
    Interruption,
    Processes,
    caught_signals,
    default_workers,
    lost_peers,
    processes,
)
from tokdiv.errors import Interrupted, RunError, SharedError, UsageError, first_line
from tokdiv.run_dir import CONFIG, open_run_dir, write_atomic
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher
from tokdiv.versions import versions

log = logging.getLogger(__name__)

MAX_CONSECUTIVE_SKIPPED = 10  # steps without a finite loss before the run stops
SIMILARITY_EVERY = 10  # steps between measurements of the student's own token similarity


@dataclass(frozen=True)
class Pretrained:
    """The end of a run. loss: of the last step, None where none was made. student: the exported folder."""

    out: Path
    student: Path
    step: int
    epoch: int
    loss: float | None


def pretrain(
    data: str | Path,
    teacher: str | TeacherSpec | Teacher,
    out: str | Path,
    *,
    preset: str | None = None,
    config: Config | str | Path | None = None,
    resume: bool = True,
    **options: Any,
) -> Pretrained:
    """Pretrain a student to predict a teacher's tokens at masked positions, and export it.

    Goes on where `out` holds a run with the same settings, data and teacher, bit for bit on a CPU.

    Args:
        data: a folder of images or whatever else `tokdiv rank` takes as DATA.
        teacher: a SPEC, a TeacherSpec, a Teacher, or the folder (or ranking.json) of a ranking, which
            means its winner.
        out: the run's folder.
        preset: a key of PRESETS, default "vit_base".
        config: settings that replace the preset's: a YAML file, or a complete Config.
        resume: False moves an old run to `out`.bak-N.
        options: single settings, fields of Config; they win.

    Raises:
        UsageError: a mistake in the call. RunError: a failure while running.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 came; the state is saved.
    """
    if isinstance(config, Config):
        given = {k: v for k, v in options.items() if v is not None}
        settings = Config.from_dict({**config.to_dict(), **given}, "the call")
    else:
        settings = make_config(preset, config, options)
    with (
        processes(settings.device) as group,
        torch.random.fork_rng(devices=[group.device] if group.device.type == "cuda" else []),
    ):
        return _pretrain(str(data), teacher, Path(out).expanduser(), settings, resume, group)


def _pretrain(
    data: str,
    teacher: str | TeacherSpec | Teacher,
    out: Path,
    config: Config,
    resume: bool,
    group: Processes,
) -> Pretrained:
    """`pretrain` with all of its settings, in one of the processes."""
    check_compiler(config.compile, group.device)
    if config.wandb:
        check_wandb()
    source = open_source(data)
    images = images_per_epoch(source, config.epoch_size)
    plan = plan_epoch(images, config.batch_size, config.accumulate, group.world)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_enough_memory(plan, group.device))
        stack.enter_context(lost_peers())
        training = _make_training(config, plan, group, teacher)
        run = {
            "version": __version__,
            "data": {
                "source": source.name,
                "count": source.count,
                "fingerprint": source.fingerprint,
            },
            "teacher": training.teacher.spec.to_dict(),
            "config": config.to_dict(),
            "world": group.world,
            "command": sys.argv,
            "versions": versions(),
        }
        check_same = functools.partial(check_same_run, out, new=run)
        group.on_first(lambda: stack.enter_context(open_run_dir(out, check_same, resume=resume)))
        progress = resume_run(out, run, training)
        group.on_first(lambda: write_atomic(out / CONFIG, json.dumps(run, indent=2) + "\n"))
        log_headline(source, training)
        end = _last_step(progress, config, plan)
        run_log = stack.enter_context(RunLog(out, progress.step, end, group, run))
        read = functools.partial(
            read_epoch,
            source,
            plan,
            View(config.image_size, config.crop_scale, training.model.layout, config.seed),
            rank=group.rank,
            workers=config.workers or default_workers(),
            pin_memory=group.device.type == "cuda",
            cache={} if config.cache_ram and source.permutable else None,
            report=Skipped(out),
        )
        save = functools.partial(save_run, out, run, training)
        knn = prepare_knn(source, config)
        evaluate = functools.partial(_evaluate, knn, training, run_log)
        with caught_signals() as interruption:
            try:
                progress, last = _train(
                    training, progress, end, read, save, evaluate, run_log, interruption
                )
            except Interrupted:
                _report(out, training, source)
                raise
        student = _export(out, run, training, progress)
        _report(out, training, source)
    group.barrier()
    loss = None if last is None else finite(last.loss)
    return Pretrained(out, student, progress.step, progress.epoch, loss)


def _train(
    training: Training,
    progress: Progress,
    end: int,
    read: Callable[..., Generator[Batch, None, None]],
    save: Callable[[Progress], None],
    evaluate: Callable[[Progress], None],
    run_log: RunLog,
    interruption: Interruption,
) -> tuple[Progress, StepResult | None]:
    """The loop: for each epoch, for each step: train_step, log, save.

    Args:
        progress: where to begin. end: the step to stop at.
        read: gives the batches of an epoch from its step `first` on.

    Returns:
        Where the run is now, and its last step.

    Raises:
        Interrupted: after saving. RunError: the loss stays not finite.
    """
    config, plan, group = training.config, training.plan, training.group
    peak, result = config.peak_lr(plan.global_batch), None
    training.model.train()
    evaluate(progress)  # in case an interruption at the end of an epoch came before it
    for epoch in range(progress.epoch, config.epochs):
        with contextlib.closing(read(epoch, first=progress.step_in_epoch)) as batches:
            for number in range(progress.step_in_epoch, plan.steps):
                if progress.step >= end:
                    return progress, result
                # Drop path and the like draw the same numbers on resuming.
                torch.manual_seed(_step_seed(config.seed, progress.step, group.rank))
                passed = epoch + number / plan.steps
                lr = learning_rate(passed, config.epochs, config.warmup, peak)
                measures = progress.step == 0 or (progress.step + 1) % SIMILARITY_EVERY == 0
                result = train_step(training, batches, lr, measure_similarity=measures)
                progress = progress.after_step(plan.steps, result.skipped)
                run_log.step(progress, epoch, lr, result)
                _check_divergence(training, progress, result, run_log.out)
                stop = group.max(interruption.signal)
                if stop or progress.step == end or _save_is_due(progress, config):
                    save(progress)
                if stop:
                    raise Interrupted(stop, f"step {progress.step}")
        evaluate(progress)
    return progress, result


# Before the loop ---------------------------------------------------------------------------------


def _make_training(
    config: Config, plan: Plan, group: Processes, given: str | TeacherSpec | Teacher
) -> Training:
    if config.shard and group.world == 1:
        raise UsageError("--shard spreads the student over processes: start several with torchrun")
    torch.manual_seed(config.seed)
    encoder = make_student(config)
    teacher = open_teacher(given, config, group.device)
    torch.manual_seed(_step_seed(config.seed, 0, 0))  # loading a teacher may draw numbers
    return make_training(config, plan, group, teacher, make_model(encoder, teacher, config))


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def _last_step(progress: Progress, config: Config, plan: Plan) -> int:
    remaining = (config.epochs - progress.epoch) * plan.steps - progress.step_in_epoch
    end = progress.step + remaining
    return end if config.max_steps is None else min(end, config.max_steps)


@contextlib.contextmanager
def _enough_memory(plan: Plan, device: torch.device) -> Iterator[None]:
    """Turn a shortage of memory into one line that says what to try."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        remedy = "take a smaller --student or --image-size, or --shard over more processes"
        if plan.batch_size > 1:
            half = f"--batch-size {plan.batch_size // 2} --accumulate {plan.accumulate * 2}"
            remedy = f"try {half}, which gives the same global batch"
        raise RunError(
            f"not enough memory on {device} for {plan.batch_size} images at a time: {remedy}"
        ) from error


# In the loop -------------------------------------------------------------------------------------


def _save_is_due(progress: Progress, config: Config) -> bool:
    if config.save_every is None:
        return progress.step_in_epoch == 0
    return progress.step % config.save_every == 0


def _evaluate(
    knn: Callable[..., float | None] | None, training: Training, run_log: RunLog, progress: Progress
) -> None:
    """Measure the student, where an epoch has just ended for which that is due and not yet done."""
    every, epochs = training.config.knn_every, progress.epoch
    if knn is None or not epochs or progress.step_in_epoch:
        return
    due = epochs == training.config.epochs or epochs % every == 0
    if due and not training.group.broadcast(run_log.evaluated == progress.step):
        accuracy = knn(training.model, training.group.device)
        run_log.evaluation({"step": progress.step, "epoch": epochs - 1, "knn_accuracy": accuracy})


def _check_divergence(
    training: Training, progress: Progress, result: StepResult, out: Path
) -> None:
    """End a run that has made no step for a while, and say why."""
    if progress.num_consecutive_skipped < MAX_CONSECUTIVE_SKIPPED:
        return
    found = load_last(out)
    last = f"the last good checkpoint is {found[0]}" if found else "no checkpoint was saved before"
    if not result.num_images:
        raise SharedError(
            f"none of the images of the last {MAX_CONSECUTIVE_SKIPPED} steps can be used; {last}"
        )
    if not result.teacher_is_finite:
        raise SharedError(
            f"the teacher {training.teacher.name} gives tokens that are not finite: its weights are damaged, or "
            f"too large for this --dtype; take another one, or --dtype float32 in another -o"
        )
    raise SharedError(
        f"the loss was not finite {MAX_CONSECUTIVE_SKIPPED} steps in a row; {last}; start anew in another -o, with "
        f"a lower --lr, --clip-grad 1 or --dtype float32"
    )


# After the loop ----------------------------------------------------------------------------------


def _export(out: Path, run: dict[str, Any], training: Training, progress: Progress) -> Path:
    """Write the student for timm."""
    if 0 < progress.skipped == progress.step:
        raise SharedError(
            f"not one of the {progress.step} steps could be made: the loss was not finite, or no image can be "
            f"used ({SKIPPED} lists them)"
        )
    if progress.skipped:
        text = "%d of %d steps were skipped: their loss was not finite"
        log.warning(text, progress.skipped, progress.step)
    state = {"model": model_state(training.model), "progress": dataclasses.asdict(progress), **run}
    student = out / "student"
    training.group.on_first(lambda: export_student(out=student, **student_export(state)))
    return student


def _report(out: Path, training: Training, source: Source) -> None:
    """Write the report. A failure here is only a warning: the run itself is complete."""
    weights = model_state(training.model)
    if training.group.rank:
        return
    try:
        from img2vec.report import write_report

        write_report(out, weights=weights, teacher=training.teacher, source=source)
    except Exception as error:
        text = "%s is saved, but its report could not be written (%s): img2vec.report.write_report(%r) tries again"
        log.warning(text, out, first_line(error), str(out))
