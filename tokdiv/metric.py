"""Token similarity as a torchmetrics.Metric, for those who compute tokens in a loop of their own.

A module of its own, because torchmetrics takes seconds to import where transformers is installed.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from tokdiv.similarity import token_similarity


class TokenSimilarity(Metric):
    """Mean token similarity over all images seen: `update(tokens)` with (B, K, C), then `compute()`.

    The sum runs in float64 from float32 scores, and is reduced over processes by torchmetrics.
    `compute()` gives a float64 scalar; NaN before the first image.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor) -> None:
        """Add the images of one batch of tokens, (B, K, C)."""
        scores = token_similarity(tokens)
        self.total += scores.double().sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """Mean similarity of the images seen so far."""
        return self.total / self.count
