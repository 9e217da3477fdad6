"""The quick probe: multinomial logistic regression on cached features, to its optimum."""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img2vec.evaluate.features import Features
from img2vec.evaluate.labeled import split_labels
from tokdiv.dist import current_processes
from tokdiv.errors import UsageError
from tokdiv.progress import progress_bar

# L-BFGS stops where the largest entry of the gradient, times the number of classes, is below this (at the
# zero start it is about 1): the final fit, and the fits that only compare penalties.
FINAL_TOLERANCE, SEARCH_TOLERANCE = 1e-5, 1e-3
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def fit_logistic(
    bank: Features, num_classes: int, penalty: float | None, seed: int, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """Fit a linear classifier to cached features.

    Args:
        bank: features of the training images.
        penalty: factor of half the squared weights; None chooses one of PENALTIES.
        seed: of the fifth held out for choosing.
        device: must compute in float64.

    Returns:
        The classifier, which takes features as they are, and what to report: penalty, gradient, converged.
    """
    labels = bank.labels.to(device)
    if penalty is None:
        penalty = _choose_penalty(bank.features.to(device), labels, num_classes, seed)
    # float64: sums in float32 do not resolve the gradient near the optimum.
    features = bank.features.to(device, torch.float64)
    mean, std = _moments(features)
    features.sub_(mean).div_(std)
    tolerance = FINAL_TOLERANCE / num_classes
    weight, bias, gradient = logistic_regression(
        features, labels, num_classes, penalty, tolerance=tolerance
    )
    classifier = nn.utils.skip_init(
        nn.Linear, len(mean), num_classes, dtype=torch.float64, device=device
    )
    with torch.no_grad():
        # Fold the standardization in.
        classifier.weight.copy_(weight / std)
        classifier.bias.copy_(bias - (weight / std) @ mean)
    fitted = {"penalty": penalty, "gradient": gradient, "converged": gradient <= 10 * tolerance}
    return classifier, fitted


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, with BatchNorm's floor for constant features."""
    return features.mean(dim=0), (features.var(dim=0, correction=0) + 1e-6).sqrt()


def _choose_penalty(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> float:
    """The penalty with the best accuracy on a held-out fifth; the strongest one among equals."""
    kept, held_out = (
        torch.from_numpy(positions).to(labels.device)
        for positions in split_labels(labels.cpu().numpy(), 0.2, seed)
    )
    if not len(held_out):
        raise UsageError(
            "the classes have too few training images to hold some out for choosing the penalty: give "
            "one with --penalty, as in --penalty 0.001"
        )
    mean, std = _moments(features[kept])
    train, val = ((features[positions] - mean) / std for positions in (kept, held_out))
    right: Counter[float] = Counter()
    start = None
    show = current_processes().rank == 0
    for penalty in progress_bar(PENALTIES, desc="penalty", show=show):
        # From the strongest on, each fit starts where the previous one ended.
        weight, bias, _ = logistic_regression(
            train,
            labels[kept],
            num_classes,
            penalty,
            start,
            tolerance=SEARCH_TOLERANCE / num_classes,
            max_iterations=500,
        )
        start = weight, bias
        predicted = (val @ weight.T + bias).argmax(dim=1)
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

    Minimizes mean cross-entropy + penalty / 2 * sum of squared weights; the bias is free.

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
        tolerance_change=0.1 * torch.finfo(features.dtype).eps,  # stop where nothing changes
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
