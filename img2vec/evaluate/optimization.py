"""LARS, and the schedule of the learning rate that the probe and fine-tuning share."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lars(torch.optim.Optimizer):
    """SGD with momentum, its step scaled layer by layer (You et al., arXiv 1708.03888).

    For a weight w of two or more dimensions with gradient g:

        g <- g + weight_decay * w
        g <- trust * |w| / |g| * g      (unchanged where either norm is 0)
        v <- momentum * v + g
        w <- w - lr * v

    Parameters of one dimension (biases, norms) take plain momentum SGD, without decay, as in SimCLR and
    MAE's linear probe. The learning rate is not part of v, as there.

    Args:
        parameters: or groups of them.
        lr: learning rate; may be changed between steps in `param_groups`.
        weight_decay, momentum, trust: see above.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ) -> None:
        super().__init__(
            parameters,
            {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients that are there; `closure` is not supported."""
        if closure is not None:
            raise TypeError("Lars takes no closure")
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad
                if weight.ndim > 1:
                    update = update + group["weight_decay"] * weight
                    weight_norm, update_norm = weight.norm(), update.norm()
                    ratio = torch.where(
                        (weight_norm > 0) & (update_norm > 0),
                        group["trust"] * weight_norm / update_norm,
                        torch.ones_like(weight_norm),
                    )
                    update = update * ratio
                state = self.state[weight]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(weight)
                velocity = state["velocity"].mul_(group["momentum"]).add_(update)
                weight.sub_(group["lr"] * velocity)


def learning_rate(
    epoch: float, *, peak: float, epochs: float, warmup_epochs: float, lowest: float = 0.0
) -> float:
    """Linear from 0 to `peak` over the warm-up, then half a cosine down to `lowest`.

    Args:
        epoch: how far training is, in epochs with their fraction, 0 to `epochs`.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def warmup_remark(warmup_epochs: float, epochs: float) -> list[str]:
    """What to say where a training ends before its warm-up does."""
    if warmup_epochs < epochs:
        return []
    return [
        f"the warm-up of {warmup_epochs:g} epochs takes up all {epochs:g}: the learning rate never comes down; "
        f"give --warmup-epochs"
    ]
