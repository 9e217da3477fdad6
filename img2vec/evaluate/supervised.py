"""One batch of fine-tuning, and one measurement of a classifier."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from img2vec.evaluate.augment import TrainingStep, seeded
from img2vec.evaluate.features import process, sum_over_processes
from img2vec.evaluate.labeled import LabeledData
from tokdiv.data.loader import read_batches
from tokdiv.errors import RunError


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; the defaults of `finetune` are MAE's for ViT-B.

    For ViT-L: 50 epochs, blr 1e-3, layer_decay 0.75, drop_path 0.2.
    """

    epochs: int
    batch_size: int
    lr: float
    min_lr: float
    warmup_epochs: float
    weight_decay: float
    layer_decay: float
    drop_path: float
    mixup: float
    cutmix: float
    smoothing: float
    auto_augment: str
    reprob: float
    image_size: int
    dtype: str
    seed: int


def accumulate_gradient(
    trained: nn.Module,
    step: TrainingStep,
    recipe: Recipe,
    mixing: Any,
    device: torch.device,
) -> tuple[Tensor, list[int]]:
    """Add the gradient of a step: that of the mean loss over the usable images of all processes.

    Returns:
        The mean loss of this process's usable images, on the device, and the indices of unusable images.
    """
    total = torch.zeros((), device=device)
    num_usable, skipped = 0, []
    for number, batch in enumerate(step.batches):
        view, target = batch.images, batch.labels
        num_usable += len(view)
        skipped += batch.skipped
        share = len(view) / step.num_images
        if not len(view):
            # All processes must take part in the exchange of gradients: black images that count nothing.
            size = recipe.image_size
            view, target = torch.zeros(2, 3, size, size), torch.zeros(2, dtype=torch.int64)
        view, target = view.to(device, non_blocking=True), target.to(device, non_blocking=True)
        smoothing = recipe.smoothing
        if mixing is not None and len(view) > 1:
            rank, _ = process()
            odd = len(view) % 2  # timm pairs the images of a batch: one without partner is left out
            view, target = view[odd:], target[odd:]
            with seeded(recipe.seed, step.epoch, step.step, rank, number):
                view, target = mixing(view, target)
            smoothing = 0.0  # timm's targets are smoothed already
        # Between processes, gradients are exchanged in the last backward pass only.
        inner = isinstance(trained, DistributedDataParallel) and number + 1 < step.num_batches
        with trained.no_sync() if inner else nullcontext():  # type: ignore[operator]
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                logits = trained(view)
            loss = share * F.cross_entropy(logits.float(), target, label_smoothing=smoothing)
            loss.backward()
        total += loss.detach()
    # So far, unusable images counted as images without a loss.
    everywhere = float(sum_over_processes(torch.tensor(float(num_usable)), device))
    if 0 < everywhere < recipe.batch_size:
        for parameter in trained.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(recipe.batch_size / everywhere)
    return total * (step.num_images / max(1, num_usable)), skipped


def mixing_of(recipe: Recipe, num_classes: int) -> Any:
    """timm's mixup or cutmix of each batch, one of the two by a coin; None where both are off."""
    from timm.data import Mixup

    if not recipe.mixup and not recipe.cutmix:
        return None
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        label_smoothing=recipe.smoothing,
        num_classes=num_classes,
    )


@torch.no_grad()
def measure_accuracy(
    network: nn.Module,
    data: LabeledData,
    mean: Tensor,
    std: Tensor,
    recipe: Recipe,
    *,
    workers: int,
    batch_size: int,
) -> dict[str, float]:
    """top1, top5 (from five classes on), loss, and the number of images, each counted once.

    Args:
        mean, std: (3, 1, 1), in units of [0, 255].
    """
    rank, world = process()
    device = mean.device
    network.eval()
    totals = torch.zeros(4, dtype=torch.float64)  # images, right, right among five, loss
    for views, labels in _views(data, recipe.image_size, rank, world, batch_size, workers):
        labels = labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            logits = network((views.to(device).float() - mean) / std).float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        right = ranked == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        found = [len(labels), int(right[:, 0].sum()), int(right.sum()), float(loss)]
        totals += torch.tensor(found, dtype=torch.float64)
    num_images, top1, top5, loss = sum_over_processes(totals, device).tolist()
    if not num_images:
        raise RunError(f"'{data.source.name}': none of its {len(data)} images can be used")
    metrics = {"top1": top1 / num_images}
    if data.num_classes >= 5:
        metrics["top5"] = top5 / num_images
    return {**metrics, "loss": loss / num_images, "images": num_images}


def _views(
    data: LabeledData, size: int, rank: int, world: int, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    mine = np.arange(rank, len(data), world, dtype=np.int64)
    blocks = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    for batch in read_batches(data.source, data.indices, blocks, {size}, workers=max(1, workers)):
        if len(batch.views[size]):
            labels = data.labels[batch.positions[batch.usable]]
            yield batch.views[size], torch.from_numpy(labels)
