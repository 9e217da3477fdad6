"""Training of a detector: the loop, one step, and the checkpoint that a run resumes from."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from img2vec.checkpoint import (
    load_training_state,
    read_checkpoint,
    training_state,
    write_checkpoint,
)
from img2vec.evaluate.coco import CocoData
from img2vec.evaluate.detection_data import Sample, training_batches
from img2vec.evaluate.detection_eval import as_input, evaluate_detector
from img2vec.evaluate.detector import detector_groups
from img2vec.evaluate.features import enough_memory
from img2vec.evaluate.settings import DetectRecipe
from tokdiv.dist import Interruption, Processes, caught_signals
from tokdiv.errors import Interrupted, RunError, UsageError
from tokdiv.progress import progress_bar
from tokdiv.teachers.teacher import Teacher

CHECKPOINT, KIND = "checkpoint.pt", "img2vec detect"
NOT_RECORDED = ("workers", "device", "save_every")  # they do not change the result
NOT_IDENTITY = (*NOT_RECORDED, "eval_every")
LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
DECAY_AT = (
    8 / 9,
    26 / 27,
)  # of the schedule: there the learning rate falls to a tenth, as in ViTDet
EVENTS_EVERY = 10  # steps between the points of TensorBoard


@dataclass(frozen=True)
class Progress:
    """How far the training is.

    step: optimizer steps done.
    history: one entry per epoch: epoch, step, loss and its five parts, lr, and val_ with each metric where it was
        evaluated.
    sums: of the five losses over the steps of the epoch that has begun.
    skipped: training images that cannot be used, with the reason.
    """

    step: int
    history: list[dict[str, Any]]
    sums: list[float]
    skipped: dict[int, str]


def train_detector(
    detector: nn.Module,
    teacher: Teacher,
    train_data: CocoData,
    val_data: CocoData,
    recipe: DetectRecipe,
    group: Processes,
    folder: Path | None,
) -> tuple[Any, Progress]:
    """Train to the last step; the detector to evaluate (the average, with `ema`), and the progress."""
    device = group.device
    groups = detector_groups(detector, recipe.weight_decay, recipe.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=device.type == "cuda")
    average = _average(detector, recipe.ema)
    identity = _identity(teacher, train_data, recipe, group)
    progress = _resume(folder, identity, detector, optimizer, average)
    if group.max(progress.step) != -group.max(-progress.step):
        raise UsageError(
            f"'{folder}' is not seen by all processes: -o must lie on a file system that they share"
        )
    model = detector
    if group.world > 1:
        model = DistributedDataParallel(
            detector, device_ids=[device] if device.type == "cuda" else None
        )
    steps_per_epoch = len(train_data.training_indices()) // recipe.batch_size
    sums = np.array(progress.sums)
    with (
        caught_signals() if folder is not None else nullcontext(Interruption()) as interruption,
        _events(folder, group, progress.step) as report,
        progress_bar(
            total=recipe.max_steps,
            initial=progress.step,
            desc="detect",
            unit="step",
            show=group.rank == 0,
        ) as bar,
    ):
        batches = training_batches(
            train_data,
            size=recipe.image_size,
            scales=(recipe.scale_min, recipe.scale_max),
            flip=recipe.flip,
            batch_size=recipe.batch_size,
            first_step=progress.step,
            num_steps=recipe.max_steps,
            seed=recipe.seed,
            workers=recipe.workers,
            group=group,
        )
        for step, samples in enumerate(batches, start=progress.step):
            losses = train_step(model, optimizer, samples, step, recipe, group)
            if average is not None:
                average.update_parameters(detector)
            sums += losses
            done = step + 1
            rate = optimizer.param_groups[-1]["lr"]
            report("train", done, {**dict(zip(LOSSES, losses)), "loss": sum(losses), "lr": rate})
            bar.update()
            history, skipped = progress.history, dict(progress.skipped)
            skipped |= {s.position: s.reason or "" for s in samples if s.image is None}
            if done % steps_per_epoch == 0 or done == recipe.max_steps:
                epoch = step // steps_per_epoch
                means = (sums / (done - epoch * steps_per_epoch)).tolist()
                entry = {"epoch": epoch, "step": done, "loss": sum(means), "lr": rate}
                entry |= dict(zip(LOSSES, means))
                if (
                    recipe.eval_every
                    and (epoch + 1) % recipe.eval_every == 0
                    and done < recipe.max_steps
                ):
                    evaluated = detector if average is None else average.module
                    entry |= _val_metrics(evaluated, val_data, recipe, group)
                    report("val", done, entry)
                bar.set_postfix(loss=f"{entry['loss']:.3f}")
                history, sums = [*history, entry], np.zeros(len(LOSSES))
            progress = Progress(done, history, sums.tolist(), skipped)
            signal = group.max(interruption.signal)
            if folder is not None and (signal or done % recipe.save_every == 0):
                progress = _save(folder, identity, detector, optimizer, average, progress, group)
            if signal:
                raise Interrupted(signal, f"step {done}")
    progress = dataclasses.replace(progress, skipped=_everywhere(progress.skipped, group))
    return (detector if average is None else average.module), progress


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: list[Sample],
    step: int,
    recipe: DetectRecipe,
    group: Processes,
) -> list[float]:
    """One optimizer step on this process's part of a batch; the five mean losses over all processes."""
    rate = learning_rate(step, recipe.max_steps, recipe.warmup_steps, recipe.lr)
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate * parameters.get("lr_scale", 1.0)
    # Drop path and the sampling of proposals draw from the device's generator; a resumed run must draw the same.
    entropy = np.random.SeedSequence([recipe.seed, step, group.rank])
    torch.manual_seed(int(entropy.generate_state(1)[0]))
    model.train()
    losses = accumulate_gradient(model, samples, recipe, group)
    means = (group.sum(losses.double().cpu()) / group.world).tolist()
    if not np.isfinite(means).all():
        raise RunError(
            f"the loss of step {step} is {sum(means)}: use a lower --blr, --clip-grad 1, or --dtype float32"
        )
    if recipe.clip_grad is not None:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means


def accumulate_gradient(
    model: nn.Module, samples: list[Sample], recipe: DetectRecipe, group: Processes
) -> Tensor:
    """Add the gradient of this process's part of a batch; its mean losses (5,), in the order of LOSSES.

    Each loss is a mean over the anchors or proposals of one forward pass, as on the GPUs of a distributed training.
    """
    device, size = group.device, recipe.micro_batch_size
    usable = [sample for sample in samples if sample.image is not None]
    parts = [usable[start : start + size] for start in range(0, len(usable), size)]
    # Processes average their gradients; the mean over all usable images is wanted.
    num_usable = float(group.sum(torch.tensor(float(len(usable)))))
    total = torch.zeros(len(LOSSES), device=device)
    # Every process must exchange gradients: without usable images, a black one of weight 0.
    for number, part in enumerate(parts or [[_black_sample()]]):
        images = [as_input(sample, device) for sample in part]
        targets = [{k: v.to(device, non_blocking=True) for k, v in s.target.items()} for s in part]
        # Between processes, only the last backward pass exchanges gradients.
        inner = isinstance(model, DistributedDataParallel) and number + 1 < len(parts)
        with (
            model.no_sync() if inner else nullcontext(),  # type: ignore[operator]
            enough_memory("--micro-batch-size", size),
        ):
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                found = model(images, targets)
            losses = torch.stack([found[name] for name in LOSSES]) * (
                len(part) * group.world / num_usable if usable else 0.0
            )
            losses.sum().backward()
        total += losses.detach()
    return total


def _black_sample() -> Sample:
    target = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 64, dtype=torch.uint8),
    }
    return Sample(0, torch.zeros(3, 64, 64, dtype=torch.uint8), target)


def learning_rate(step: int, num_steps: int, warmup_steps: int, peak: float) -> float:
    """A linear warm-up, then the peak, then a tenth and a hundredth of it (DECAY_AT)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.1 ** sum(step >= share * num_steps for share in DECAY_AT)


def _average(detector: nn.Module, decay: float) -> AveragedModel | None:
    """The moving average of the weights; None without `--ema`."""
    if not decay:
        return None
    return AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _val_metrics(
    detector: nn.Module, data: CocoData, recipe: DetectRecipe, group: Processes
) -> dict[str, float | None]:
    metrics, *_ = evaluate_detector(
        detector,
        data,
        batch_size=recipe.micro_batch_size,
        dtype=recipe.dtype,
        workers=recipe.workers,
        group=group,
    )
    return {f"val_{name}": value for name, value in metrics.items()}


@contextmanager
def _events(folder: Path | None, group: Processes, step: int) -> Iterator[Any]:
    """A function that writes values for TensorBoard: report(section, step, values)."""
    if folder is None or group.rank:
        yield lambda *values: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=step + 1 if step else None) as writer:

        def report(section: str, step: int, values: dict[str, Any]) -> None:
            if section == "train" and step % EVENTS_EVERY and step > 1:
                return
            for name, value in values.items():
                if value is not None:
                    writer.add_scalar(f"{section}/{name.removeprefix('val_')}", value, step)

        yield report


# Resuming ----------------------------------------------------------------------------------------


def _identity(
    teacher: Teacher, train_data: CocoData, recipe: DetectRecipe, group: Processes
) -> str:
    """What must be equal for a run to be resumed, as JSON; weights count by their hash, wherever they are."""
    spec = teacher.spec.to_dict()
    keys = ("architecture", "sha256", "mean", "std", "size", "arguments", "seed")
    identity = {
        "model": {key: spec[key] for key in keys},
        "train": train_data.fingerprint,
        "settings": {k: v for k, v in vars(recipe).items() if k not in NOT_IDENTITY},
        "world": group.world,
    }
    return json.dumps(identity, sort_keys=True)


def _save(
    folder: Path,
    identity: str,
    detector: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
    progress: Progress,
    group: Processes,
) -> Progress:
    """Write the checkpoint; the progress with the unusable images of all processes."""
    progress = dataclasses.replace(progress, skipped=_everywhere(progress.skipped, group))
    state = training_state(detector, optimizer)  # on every process
    if group.rank == 0:
        if average is not None:
            state["average"] = {k: v.cpu() for k, v in average.state_dict().items()}
        state |= {"identity": identity, "progress": dataclasses.asdict(progress)}
        write_checkpoint(folder / CHECKPOINT, KIND, state)
    return progress


def _everywhere(skipped: dict[int, str], group: Processes) -> dict[int, str]:
    """The unusable images that any process found."""
    found = group.gather(skipped)
    return group.broadcast({k: v for part in found or [] for k, v in part.items()})


def _resume(
    folder: Path | None,
    identity: str,
    detector: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
) -> Progress:
    """Load the checkpoint of the same run, where there is one. Another run's is an error, never overwritten."""
    path = None if folder is None else folder / CHECKPOINT
    if path is None or not path.is_file():
        return Progress(0, [], [0.0] * len(LOSSES), {})
    remedy = "delete it to start anew, or give another folder with -o"
    try:
        state = read_checkpoint(path, KIND)
        same = state.get("identity") == identity
        if same:
            load_training_state(detector, optimizer, state, path)
            if average is not None:
                average.load_state_dict(state["average"])
            return Progress(**state["progress"])
    except UsageError as error:
        raise UsageError(f"{error}; {remedy}") from None
    raise UsageError(f"'{path}' is of a training with other settings: {remedy}")
