"""From a teacher's tokens to a student's targets: resized, resampled, normalized, split."""

import torch
import torch.nn.functional as F
from torch import Tensor

from img2vec.masking import Grid, Layout

EPSILON = 1e-6  # added to the variance of a target token


def resize_view(images: Tensor, size: int) -> Tensor:
    """The same view at a teacher's own size: uint8 (B, 3, S, S) to uint8 (B, 3, size, size)."""
    if images.shape[-1] == size:
        return images
    if images.device.type == "cpu":
        return F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    resized = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def area_weights(to: int, of: int) -> Tensor:
    """Averaging by area along one axis: float32 (to, of), rows sum to 1.

    Entry (i, j) is the part of output cell i that input cell j covers. Going to a coarser grid averages,
    going to a finer one repeats.
    """
    edges = torch.arange(to + 1, dtype=torch.float64) * of / to
    low, high = edges[:-1, None], edges[1:, None]
    cell = torch.arange(of, dtype=torch.float64)[None]
    overlap = (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp_min(0)
    return (overlap / overlap.sum(dim=1, keepdim=True)).float()


def resample(tokens: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Tokens (B, K, C) of one grid on another: (B, to[0] * to[1], C), averaged by area."""
    planes = tokens.unflatten(1, grid)
    rows = area_weights(to[0], grid[0]).to(tokens)
    columns = area_weights(to[1], grid[1]).to(tokens)
    return torch.einsum("ir,brsc,js->bijc", rows, planes, columns).flatten(1, 2)


def normalize(tokens: Tensor, how: str) -> Tensor:
    """Normalize each token (..., C): "layer" to mean 0 and variance 1, "l2" to length 1, "none" not at all."""
    if how == "layer":
        return F.layer_norm(tokens, tokens.shape[-1:], eps=EPSILON)
    if how == "l2":
        return F.normalize(tokens, dim=-1)
    return tokens


def make_targets(tokens: Tensor, grid: Grid, layout: Layout, how: str) -> Tensor:
    """Turn the teacher's tokens into targets.

    They are resampled before they are normalized, so that every target has the same scale.

    Args:
        tokens: (B, K, C) of the unmasked view, on `grid`.
        how: the normalization, as in `normalize`.

    Returns:
        (B, T, C) float32 (float64 for float64 tokens), without a gradient; T is the number of target tokens.
    """
    tokens = tokens.detach()
    tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
    if layout.resample:
        tokens = resample(tokens, grid, layout.targets)
    return normalize(tokens, how)


def split_targets(targets: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """What the two losses need, so that the other targets can be freed while the student runs.

    Args:
        targets: (B, T, C). masked: int64 (B, M), the indices of the masked ones.

    Returns:
        masked_targets (B, M, C), and the mean of all targets, masked or not, (B, C).
    """
    masked_targets = targets.gather(1, masked[..., None].expand(-1, -1, targets.shape[2]))
    return masked_targets, targets.mean(dim=1)
