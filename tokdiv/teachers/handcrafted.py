"""Targets without weights: RGB patches (MAE) and histograms of oriented gradients (MaskFeat).

Both map normalized images (B, 3, H, W) to planes (B, C, H / 16, W / 16), so that they are teachers like any
network. They are baselines: raw pixels are more diverse than most trained networks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 16  # pixels: the side of one token, as in MAE's and MaskFeat's ViT-B/16


class Pixels(nn.Module):
    """The RGB values of each 16 x 16 patch, MAE's target (He et al., arXiv 2111.06377, section 3)."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 768, H / 16, W / 16)."""
        return F.pixel_unshuffle(images, PATCH)


class Hog(nn.Module):
    """Histograms of oriented gradients, MaskFeat's target (Wei et al., arXiv 2112.09133, section 3.2).

    Per color channel: 9 unsigned orientations, each pixel's vote its gradient's magnitude, cells of
    8 x 8 pixels, each cell's histogram L2-normalized; the 2 x 2 cells of a patch are concatenated.
    """

    bins = 9
    cell = 8  # pixels

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3 * 9 * 4 = 108, H / 16, W / 16)."""
        images = images.float()
        rows = F.pad(images[..., 2:, :] - images[..., :-2, :], (0, 0, 1, 1))
        columns = F.pad(images[..., :, 2:] - images[..., :, :-2], (1, 1, 0, 0))
        magnitude = torch.hypot(rows, columns)
        angle = (
            torch.atan2(rows, columns) / math.pi * self.bins
        )  # [-bins, bins]; half a turn is `bins`
        votes = angle.floor().long() % self.bins
        histogram = torch.stack(
            [F.avg_pool2d(magnitude * (votes == b), self.cell) for b in range(self.bins)], dim=2
        )  # (B, 3, bins, H / 8, W / 8)
        histogram = F.normalize(histogram, dim=2)
        return F.pixel_unshuffle(histogram.flatten(1, 2), PATCH // self.cell)
