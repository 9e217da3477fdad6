"""A linear head on frozen tokens: BatchNorm and a 1x1 convolution, as in DINOv2 (arXiv 2304.07193, section 7.4)."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from img2vec.evaluate.confusion import IGNORED
from img2vec.evaluate.features import float64_device
from img2vec.evaluate.frozen_tokens import (
    FrozenTokens,
    fill_cache,
    fits_in_memory,
    frozen_tokens,
)
from img2vec.evaluate.history import recorded
from img2vec.evaluate.segment_settings import SegmentRecipe
from img2vec.evaluate.segmentation_data import SegmentationData
from img2vec.evaluate.segmentation_views import Layout, Scores
from tokdiv.dist import Processes
from tokdiv.errors import RunError
from tokdiv.progress import progress_bar
from tokdiv.teachers.teacher import Teacher

# Labels and upsampled logits along each side of a token, in training. On CamVid every pixel's label (16 x 16)
# gave the same mIoU at 15 times the cost of a step.
LABELS_PER_TOKEN = 4
STATISTICS_VIEWS = 4096  # at most so many views give the mean and variance of the tokens
LOG_EVERY = 50  # steps


class LinearHead(nn.Module):
    """Tokens (n, C, rows, columns) -> logits (n, num_classes, rows, columns).

    The statistics of the BatchNorm are set and stay: tokens are frozen, so the mean and variance over train are
    known beforehand, and equal for any batch and any number of processes.
    """

    def __init__(self, mean: Tensor, variance: Tensor, num_classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(len(mean), affine=False)
        self.norm.running_mean, self.norm.running_var = mean.float(), variance.float()
        self.conv = nn.utils.skip_init(nn.Conv2d, len(mean), num_classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.conv.bias)
        self.eval()

    def forward(self, maps: Tensor) -> Tensor:
        return self.conv(self.norm(maps))


def fit_linear(
    encoder: Teacher,
    data: SegmentationData,
    layout: Layout,
    recipe: SegmentRecipe,
    group: Processes,
    folder: Path | None,
) -> tuple[Scores, list[dict[str, Any]]]:
    """Train the head; the scores of views, and the loss every LOG_EVERY steps.

    Args:
        folder: for TensorBoard's events; None writes none.
    """
    frozen = frozen_tokens(encoder, data, layout, recipe, group, LABELS_PER_TOKEN)
    batches = read_tokens(frozen)
    mean, variance = channel_statistics(batches, frozen)
    head = LinearHead(mean, variance, data.num_classes, recipe.seed).to(group.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    history: list[dict[str, Any]] = []
    losses: list[Tensor] = []
    drawn = draw_batches(len(frozen), recipe.batch_size, recipe.max_steps, recipe.seed)
    bar = progress_bar(
        batches(drawn), total=recipe.max_steps, desc="linear", unit="step", show=group.rank == 0
    )
    with recorded(folder if group.rank == 0 else None, history) as record:
        for step, (tokens, labels) in enumerate(bar, start=1):
            rate = recipe.lr * (1 - (step - 1) / recipe.max_steps)
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate
            maps = as_maps(tokens, encoder.grid)
            losses.append(linear_step(head, optimizer, maps, labels, group))
            if step % LOG_EVERY == 0 or step == recipe.max_steps:
                loss = mean_loss(group.sum(torch.stack(losses).mean()), step)
                losses.clear()
                record({"step": step, "loss": loss, "lr": rate})
                bar.set_postfix(loss=f"{loss:.3f}")

    def scores(views: Tensor) -> Tensor:
        return head(as_maps(encoder(views), encoder.grid))

    return scores, history


def read_tokens(frozen: FrozenTokens) -> Any:
    """A function from batches of view numbers to this process's part of each: tokens, labels on the device."""
    device = frozen.group.device
    cache = fill_cache(frozen) if fits_in_memory(frozen) else None

    def read(batches: Iterable[NDArray[np.int64]]) -> Iterator[tuple[Tensor, Tensor]]:
        own = (frozen.own(batch) for batch in batches)
        parts = frozen.encode(own) if cache is None else (cache[numbers] for numbers in own)
        for tokens, labels in parts:
            yield tokens.to(device, non_blocking=True), labels.to(device, torch.int64)

    return read


def channel_statistics(batches: Any, frozen: FrozenTokens) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over train's tokens, float64 (C,), on the CPU."""
    group, dim = frozen.group, frozen.encoder.dim
    order = np.random.default_rng([frozen.recipe.seed, 0]).permutation(len(frozen))
    order = order[:STATISTICS_VIEWS]
    chunks = np.array_split(order, math.ceil(len(order) / frozen.recipe.encode_batch_size))
    totals = torch.zeros(2, dim, dtype=torch.float64)
    for tokens, _ in batches(chunks):
        if len(tokens):
            tokens = tokens.flatten(0, 1).to(float64_device(tokens.device)).double()
            totals += torch.stack([tokens.sum(dim=0), tokens.square().sum(dim=0)]).cpu()
    mean, square = group.sum(totals) / (len(order) * frozen.encoder.num_tokens)
    if not torch.isfinite(square).all():
        raise RunError(
            f"the tokens of '{frozen.data.pairs.name}' are not finite: the model's weights are broken, or its "
            f"numbers exceed the range of the dtype (try --dtype float32)"
        )
    return mean, (square - mean.square()).clamp_min(0)


def linear_step(
    head: LinearHead,
    optimizer: torch.optim.Optimizer,
    maps: Tensor,
    labels: Tensor,
    group: Processes,
) -> Tensor:
    """One step on this process's part of a batch, which may be empty; its part of the batch's loss.

    The loss is the mean over all labeled pixels of the batch, wherever they are.

    Args:
        maps: (n, C, rows, columns). labels: int64 (n, h, w), or IGNORED.
    """
    num_labeled = group.sum((labels != IGNORED).sum()).clamp_min(1)
    loss = torch.zeros((), device=labels.device)
    optimizer.zero_grad(set_to_none=False)
    if len(maps):
        logits = F.interpolate(head(maps), size=labels.shape[1:], mode="bilinear")
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        loss = total / num_labeled
        loss.backward()
    for parameter in head.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = group.sum(gradient)
    optimizer.step()
    return loss.detach()


def mean_loss(loss: Tensor, step: int) -> float:
    """The loss as a number.

    Raises:
        RunError: it is not finite.
    """
    if not torch.isfinite(loss):
        raise RunError(
            f"the loss of step {step} is {float(loss)}: use a lower --lr, or --dtype float32"
        )
    return float(loss)


def draw_batches(
    count: int, batch_size: int, num_steps: int, seed: int, first_step: int = 0
) -> Iterator[NDArray[np.int64]]:
    """The numbers of each step's batch: seeded permutations of range(count), one after the other."""
    drawn = np.empty(0, dtype=np.int64)
    epoch = first_step * batch_size // count
    skip = first_step * batch_size - epoch * count
    for _ in range(first_step, num_steps):
        while len(drawn) < batch_size + skip:
            drawn = np.append(drawn, np.random.default_rng([seed, epoch]).permutation(count))
            epoch += 1
        yield drawn[skip : skip + batch_size]
        drawn, skip = drawn[skip + batch_size :], 0


def as_maps(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(n, K, C) -> float32 (n, C, rows, columns); no views, no maps."""
    return tokens.float().transpose(1, 2).unflatten(2, grid) if len(tokens) else tokens
