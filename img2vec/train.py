"""Pretraining, from top to bottom: settings, teacher, student, the loop, the student's export.

img2vec pretrain photos/ --teacher dino_resnet50 -o runs/pretrain
torchrun --nproc-per-node 8 -m img2vec pretrain photos/ --teacher dino_resnet50 -o runs/pretrain
"""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from img2vec.checkpoint import (
    Progress,
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
from img2vec.log import SKIPPED, Log, Skipped, check_wandb
from img2vec.loss import global_loss, patch_loss
from img2vec.masking import Layout, plan_layout, split_indices
from img2vec.model import Img2Vec, choose_attention, make_student
from img2vec.optim import learning_rate, make_optimizer
from img2vec.run import (
    EXIT_CODES,
    caught_signals,
    check_same_run,
    open_out,
    resumed,
)
from img2vec.targets import make_targets, split_targets
from tokdiv import __version__
from tokdiv.autotune import check_compiler
from tokdiv.data.loader import Source
from tokdiv.data.open import open_source
from tokdiv.dist import Processes, choose_dtype, processes
from tokdiv.errors import RunError, SharedError, UsageError
from tokdiv.ranking import versions
from tokdiv.run_dir import write_atomic
from tokdiv.similarity import token_similarity
from tokdiv.teachers.load import load_teacher
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher

MAX_IN_A_ROW = 10  # steps without a finite loss before the run stops
SIMILARITY_EVERY = 10  # steps between measurements of the student's own token similarity


@dataclass(frozen=True)
class Pretrained:
    """The end of a run. loss: of the last step, None where none was done. student: the exported folder."""

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
    """Pretrain a student to predict a teacher's tokens at masked places, and export it.

    Resumes where `out` holds a run with the same settings, data and teacher, bit for bit on a CPU; after
    SIGINT, SIGTERM or SIGUSR1 it saves and raises SystemExit with 130, 143 or 143.

    Args:
        data: a folder of images or whatever else `tokdiv rank` takes as DATA.
        teacher: a SPEC, a TeacherSpec, a Teacher, or the folder (or ranking.json) of a ranking, which
            means its winner.
        out: the run's folder.
        preset: a key of PRESETS, default "vit_base".
        config: settings over the preset's: a YAML file, or a whole Config in its place.
        resume: False moves an old run to `out`.bak-N.
        options: single settings, fields of Config; they win.

    Raises:
        UsageError: a mistake in the call. RunError: a failure while running.
    """
    if isinstance(config, Config):
        given = {k: v for k, v in options.items() if v is not None}
        settings = Config.from_dict({**config.to_dict(), **given}, "the call")
    else:
        settings = make_config(preset, config, options)
    with contextlib.ExitStack() as stack:
        team = stack.enter_context(processes(settings.device))
        stack.enter_context(_forked_generators(team))
        caught = stack.enter_context(caught_signals())
        return _run(str(data), teacher, Path(out), settings, resume, team, caught, stack)


def _run(
    data: str,
    teacher_given: str | TeacherSpec | Teacher,
    out: Path,
    config: Config,
    resume: bool,
    team: Processes,
    caught: list[int],
    stack: contextlib.ExitStack,
) -> Pretrained:
    device, main = team.device, team.rank == 0
    dtype = choose_dtype(config.dtype, device)
    check_compiler(config.compile, device)
    compiles = config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
    say = _sayer(main)

    if config.wandb:
        check_wandb()

    # What is learned from, from whom, and where things lie.
    source = open_source(data)
    plan = plan_epoch(
        images_per_epoch(source, config.epoch_size),
        config.batch_size,
        config.accumulate,
        team.world,
    )
    if config.shard and team.world == 1:
        raise UsageError("--shard spreads the student over processes: start several with torchrun")
    torch.manual_seed(config.seed)
    encoder = make_student(config)
    teacher = _open_teacher(teacher_given, config, device, dtype, compiles, say)
    layout = plan_layout(
        config.image_size,
        encoder.patch_embed.patch_size[0],
        config.mask_unit,
        config.mask_ratio,
        teacher.grid,
        config.align,
        teacher.name,
    )
    torch.manual_seed(_step_seed(config.seed, 0, 0))  # whatever loading the teacher drew
    model = Img2Vec(encoder, layout, teacher.dim, config).to(device)
    choose_attention(model, device, dtype)
    view = View(config.image_size, config.crop_scale, layout, config.seed)

    # The run's folder: opened by the first process, which tells the others what it found.
    run: dict[str, Any] = {
        "version": __version__,
        "data": {"source": source.name, "count": source.count, "fingerprint": source.fingerprint},
        "teacher": teacher.spec.to_dict(),
        "config": config.to_dict(),
        "world": team.world,
        "command": sys.argv,
        "versions": versions(),
    }
    stack.callback(open_out(out, run, resume, team).release)
    found = load_last(out)
    progress = Progress(world=team.world, global_batch=plan.global_batch)
    if found is not None:
        path, state = found
        check_same_run(out, state, run)
        progress = resumed(Progress.from_dict(state["progress"], path), plan, team, say)
    if main:
        write_atomic(out / "config.json", json.dumps(run, indent=2) + "\n")

    # Student and optimizer over the processes; the teacher stands outside all of it.
    if config.shard:
        _shard(model)
    if compiles:
        model.compile()
    optimizer = make_optimizer(model, config.weight_decay)
    if found is not None:
        load_training_state(model, optimizer, found[1], path)
        del found, state
    wrapped: nn.Module = model
    if team.world > 1 and not config.shard:
        # Buffers are constants here. torch 2.15 calls the option by another name.
        accepted = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
        unsynchronized: dict[str, Any] = {name: False}
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **unsynchronized,
        )
    trained = [p for p in model.parameters() if p.requires_grad]

    peak = config.peak_lr(plan.global_batch)
    total = config.epochs * plan.steps
    if progress.epoch < config.epochs:
        left = (config.epochs - progress.epoch) * plan.steps - progress.step_in_epoch
        total = min(progress.step + left, config.max_steps or progress.step + left)
    say(_headline(config, source, plan, layout, teacher, model, peak, dtype, team))
    skipped_images = Skipped(out)
    log = stack.enter_context(Log(out, progress.step, total, main, config.wandb, run))
    workers = config.workers or _default_workers(team)
    cache: dict[int, bytes] | None = {} if config.cache_ram and source.permutable else None
    knn = prepare_knn(source, config)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    loss: float | None = None
    saved_at = progress.step if progress.step else -1

    def save() -> None:
        nonlocal saved_at
        if saved_at == progress.step:
            return
        trained_state = training_state(model, optimizer)
        if main:
            where = dataclasses.asdict(progress)
            whole = {**trained_state, "progress": where, **run}
            save_checkpoint(out, whole, config.keep)
        saved_at = progress.step

    def finished() -> bool:
        return config.max_steps is not None and progress.step >= config.max_steps

    def evaluate() -> None:
        """Measure the student where an epoch has just ended at which that is due, and has not been done."""
        epochs = progress.epoch
        if knn is None or not epochs or progress.step_in_epoch:
            return
        if epochs < config.epochs and epochs % config.knn_every:
            return
        if not team.broadcast(log.evaluated == progress.step):
            accuracy = knn(model, device)
            log.evaluation({"step": progress.step, "epoch": epochs - 1, "knn_accuracy": accuracy})

    try:
        model.train()
        evaluate()  # it was left out where the run was interrupted at an epoch's very end
        clock = time.perf_counter()
        while progress.epoch < config.epochs and not finished():
            epoch = progress.epoch
            batches = read_epoch(
                source,
                plan,
                view,
                epoch,
                rank=team.rank,
                first=progress.step_in_epoch,
                workers=workers,
                pin_memory=device.type == "cuda",
                cache=cache,
                report=skipped_images,
            )
            with contextlib.closing(batches):
                for number in range(progress.step_in_epoch, plan.steps):
                    # Whatever draws random numbers in a step (drop path, say) draws the same on resuming.
                    torch.manual_seed(_step_seed(config.seed, progress.step, team.rank))
                    measures = (progress.step + 1) % SIMILARITY_EVERY == 0 or progress.step == 0
                    # Sums over this process's images: patch loss, global loss, usable images, stop,
                    # token similarity.
                    sums = torch.zeros(5, device=device)
                    for inner in range(plan.accumulate):
                        batch = next(batches).to(device)
                        with _synchronized(wrapped, inner == plan.accumulate - 1):
                            patch, whole, representation = image_losses(
                                wrapped, teacher, batch, layout, config, autocast
                            )
                            patch, whole = (
                                (per_image * batch.usable).sum() for per_image in (patch, whole)
                            )
                            # Processes average their gradients; the sum over the global batch is wanted.
                            share = team.world / plan.global_batch
                            ((patch + config.global_weight * whole) * share).backward()
                        sums[:3] += torch.stack([patch, whole, batch.usable.sum()]).detach()
                        if measures:
                            sums[4] += (token_similarity(representation) * batch.usable).sum()
                    sums[3] = float(bool(caught))
                    if team.world > 1:
                        distributed.all_reduce(sums)
                    patch_sum, global_sum, usable, stop, similarity = sums.tolist()

                    # Images that cannot be used count nothing: the mean is over those that can.
                    if 0 < usable < plan.global_batch:
                        for parameter in trained:
                            if parameter.grad is not None:
                                parameter.grad.mul_(plan.global_batch / usable)
                    patch_mean, global_mean = (
                        (s / usable if usable else math.nan) for s in (patch_sum, global_sum)
                    )
                    loss = patch_mean + config.global_weight * global_mean
                    lr = learning_rate(
                        epoch + number / plan.steps, config.epochs, config.warmup, peak
                    )
                    norm = math.nan
                    if math.isfinite(loss):
                        norm = _clip(trained, config.clip_grad)
                    if math.isfinite(norm):
                        for group in optimizer.param_groups:
                            group["lr"] = lr
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    bad = not math.isfinite(norm)
                    progress = dataclasses.replace(
                        progress,
                        step=progress.step + 1,
                        epoch=epoch + (number + 1 == plan.steps),
                        step_in_epoch=(number + 1) % plan.steps,
                        skipped=progress.skipped + bad,
                        num_consecutive_skipped=progress.num_consecutive_skipped + 1 if bad else 0,
                    )

                    before, clock = clock, time.perf_counter()
                    line = {
                        "step": progress.step,
                        "epoch": epoch,
                        "loss": _finite(loss),
                        "patch_loss": _finite(patch_mean),
                        "global_loss": _finite(global_mean),
                        "lr": lr,
                        "images_per_second": round(plan.global_batch / (clock - before), 2),
                        "images": int(usable),
                        "grad_norm": _finite(norm),
                        "skipped_steps": progress.skipped,
                    }
                    if measures and usable:
                        line["token_similarity"] = _finite(similarity / usable)
                    log.step(line)
                    if progress.num_consecutive_skipped >= MAX_IN_A_ROW:
                        raise _diverged(out, usable, teacher, batch)
                    due = config.save_every or plan.steps
                    position = progress.step if config.save_every else progress.step_in_epoch
                    if stop or finished() or position % due == 0:
                        save()
                    if stop:
                        number_caught = caught[0] if caught else signal.SIGTERM
                        log.say(
                            f"{signal.Signals(number_caught).name}: saved at step {progress.step}; the "
                            f"same command goes on from there"
                        )
                        state = model_state(model)
                        if main:
                            _report(out, state, teacher, source, log.say)
                        raise SystemExit(EXIT_CODES[signal.Signals(number_caught)])
                    if finished():
                        break
            evaluate()
            clock = time.perf_counter()
        save()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
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

    if 0 < progress.skipped == progress.step:
        raise SharedError(
            f"not one of the {progress.step} steps could be made: the loss was not finite, or no image can be "
            f"used ({SKIPPED} lists them)"
        )
    if progress.skipped:
        say(
            f"warning: {progress.skipped} of {progress.step} steps were skipped: their loss was not finite"
        )

    # The student, for timm.
    exported = out / "student"
    state = model_state(model)
    if main:
        from img2vec.export import export_student

        described = student_export(config, state, run["teacher"], dataclasses.asdict(progress))
        export_student(out=exported, **described)
        _report(out, state, teacher, source, say)
    if team.world > 1:
        distributed.barrier()
    return Pretrained(out, exported, progress.step, progress.epoch, _finite(loss))


def image_losses(
    model: nn.Module,
    teacher: Teacher,
    batch: Batch,
    layout: Layout,
    config: Config,
    autocast: torch.autocast,
) -> tuple[Tensor, Tensor, Tensor]:
    """One forward pass: the teacher sees the whole view, the student its visible patches.

    Args:
        model: an Img2Vec, wrapped or not. batch: on the device.

    Returns:
        The patch loss (B,), the global loss (B,), 0 where it is off, and the student's multi-block tokens
        (B, V, D) without a gradient.
    """
    masked = split_indices(batch.masks, layout)[2]
    tokens = teacher(resized(batch.images, teacher.size))
    hidden, mean = split_targets(
        make_targets(tokens, teacher.grid, layout, config.target_norm), masked
    )
    del tokens  # the teacher's memory is free again while the student runs
    with autocast:
        prediction = model(batch.images, batch.masks)
    patch = patch_loss(prediction.tokens, hidden)
    image = prediction.image
    whole = torch.zeros_like(patch) if image is None else global_loss(image, mean)
    return patch, whole, prediction.representation.detach()


# The parts ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _forked_generators(team: Processes) -> Iterator[None]:
    """The caller's random generators are left as they were."""
    with torch.random.fork_rng(devices=[team.device] if team.device.type == "cuda" else []):
        yield


def _sayer(main: bool) -> Callable[[str], None]:
    return lambda text: print(text, file=sys.stderr, flush=True) if main else None


def _report(
    out: Path,
    weights: dict[str, Tensor],
    teacher: Teacher,
    source: Source,
    say: Callable[[str], None],
) -> None:
    """The page of the run; one that cannot be written spoils nothing."""
    try:
        from img2vec.report import write_report

        write_report(out, weights=weights, teacher=teacher, source=source)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        say(
            f"warning: {out} is saved, but its report could not be written ({reason}): "
            f"img2vec.report.write_report({str(out)!r}) tries again"
        )


def _open_teacher(
    given: str | TeacherSpec | Teacher,
    config: Config,
    device: torch.device,
    dtype: str,
    compiles: bool,
    say: Callable[[str], None],
) -> Teacher:
    """The teacher of a SPEC, of a ranking's winner, or the one given."""
    if isinstance(given, Teacher):
        if given.spec.is_custom:
            say(
                f"remark: {given.name} is made by code of your own: without that code this run cannot "
                f"be resumed, nor its teacher be loaded again"
            )
        if given.size != config.image_size:
            say(
                f"{given.name} sees the view resized from {config.image_size} to {given.size} pixels"
            )
        return given.prepare(device, dtype, compiles)
    if isinstance(given, (str, Path)):
        path = Path(given).expanduser()
        if (path / "ranking.json").is_file() or (path.suffix == ".json" and path.is_file()):
            given = _winner(path, say)
        elif path.is_dir():
            raise UsageError(
                f"--teacher '{given}': a folder without ranking.json; expected a SPEC (see: tokdiv teachers) "
                f"or the folder of a finished `tokdiv rank`"
            )
    teacher = load_teacher(
        given if isinstance(given, TeacherSpec) else str(given),
        image_size=config.image_size,
        device=device,
        dtype=dtype,
    )
    return teacher.prepare(device, dtype, compiles) if compiles else teacher


def _winner(path: Path, say: Callable[[str], None]) -> TeacherSpec:
    """The best teacher of a ranking, with a remark where the ranking does not vouch for it."""
    from tokdiv.ranking import load_ranking

    ranking = load_ranking(path)
    best: TeacherSpec = ranking.best
    if best.is_custom:
        raise UsageError(
            f"--teacher '{path}': its winner '{best.name}' was made by code of your own, which a ranking does not "
            f"hold; name that code with --teacher-module FILE.py:FUNCTION in place of --teacher"
        )
    say(f"teacher: {best.name}, the winner of {path}")
    if len(ranking.teachers) > 1 and not ranking.certified:
        if ranking.certificate["best_certified"]:
            say(
                "remark: this ranking's winner is certified, the order of its other teachers is not"
            )
        else:
            say("remark: this ranking is not certified: the order of its teachers may be chance")
    for remark in ranking.remarks():
        say(f"remark: {remark}")
    return best


def resized(images: Tensor, size: int) -> Tensor:
    """The same view for a teacher of another size: uint8 (B, 3, S, S) to uint8 (B, 3, size, size)."""
    if images.shape[-1] == size:
        return images
    if images.device.type == "cpu":
        return F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    resized = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _shard(model: Img2Vec) -> None:
    """FSDP2: each encoder block a unit, and the rest another: the decoder's blocks are not called whole."""
    for block in model.encoder.blocks:
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "tokens")


@contextlib.contextmanager
def _synchronized(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged in the last forward pass of a step only."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    yield


def _clip(parameters: list[nn.Parameter], largest: float | None) -> float:
    """The norm of the whole gradient, the same on every process; clipped to `largest` where given."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if largest is not None and value > largest:
        for gradient in gradients:
            gradient.mul_(largest / value)
    return value


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def _finite(value: float | None) -> float | None:
    """NaN and infinity are no JSON."""
    return value if value is not None and math.isfinite(value) else None


def _diverged(out: Path, usable: float, teacher: Teacher, batch: Batch) -> RunError:
    found = load_last(out)
    last = f"the last good checkpoint is {found[0]}" if found else "no checkpoint was saved before"
    if not usable:
        return SharedError(
            f"none of the images of the last {MAX_IN_A_ROW} steps can be used; {last}"
        )
    if not teacher(resized(batch.images, teacher.size)).isfinite().all():
        return SharedError(
            f"the teacher {teacher.name} gives tokens that are not finite: its weights are damaged, or too "
            f"large for this --dtype; take another one, or --dtype float32 in another -o"
        )
    return SharedError(
        f"the loss was not finite {MAX_IN_A_ROW} steps in a row; {last}; begin anew in another -o, with a lower "
        f"--lr, --clip-grad 1 or --dtype float32"
    )


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in text


def _default_workers(team: Processes) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, (cores or 1) // team.local_world))


def _headline(
    config: Config,
    source: Source,
    plan: Plan,
    layout: Layout,
    teacher: Teacher,
    model: Img2Vec,
    peak: float,
    dtype: str,
    team: Processes,
) -> str:
    """What the run is, in a few lines."""
    parameters = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    batch = f"{plan.batch_size} images x {team.world} processes x {plan.accumulate} accumulated"
    hidden = f"{layout.num_masked} of {layout.num_units} units of {config.mask_unit} px are hidden"
    grid = f"{teacher.grid[0]} x {teacher.grid[1]} tokens of {teacher.dim}"
    lines = [
        f"student: {config.student}, {parameters:.1f} M parameters, {dtype} on {team.device}",
        f"teacher: {teacher.name}, {grid}",
        f"data: {source.name}, {plan.images:,} images; {hidden}",
        f"global batch: {plan.global_batch} = {batch}; {plan.steps} steps an epoch",
        f"peak learning rate: {peak:.3g}",
    ]
    wanted = config.batch_size * config.accumulate * team.world
    if plan.images < wanted:
        lines.append(
            f"remark: a batch of {wanted} images is larger than the data: each step takes all "
            f"{plan.images} images once"
        )
    lines += [f"remark: {warning}" for warning in source.warnings]
    return "\n".join(lines)
