"""From a teacher's tokens to the targets of a student: resampled, normalized, split."""

import torch
import torch.nn.functional as F
from torch import Tensor

from img2vec.masking import Grid, Layout

EPSILON = 1e-6  # of the variance of a target token


def area_weights(to: int, of: int) -> Tensor:
    """Averaging by area along one axis: float32 (to, of), rows sum to 1.

    Entry (i, j) is the part of output cell i that lies over input cell j. A finer grid becomes a coarser
    one by averages, a coarser one a finer one by repetition.
    """
    edges = torch.arange(to + 1, dtype=torch.float64) * of / to
    low, high = edges[:-1, None], edges[1:, None]
    cell = torch.arange(of, dtype=torch.float64)[None]
    overlap = (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp_min(0)
    return (overlap / overlap.sum(dim=1, keepdim=True)).float()


def resample(tokens: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Tokens (B, K, C) on another grid (B, to[0] * to[1], C), by area."""
    planes = tokens.unflatten(1, grid)
    rows = area_weights(to[0], grid[0]).to(tokens)
    columns = area_weights(to[1], grid[1]).to(tokens)
    return torch.einsum("ir,brsc,js->bijc", rows, planes, columns).flatten(1, 2)


def normalize(tokens: Tensor, how: str) -> Tensor:
    """Each token (..., C) on its own: "layer": mean 0 and variance 1; "l2": length 1; "none"."""
    if how == "layer":
        return F.layer_norm(tokens, tokens.shape[-1:], eps=EPSILON)
    if how == "l2":
        return F.normalize(tokens, dim=-1)
    return tokens


def make_targets(tokens: Tensor, grid: Grid, layout: Layout, how: str) -> Tensor:
    """From the teacher's tokens to what is predicted.

    Resampled first and normalized then, so that every target has the same scale.

    Args:
        tokens: (B, K, C) of the whole, unmasked view, on `grid`.
        how: the normalization, as in `normalize`.

    Returns:
        (B, targets, C) float32 (float64 for float64 tokens), without a gradient.
    """
    tokens = tokens.detach()
    tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
    if layout.resample:
        tokens = resample(tokens, grid, layout.targets)
    return normalize(tokens, how)


def split_targets(targets: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """What the two losses compare with, so that the rest need not be kept while the student runs.

    Args:
        targets: (B, T, C) of all target tokens. masked: int64 (B, M), which are hidden.

    Returns:
        The hidden ones (B, M, C), and the mean of all, hidden or not, (B, C): the teacher saw the whole
        view.
    """
    hidden = targets.gather(1, masked[..., None].expand(-1, -1, targets.shape[2]))
    return hidden, targets.mean(dim=1)
