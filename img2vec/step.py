"""One training step: targets, predictions, losses, gradient, update. The loop, tests and benchmarks all call it."""

import contextlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from img2vec.config import Config
from img2vec.data import Batch, Plan
from img2vec.loss import global_loss, patch_loss
from img2vec.masking import split_indices
from img2vec.model import Img2Vec, choose_attention
from img2vec.optim import make_optimizer
from img2vec.targets import make_targets, resize_view, split_targets
from tokdiv.dist import Processes, choose_dtype
from tokdiv.similarity import token_similarity
from tokdiv.teachers.teacher import Teacher


@dataclass(frozen=True)
class Training:
    """What a training step works with.

    Attributes:
        config: the run's settings. plan: the images of a step. group: the processes, and this one's device.
        teacher: frozen; it is outside DDP, the optimizer and the checkpoint.
        model: the student. parallel: the same, in DDP where there are several processes.
        optimizer: of the student's trained parameters.
        dtype: "float32", or "bfloat16" for autocast.
    """

    config: Config
    plan: Plan
    group: Processes
    teacher: Teacher
    model: Img2Vec
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    dtype: str


class Sums(NamedTuple):
    """Sums over the images that can be used, scalars."""

    patch_loss: Tensor
    global_loss: Tensor
    num_images: Tensor
    similarity: Tensor


@dataclass(frozen=True)
class StepResult:
    """What a step found, the same on every process; means are over the images that can be used.

    Attributes:
        loss, patch_loss, global_loss: means, NaN where no image can be used.
        grad_norm: of the whole gradient, before clipping; NaN where the loss is not finite.
        num_images: how many images could be used.
        token_similarity: mean of the student's visible tokens; None where it was not measured.
        teacher_is_finite: False where the loss is not finite because the teacher's tokens are not.
    """

    loss: float
    patch_loss: float
    global_loss: float
    grad_norm: float
    num_images: int
    token_similarity: float | None
    teacher_is_finite: bool

    @property
    def skipped(self) -> bool:
        """Whether the weights stayed as they were because loss or gradient is not finite."""
        return not math.isfinite(self.grad_norm)


def make_training(
    config: Config, plan: Plan, group: Processes, teacher: Teacher, model: Img2Vec
) -> Training:
    """Move the student to its device, spread it over the processes, compile it, and make its optimizer."""
    device, dtype = group.device, choose_dtype(config.dtype, group.device)
    model.to(device)
    choose_attention(model, device, dtype)
    if config.shard:
        # FSDP2: each encoder block is a unit. The decoder's blocks are not called as modules, so all the rest
        # is one more.
        for block in model.encoder.blocks:
            fully_shard(block)
        fully_shard(model)
        register_fsdp_forward_method(model, "tokens")
    if config.compiles_on(device):
        model.compile()
    optimizer = make_optimizer(model, config.weight_decay)
    parallel = _data_parallel(model, device) if group.world > 1 and not config.shard else model
    return Training(config, plan, group, teacher, model, parallel, optimizer, dtype)


def _data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    # Buffers are constants here. torch 2.15 renames the option.
    accepted = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **options,
    )


def train_step(
    training: Training, batches: Iterator[Batch], lr: float, *, measure_similarity: bool = False
) -> StepResult:
    """Make one optimizer step of `plan.accumulate` batches.

    The gradient is that of the mean loss over all images of the step that can be used, on all processes. A step
    whose loss or gradient is not finite leaves the weights as they are.

    Args:
        batches: this process's; the step takes what it needs.
        measure_similarity: also measure the token similarity of the student's representation.
    """
    plan, group = training.plan, training.group
    sums = []
    for number in range(plan.accumulate):
        batch = next(batches).to(group.device)
        with _gradient_exchange(training.parallel, number == plan.accumulate - 1):
            sums.append(torch.stack(_forward_backward(training, batch, measure_similarity)))
    totals = Sums(*group.sum(sum(sums[1:], sums[0])).tolist())
    num_images = int(totals.num_images)
    patch, image, similarity = (
        float(total / num_images) if num_images else math.nan
        for total in (totals.patch_loss, totals.global_loss, totals.similarity)
    )
    loss = patch + training.config.global_weight * image
    grad_norm, teacher_is_finite = math.nan, True
    if math.isfinite(loss):
        grad_norm = _update(training, lr, plan.global_batch / num_images)
    elif num_images:
        tokens = training.teacher(resize_view(batch.images, training.teacher.size))
        teacher_is_finite = bool(tokens.isfinite().all())
    training.optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=loss,
        patch_loss=patch,
        global_loss=image,
        grad_norm=grad_norm,
        num_images=num_images,
        token_similarity=similarity if measure_similarity and num_images else None,
        teacher_is_finite=teacher_is_finite,
    )


def _forward_backward(training: Training, batch: Batch, measure_similarity: bool) -> Sums:
    """Add a batch's share of the step's gradient."""
    patch, image, representation = image_losses(training, batch)
    patch_sum, image_sum = ((losses * batch.usable).sum() for losses in (patch, image))
    # Processes average their gradients; the sum over the global batch is wanted.
    share = training.group.world / training.plan.global_batch
    ((patch_sum + training.config.global_weight * image_sum) * share).backward()
    similarity = torch.zeros_like(patch_sum)
    if measure_similarity:
        similarity = (token_similarity(representation) * batch.usable).sum()
    return Sums(patch_sum.detach(), image_sum.detach(), batch.usable.sum(), similarity.detach())


def image_losses(training: Training, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of each image: the teacher sees the whole view, the student its visible patches.

    Args:
        batch: on the device.

    Returns:
        The patch loss (B,), the global loss (B,), 0 where it is off, and the student's multi-block tokens
        (B, V, D) without a gradient.
    """
    teacher, layout = training.teacher, training.model.layout
    masked = split_indices(batch.masks, layout)[2]
    tokens = teacher(resize_view(batch.images, teacher.size))
    targets = make_targets(tokens, teacher.grid, layout, training.config.target_norm)
    masked_targets, mean_target = split_targets(targets, masked)
    del tokens, targets  # the teacher's memory is free again while the student runs
    with torch.autocast(
        batch.images.device.type, torch.bfloat16, enabled=training.dtype == "bfloat16"
    ):
        prediction = training.parallel(batch.images, batch.masks)
    patch = patch_loss(prediction.tokens, masked_targets)
    image = torch.zeros_like(patch)
    if prediction.image is not None:
        image = global_loss(prediction.image, mean_target)
    return patch, image, prediction.representation.detach()


@contextlib.contextmanager
def _gradient_exchange(model: nn.Module, last: bool) -> Iterator[None]:
    """Processes exchange their gradients in the last forward pass of a step only."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    yield


def _update(training: Training, lr: float, scale: float) -> float:
    """Scale the gradient, clip it and make the optimizer's step; the norm before clipping.

    A norm that is not finite leaves the weights as they are.
    """
    parameters = [p for p in training.model.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if scale != 1:
        for gradient in gradients:
            gradient.mul_(scale)
    norm = _total_norm(gradients)
    if not math.isfinite(norm):
        return norm
    largest = training.config.clip_grad
    if largest is not None and norm > largest:
        for gradient in gradients:
            gradient.mul_(largest / norm)
    for group in training.optimizer.param_groups:
        group["lr"] = lr
    training.optimizer.step()
    return norm


def _total_norm(gradients: list[Tensor]) -> float:
    """The norm of the whole gradient, the same on every process, sharded or not."""
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
