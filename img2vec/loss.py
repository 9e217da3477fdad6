"""The two losses of Img2Vec (arXiv 2304.12535, section 3)."""

import torch.nn.functional as F
from torch import Tensor

BETA = 2.0  # of the smooth L1 loss, which is quadratic for errors below it


def patch_loss(predictions: Tensor, masked_targets: Tensor) -> Tensor:
    """Smooth L1 at the masked positions (section 3.3).

    Args:
        predictions, masked_targets: (B, M, C).

    Returns:
        (B,) the mean over the M tokens and C channels.
    """
    error = F.smooth_l1_loss(
        predictions.to(masked_targets), masked_targets, reduction="none", beta=BETA
    )
    return error.mean(dim=(1, 2))


def global_loss(prediction: Tensor, mean_target: Tensor) -> Tensor:
    """Smooth L1 to the mean of all target tokens of an image (section 3.4).

    Args:
        prediction, mean_target: (B, C).

    Returns:
        (B,) the mean over the C channels.
    """
    error = F.smooth_l1_loss(prediction.to(mean_target), mean_target, reduction="none", beta=BETA)
    return error.mean(dim=1)
