"""AdamW as in MAE's recipe (He et al., arXiv 2111.06377, appendix A.1), and its schedule in closed form."""

import math
from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.95)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; biases, norms, tokens and position embeddings without.

    Frozen parameters are in neither.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_token = name.rpartition(".")[2].endswith(("_token", "pos_embed"))
        (spared if parameter.ndim <= 1 or is_token else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW; the learning rate is set before every step."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=0.0, betas=BETAS, fused=True)


def learning_rate(
    epoch: float, epochs: float, warmup: float, peak: float, lowest: float = 0.0
) -> float:
    """Linear from 0 to the peak, then half a cosine down to the lowest.

    Args:
        epoch: how far the run is, in epochs with their fraction, so that every step has its own rate and
            another number of steps per epoch leaves the schedule as it is.
        epochs, warmup: length of the run and of the warm-up.
        peak, lowest: learning rate at the end of the warm-up, and at the end.
    """
    if epoch < warmup:
        return peak * epoch / warmup
    if epochs <= warmup:
        return peak
    progress = min((epoch - warmup) / (epochs - warmup), 1.0)
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * progress)) / 2
