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

from img2vec.checkpoint import (
    Progress,
    check_same_run,
    load_last,
    load_training_state,
    model_state,
    save_checkpoint,
    student_export,
    training_state,
)
from img2vec.config import Config, make_config
from img2vec.data import Batch, Plan, View, images_per_epoch, plan_epoch, read_epoch
from img2vec.evaluate.online import prepare_knn
from img2vec.export import export_student
from img2vec.log import SKIPPED, RunLog, Skipped, check_wandb, finite
from img2vec.model import make_model, make_student
from img2vec.optim import learning_rate
from img2vec.step import StepResult, Training, make_training, train_step
from img2vec.teacher import open_teacher
from tokdiv import __version__
from tokdiv.autotune import check_compiler
from tokdiv.data.open import open_source
from tokdiv.data.source import Source
from tokdiv.dist import Processes, caught_signals, choose_dtype, default_workers, processes
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
        progress = _resume(out, run, training)
        group.on_first(lambda: write_atomic(out / CONFIG, json.dumps(run, indent=2) + "\n"))
        _log_headline(source, training)
        run_log = stack.enter_context(
            RunLog(out, progress.step, _end(progress, config, plan), group, config.wandb, run)
        )
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
        knn = prepare_knn(source, config)
        save = functools.partial(_save, out, run, training)
        evaluate = functools.partial(_evaluate, knn, training, run_log)
        try:
            progress, last = _train(training, progress, read, save, evaluate, run_log)
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
    read: Callable[..., Generator[Batch, None, None]],
    save: Callable[[Progress], None],
    evaluate: Callable[[Progress], None],
    run_log: RunLog,
) -> tuple[Progress, StepResult | None]:
    """The loop: for each epoch, for each batch, make a step, log it and save.

    Args:
        progress: where to begin.
        read: gives the batches of an epoch from its step `first` on.
        save, evaluate: called with the progress.

    Returns:
        Where the run is now, and its last step.

    Raises:
        Interrupted: after saving. RunError: the loss is not finite any more.
    """
    config, plan, group = training.config, training.plan, training.group
    peak, end, result = config.peak_lr(plan.global_batch), _end(progress, config, plan), None
    training.model.train()
    with caught_signals() as interruption:
        evaluate(progress)  # an interruption at an epoch's very end came before it
        for epoch in range(progress.epoch, config.epochs):
            with contextlib.closing(read(epoch, first=progress.step_in_epoch)) as batches:
                for number in range(progress.step_in_epoch, plan.steps):
                    if progress.step >= end:
                        return progress, result
                    # What draws random numbers in a step (drop path, say) draws the same on resuming.
                    torch.manual_seed(_step_seed(config.seed, progress.step, group.rank))
                    done = epoch + number / plan.steps
                    lr = learning_rate(done, config.epochs, config.warmup, peak)
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
    """Student and teacher; the student's weights do not depend on what loading the teacher draws."""
    if config.shard and group.world == 1:
        raise UsageError("--shard spreads the student over processes: start several with torchrun")
    device = group.device
    torch.manual_seed(config.seed)
    encoder = make_student(config)
    teacher = open_teacher(
        given,
        config.image_size,
        device=device,
        dtype=choose_dtype(config.dtype, device),
        compile=config.compiles_on(device),
    )
    torch.manual_seed(_step_seed(config.seed, 0, 0))
    model = make_model(encoder, teacher, config)
    return make_training(config, plan, group, teacher, model)


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def _resume(out: Path, run: dict[str, Any], training: Training) -> Progress:
    """Load the last checkpoint, where there is one, and say where the run goes on.

    It goes on at the very step, or with another number of processes at the next epoch.
    """
    plan, world = training.plan, training.group.world
    found = load_last(out)
    if found is None:
        return Progress(world=world, global_batch=plan.global_batch)
    path, state = found
    check_same_run(out, state, run)
    load_training_state(training.model, training.optimizer, state, path)
    progress = Progress.from_dict(state["progress"], path)
    log.info("resuming at step %d, epoch %d", progress.step, progress.epoch)
    if progress.world != world and progress.step_in_epoch:
        log.info(
            "it was begun on %d processes, now %d: on to the next epoch", progress.world, world
        )
        progress = dataclasses.replace(progress, epoch=progress.epoch + 1, step_in_epoch=0)
    return dataclasses.replace(progress, world=world, global_batch=plan.global_batch)


def _end(progress: Progress, config: Config, plan: Plan) -> int:
    """The step at which the run will end."""
    left = (config.epochs - progress.epoch) * plan.steps - progress.step_in_epoch
    end = progress.step + left
    return end if config.max_steps is None else min(end, config.max_steps)


def _log_headline(source: Source, training: Training) -> None:
    """What the run is, in a few lines."""
    config, plan, group = training.config, training.plan, training.group
    teacher, layout = training.teacher, training.model.layout
    parameters = sum(p.numel() for p in training.model.encoder.parameters()) / 1e6
    batch = f"{plan.batch_size} images x {group.world} processes x {plan.accumulate} accumulated"
    masked = f"{layout.num_masked} of {layout.num_units} units of {config.mask_unit} px are masked"
    for line in (
        f"student: {config.student}, {parameters:.1f} M parameters, {training.dtype} on {group.device}",
        f"teacher: {teacher.name}, {teacher.grid[0]} x {teacher.grid[1]} tokens of {teacher.dim}",
        f"data: {source.name}, {plan.images:,} images; {masked}",
        f"global batch: {plan.global_batch} = {batch}; {plan.steps} steps an epoch",
        f"peak learning rate: {config.peak_lr(plan.global_batch):.3g}",
    ):
        log.info("%s", line)
    wanted = config.batch_size * config.accumulate * group.world
    if plan.images < wanted:
        log.warning(
            "a batch of %d images is larger than the data: each step takes all %d images once",
            wanted,
            plan.images,
        )
    for warning in source.warnings:
        log.warning("%s", warning)


@contextlib.contextmanager
def _enough_memory(plan: Plan, device: torch.device) -> Iterator[None]:
    """Turn a shortage of memory into one line that says what to try."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        half = max(1, plan.batch_size // 2)
        remedy = (
            f"try --batch-size {half} --accumulate {plan.accumulate * 2}, which gives the same global batch"
            if plan.batch_size > 1
            else "take a smaller --student or --image-size, or --shard over more processes"
        )
        raise RunError(
            f"not enough memory on {device} for {plan.batch_size} images at a time: {remedy}"
        ) from error


# In the loop -------------------------------------------------------------------------------------


def _save_is_due(progress: Progress, config: Config) -> bool:
    """Every --save-every steps, else at the end of each epoch."""
    if config.save_every is not None:
        return progress.step % config.save_every == 0
    return progress.step_in_epoch == 0


def _save(out: Path, run: dict[str, Any], training: Training, progress: Progress) -> None:
    state = training_state(training.model, training.optimizer)
    state |= {"progress": dataclasses.asdict(progress), **run}
    training.group.on_first(lambda: save_checkpoint(out, state, training.config.keep))


def _evaluate(
    knn: Callable[..., float | None] | None,
    training: Training,
    run_log: RunLog,
    progress: Progress,
) -> None:
    """Measure the student where an epoch has just ended at which that is due and was not done."""
    config, epochs = training.config, progress.epoch
    if knn is None or not epochs or progress.step_in_epoch:
        return
    if epochs < config.epochs and epochs % config.knn_every:
        return
    if not training.group.broadcast(run_log.evaluated == progress.step):
        accuracy = knn(training.model, training.group.device)
        run_log.evaluation({"step": progress.step, "epoch": epochs - 1, "knn_accuracy": accuracy})


def _check_divergence(
    training: Training, progress: Progress, result: StepResult, out: Path
) -> None:
    """End a run that has not made a step for a while, and say why."""
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
        log.warning(
            "%d of %d steps were skipped: their loss was not finite",
            progress.skipped,
            progress.step,
        )
    weights, student = model_state(training.model), out / "student"
    where = dataclasses.asdict(progress)
    training.group.on_first(
        lambda: export_student(
            out=student, **student_export(training.config, weights, run["teacher"], where)
        )
    )
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
        log.warning(
            "%s is saved, but its report could not be written (%s): img2vec.report.write_report(%r) tries again",
            out,
            first_line(error),
            str(out),
        )
