"""Fine-tuning of a whole network with UPerNet's heads; the state is saved, and the same call goes on from there."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from img2vec.checkpoint import (
    load_training_state,
    read_checkpoint,
    training_state,
    write_checkpoint,
)
from img2vec.evaluate.confusion import IGNORED
from img2vec.evaluate.features import enough_memory
from img2vec.evaluate.history import recorded
from img2vec.evaluate.linear_head import LOG_EVERY, draw_batches, mean_loss
from img2vec.evaluate.segment_settings import SegmentRecipe
from img2vec.evaluate.segmentation_augment import augmented_batches
from img2vec.evaluate.segmentation_data import SegmentationData
from img2vec.evaluate.segmentation_views import Scores
from img2vec.evaluate.upernet import UPerNet, build_upernet, upernet_groups
from tokdiv.dist import Interruption, Processes, caught_signals
from tokdiv.errors import Interrupted, UsageError
from tokdiv.progress import progress_bar
from tokdiv.teachers.teacher import Teacher

CHECKPOINT, KIND = "checkpoint.pt", "img2vec segment"
AUXILIARY_WEIGHT = 0.4
BETAS = (0.9, 0.999)


def fit_upernet(
    teacher: Teacher,
    data: SegmentationData,
    recipe: SegmentRecipe,
    blocks: list[int] | None,
    group: Processes,
    folder: Path | None,
    identity: str,
) -> tuple[Scores, list[dict[str, Any]]]:
    """Fine-tune the network; the scores of views, and the loss every LOG_EVERY steps.

    Args:
        teacher: with the weights to start from.
        folder: for the checkpoint; None saves nothing. identity: what must be equal for a run to be resumed.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGUSR1 came, and the state is saved.
    """
    device = group.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        network = build_upernet(
            teacher,
            data.num_classes,
            blocks=blocks,
            channels=recipe.channels,
            drop_path=recipe.drop_path,
        )
        if group.world > 1 and device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        network.to(device)
        history = _train(network, teacher, data, recipe, group, folder, identity)
    network.eval()
    mean, std = teacher.mean.to(device), teacher.std.to(device)

    @torch.no_grad()
    def scores(views: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            return network((views.float() - mean) / std)[0].float()

    return scores, history


def _train(
    network: UPerNet,
    teacher: Teacher,
    data: SegmentationData,
    recipe: SegmentRecipe,
    group: Processes,
    folder: Path | None,
    identity: str,
) -> list[dict[str, Any]]:
    """Train up to the last step, from the checkpoint on where there is one."""
    device = group.device
    optimizer = torch.optim.AdamW(
        upernet_groups(network, recipe.weight_decay, recipe.layer_decay),
        lr=recipe.lr,
        betas=BETAS,
        fused=device.type == "cuda",
    )
    done, history = _resume(folder, identity, network, optimizer)
    if group.max(done) != -group.max(-done):
        raise UsageError(
            f"'{folder}' is not seen by all processes: -o must be on a file system that they share"
        )
    model: nn.Module = network
    if group.world > 1:
        model = DistributedDataParallel(
            network, device_ids=[device] if device.type == "cuda" else None
        )
    drawn = draw_batches(len(data), recipe.batch_size, recipe.max_steps, recipe.seed, done)
    own = ((step, batch[group.rank :: group.world]) for step, batch in enumerate(drawn, start=done))
    batches = augmented_batches(
        data,
        own,
        recipe.image_size,
        teacher.mean.flatten().tolist(),
        seed=recipe.seed,
        workers=recipe.workers,
    )
    mean, std = teacher.mean.to(device), teacher.std.to(device)
    losses: list[Tensor] = []

    def save(step: int) -> None:
        if folder is None:
            return
        state = training_state(network, optimizer)  # on every process
        if step == recipe.max_steps:
            state["optimizer"] = {}  # what stays at the end are the network's weights
        state |= {"identity": identity, "step": step, "history": history}
        group.on_first(partial(write_checkpoint, folder / CHECKPOINT, KIND, state))

    with (
        recorded(folder if group.rank == 0 else None, history) as record,
        caught_signals() if folder is not None else nullcontext(Interruption()) as interruption,
        progress_bar(
            total=recipe.max_steps, initial=done, desc="upernet", unit="step", show=group.rank == 0
        ) as bar,
    ):
        for step, (images, labels) in enumerate(batches, start=done + 1):
            rate = learning_rate(step - 1, recipe)
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate * parameters.get("lr_scale", 1.0)
            # Dropout draws from the device's generator; a resumed run must draw the same.
            entropy = np.random.SeedSequence([recipe.seed, step, group.rank])
            torch.manual_seed(int(entropy.generate_state(1)[0]))
            images = (images.to(device, non_blocking=True).float() - mean) / std
            losses.append(upernet_step(model, optimizer, images, labels.to(device), recipe, group))
            bar.update()
            signal = group.max(interruption.signal)
            ends = step == recipe.max_steps
            saves = bool(signal) or ends or step % recipe.save_every == 0
            if saves or step % LOG_EVERY == 0:
                loss = mean_loss(group.sum(torch.stack(losses).mean()), step)
                losses.clear()
                record({"step": step, "loss": loss, "lr": rate})
                bar.set_postfix(loss=f"{loss:.3f}")
            if saves:
                save(step)
            if signal:
                raise Interrupted(signal, f"step {step}")
    return history


def upernet_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    recipe: SegmentRecipe,
    group: Processes,
) -> Tensor:
    """One optimizer step; this process's part of the batch's loss, on the device.

    The loss is the cross-entropy of the head plus AUXILIARY_WEIGHT times the auxiliary head's, each the mean over
    the labeled pixels of the batch of all processes.

    Args:
        images: normalized (n, 3, S, S). labels: int64 (n, S, S), or IGNORED.
    """
    device = images.device
    num_labeled = group.sum((labels != IGNORED).sum()).clamp_min(1)
    size = recipe.micro_batch_size or len(images)
    num_parts = -(-len(images) // size)
    parts = list(zip(images.tensor_split(num_parts), labels.tensor_split(num_parts)))
    total = torch.zeros((), device=device)
    model.train()
    for number, (view, target) in enumerate(parts, start=1):
        # Between processes, only the last backward pass exchanges gradients.
        inner = isinstance(model, DistributedDataParallel) and number < len(parts)
        with (
            model.no_sync() if inner else nullcontext(),  # type: ignore[operator]
            enough_memory("--micro-batch-size", size),
        ):
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                logits = model(view)
            loss = pixel_loss(logits[0], target) + AUXILIARY_WEIGHT * pixel_loss(logits[1], target)
            # DistributedDataParallel divides by the number of processes.
            (loss / num_labeled * group.world).backward()
        total += loss.detach() / num_labeled
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed cross-entropy of the labeled pixels; logits are upsampled to the labels' size."""
    logits = F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear")
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def learning_rate(step: int, recipe: SegmentRecipe) -> float:
    """Linear warm-up, then linearly down to 0 (mmsegmentation's poly schedule of power 1). `step` is from 0."""
    warmup = recipe.warmup_steps
    if step < warmup:
        return recipe.lr * max(step / warmup, 1e-6)
    return recipe.lr * (1 - (step - warmup) / max(1, recipe.max_steps - warmup))


def _resume(
    folder: Path | None, identity: str, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, Any]]]:
    """Load the checkpoint of the same run, where there is one: steps done, and the history."""
    path = None if folder is None else folder / CHECKPOINT
    if path is None or not path.is_file():
        return 0, []
    remedy = "delete it to start anew, or give another folder with -o"
    try:
        state = read_checkpoint(path, KIND)
        if state.get("identity") == identity:
            load_training_state(network, optimizer, state, path)
            return int(state["step"]), list(state["history"])
    except UsageError as error:
        raise UsageError(f"{error}; {remedy}") from None
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"'{path}' does not say how far it is; {remedy}") from None
    differing = _differences(state.get("identity"), identity)
    raise UsageError(f"'{path}' is of another run ({differing}): {remedy}")


def _differences(found: Any, wanted: str) -> str:
    """The first settings that differ between two identities."""
    try:
        old, new = json.loads(found), json.loads(wanted)
        names = [key for key in new if old.get(key) != new[key]]
        if names == ["settings"]:
            names = [k for k in new["settings"] if old["settings"].get(k) != new["settings"][k]]
    except (ValueError, TypeError, AttributeError):
        names = []
    return f"{', '.join(names[:3])} differ" if names else "other settings"
