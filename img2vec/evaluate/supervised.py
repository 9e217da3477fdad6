"""One step of fine-tuning, and the accuracy of a classifier."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from img2vec.evaluate.augment import TrainingStep, seeded
from img2vec.evaluate.features import enough_memory, no_usable_images, read_views
from img2vec.evaluate.labeled import LabeledData
from img2vec.evaluate.settings import Recipe
from img2vec.optim import learning_rate
from tokdiv.dist import Processes, lost_peers


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: TrainingStep,
    recipe: Recipe,
    mixing: Any,
    group: Processes,
) -> tuple[Tensor, list[int]]:
    """One optimizer step; returns what `accumulate_gradient` does."""
    rate = rate_at(step.epoch + step.step / step.num_steps, recipe)
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate * parameters.get("lr_scale", 1.0)
    model.train()
    loss, skipped = accumulate_gradient(model, step, recipe, mixing, group)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, skipped


def rate_at(epoch: float, recipe: Recipe) -> float:
    """The learning rate of the last layer at an epoch and its fraction."""
    return learning_rate(epoch, recipe.epochs, recipe.warmup_epochs, recipe.lr, recipe.min_lr)


def accumulate_gradient(
    model: nn.Module, step: TrainingStep, recipe: Recipe, mixing: Any, group: Processes
) -> tuple[Tensor, list[int]]:
    """Add the gradient of the mean loss over a step's usable images, of all processes.

    Returns:
        The mean loss of this process's usable images, on the device, and the indices of unusable images.
    """
    device, size = group.device, recipe.image_size
    total = torch.zeros((), device=device)
    num_usable, skipped = 0, []
    for number, batch in enumerate(step.batches):
        view, target = batch.images, batch.labels
        num_usable += len(view)
        skipped += batch.skipped
        weight = len(view) / step.num_images
        if not len(view):
            # Every process must exchange gradients: black images with weight 0.
            view, target = torch.zeros(2, 3, size, size), torch.zeros(2, dtype=torch.int64)
        view, target = view.to(device, non_blocking=True), target.to(device, non_blocking=True)
        smoothing = recipe.smoothing
        if mixing is not None and len(view) > 1:
            odd = len(view) % 2  # timm mixes pairs: an image without a partner is left out
            view, target = view[odd:], target[odd:]
            with seeded(recipe.seed, step.epoch, step.step, group.rank, number):
                view, target = mixing(view, target)
            smoothing = 0.0  # timm has smoothed the targets
        # Between processes, only the last backward pass exchanges gradients.
        inner = isinstance(model, DistributedDataParallel) and number + 1 < step.num_batches
        with (
            model.no_sync() if inner else nullcontext(),  # type: ignore[operator]
            lost_peers(),
            enough_memory("--micro-batch-size", recipe.micro_batch_size),
        ):
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                logits = model(view)
            loss = weight * F.cross_entropy(logits.float(), target, label_smoothing=smoothing)
            loss.backward()
        total += loss.detach()
    # So far, unusable images counted as images without a loss.
    total_usable = float(group.sum(torch.tensor(float(num_usable))))
    if 0 < total_usable < recipe.batch_size:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(recipe.batch_size / total_usable)
    return total * (step.num_images / max(1, num_usable)), skipped


def make_mixing(recipe: Recipe, num_classes: int) -> Any:
    """timm's mixup or cutmix of each batch, one of the two by chance; None where both are off."""
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
    group: Processes,
) -> tuple[dict[str, float], int]:
    """top1, top5 (from five classes on) and loss; and the number of usable images, each counted once.

    Args:
        mean, std: (3, 1, 1), in units of [0, 255].
    """
    device, size = group.device, recipe.image_size
    network.eval()
    totals = torch.zeros(4, dtype=torch.float64)  # images, top-1 hits, top-5 hits, sum of losses
    batches = read_views(
        data, size, group, batch_size=recipe.micro_batch_size, workers=recipe.workers
    )
    for batch in batches:
        view = batch.views[size]
        if not len(view):
            continue
        labels = torch.from_numpy(data.labels[batch.positions[batch.usable]]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            logits = network((view.to(device).float() - mean) / std).float()
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        found = [len(labels), int(right[:, 0].sum()), int(right.sum()), float(loss)]
        totals += torch.tensor(found, dtype=torch.float64)
    num_images, top1, top5, loss_sum = group.sum(totals).tolist()
    if not num_images:
        raise no_usable_images(data)
    metrics = {"top1": top1 / num_images}
    if data.num_classes >= 5:
        metrics["top5"] = top5 / num_images
    return {**metrics, "loss": loss_sum / num_images}, int(num_images)
