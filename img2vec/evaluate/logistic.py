"""The quick probe: multinomial logistic regression on cached features, to its optimum."""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from img2vec.evaluate.features import Features, process
from img2vec.evaluate.labeled import split_rows
from tokdiv.errors import UsageError

# Of L-BFGS: the largest entry of the gradient, times the number of classes, at which a fit ends (at the
# zero start it is about 1), and one that only serves to compare penalties.
FITTED, COMPARED = 1e-5, 1e-3
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def fit_logistic(
    bank: Features, num_classes: int, penalty: float | None, seed: int, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """The classifier for cached features, with the penalty given or chosen, and what is to be said of it."""
    labels = bank.labels.to(device)
    if penalty is None:
        penalty = _choose_penalty(bank.features.to(device), labels, num_classes, seed)
    elif not penalty >= 0:
        raise UsageError(f"--penalty {penalty}: expected 0 or more")
    # Double precision: the gradient at the end lies below what sums in float32 resolve.
    features = bank.features.to(device, torch.float64)
    mean, std = _moments(features)
    features.sub_(mean).div_(std)
    tolerance = FITTED / num_classes
    weight, bias, gradient = logistic_regression(
        features, labels, num_classes, penalty, tolerance=tolerance
    )
    classifier = nn.utils.skip_init(
        nn.Linear, len(mean), num_classes, dtype=torch.float64, device=device
    )
    with torch.no_grad():
        # The standardization is folded in, so that the classifier takes features as they are.
        classifier.weight.copy_(weight / std)
        classifier.bias.copy_(bias - (weight / std) @ mean)
    fitted = {"penalty": penalty, "gradient": gradient, "converged": gradient <= 10 * tolerance}
    return classifier, fitted


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature; as BatchNorm, with a floor for constant ones."""
    return features.mean(dim=0), (features.var(dim=0, correction=0) + 1e-6).sqrt()


def _choose_penalty(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> float:
    """The penalty with the best accuracy on a fifth held out; the strongest of equals."""
    kept, held_out = (
        torch.from_numpy(rows).to(labels.device)
        for rows in split_rows(labels.cpu().numpy(), 0.2, seed)
    )
    if not len(held_out):
        raise UsageError(
            "the classes have too few training images to hold some out for choosing the penalty: give "
            "one with --penalty, as in --penalty 0.001"
        )
    mean, std = _moments(features[kept])
    learn, measure = ((features[rows] - mean) / std for rows in (kept, held_out))
    right: Counter[float] = Counter()
    start = None
    for penalty in tqdm(PENALTIES, desc="penalty", disable=None if process()[0] == 0 else True):
        # From the strongest on, each fit starts where the one before ended.
        weight, bias, _ = logistic_regression(
            learn,
            labels[kept],
            num_classes,
            penalty,
            start,
            tolerance=COMPARED / num_classes,
            max_iterations=500,
        )
        start = weight, bias
        predicted = (measure @ weight.T + bias).argmax(dim=1)
        right[penalty] = int((predicted == labels[held_out]).sum())
    return max(PENALTIES, key=lambda penalty: (right[penalty], penalty))


def logistic_regression(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    penalty: float,
    start: tuple[Tensor, Tensor] | None = None,
    *,
    tolerance: float,
    max_iterations: int = 2000,
) -> tuple[Tensor, Tensor, float]:
    """Multinomial logistic regression to its optimum, by L-BFGS.

    Minimises mean cross-entropy + penalty / 2 * sum of squared weights; the bias is free.

    Args:
        features: float (N, C), standardized. labels: int64 (N,), 0 to num_classes - 1.
        start: weights and bias to start from; zeros where None.
        tolerance: stop where no entry of the gradient exceeds it.

    Returns:
        Weights (num_classes, C), bias (num_classes,), and the largest entry of the gradient there.
    """
    N, C = features.shape
    weight = features.new_zeros(num_classes, C) if start is None else start[0].detach().clone()
    bias = features.new_zeros(num_classes) if start is None else start[1].detach().clone()
    weight.requires_grad_(True), bias.requires_grad_(True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=4 * max_iterations,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=0.1 * torch.finfo(features.dtype).eps,  # no change at all
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels)
        loss = loss + 0.5 * penalty * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)  # type: ignore[arg-type]
    objective()
    assert weight.grad is not None
    assert bias.grad is not None
    gradient = max(float(weight.grad.abs().max()), float(bias.grad.abs().max()))
    return weight.detach(), bias.detach(), gradient
