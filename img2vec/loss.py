"""Targets and losses: pure functions of tokens (Img2Vec, arXiv 2304.12535, section 3)."""

import torch.nn.functional as F
from torch import Tensor

BETA = 2.0  # of the smooth L1 loss: quadratic for errors below it


def patch_loss(predictions: Tensor, hidden: Tensor) -> Tensor:
    """Smooth L1 over the hidden tokens of each image (section 3.3).

    Args:
        predictions, hidden: (B, M, C), what the student says of the hidden target tokens, and they.

    Returns:
        (B,) the mean over the M tokens and C channels.
    """
    error = F.smooth_l1_loss(predictions.to(hidden), hidden, reduction="none", beta=BETA)
    return error.mean(dim=(1, 2))


def global_loss(prediction: Tensor, mean: Tensor) -> Tensor:
    """Smooth L1 to the mean of all target tokens of each image (section 3.4).

    Args:
        prediction, mean: (B, C).

    Returns:
        (B,) the mean over the C channels.
    """
    return F.smooth_l1_loss(prediction.to(mean), mean, reduction="none", beta=BETA).mean(dim=1)
