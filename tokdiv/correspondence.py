"""Correspondence: does a token find its place again in another view of the same image?

Two crops are taken of an image. The second is recolored and mirrored, so that neither raw pixels nor the position
within the crop give the answer away. A token of the first crop is *correct* if its nearest neighbor by cosine among
the tokens of the second lies where the same part of the image is: within 0.1 of the view's side, as PCK@0.1 of
keypoint matching (Yang & Ramanan, TPAMI 2013). Crops depend only on the seed and the image's position in the run,
so every teacher sees the same ones.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as color

AREA = (0.3, 0.7)  # of the image that a crop takes, uniform
TOLERANCE = 0.1  # of the view's side: PCK@0.1
BRIGHTNESS, CONTRAST, SATURATION, HUE = (
    0.4,
    0.4,
    0.2,
    0.1,
)  # as torchvision's ColorJitter takes them
MIN_TOKENS = 4  # a pair of crops that shares fewer of a REFERENCE x REFERENCE grid is drawn again
REFERENCE = 7  # the coarsest grid of the usual teachers: the crops must not depend on the teacher
MAX_QUERIES = 1024  # tokens of the first crop that are matched; of more, an even sample
CROPS = 3  # the purpose of these draws, in the key of their generator; masks and training crops have others


@dataclass(frozen=True)
class CropPair:
    """Where two crops of one image are, and how the second is recolored.

    Attributes:
        first, second: (top, left, height, width) in pixels of the image.
        brightness, contrast, saturation: factors. hue: shift in turns. order: of these four operations.
    """

    first: tuple[int, int, int, int]
    second: tuple[int, int, int, int]
    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: tuple[int, ...]


def draw_crops(
    height: int, width: int, seed: int, position: int, area: tuple[float, float] = AREA
) -> CropPair:
    """The two crops of the image at a position of the run.

    Args:
        height, width: of the image in pixels.
        seed, position: of the run, and of the image in its order; nothing else matters.
        area: range of the share of the image that a crop takes.
    """
    bits = np.random.Philox(key=[seed, CROPS], counter=[0, 0, position, 0])
    while True:
        # Raw draws: numpy promises the bit generator's stream, but not the distributions made of it.
        draws = ((bits.random_raw(14) >> np.uint64(11)) * 2.0**-53).tolist()
        first = _draw_box(height, width, area, draws[0:3])
        second = _draw_box(height, width, area, draws[3:6])
        places, inside = true_places(
            torch.tensor([first]), torch.tensor([second]), (REFERENCE, REFERENCE)
        )
        if int(inside.sum()) >= MIN_TOKENS:
            break
    brightness, contrast, saturation = (
        1 + strength * (2 * draw - 1)
        for strength, draw in zip((BRIGHTNESS, CONTRAST, SATURATION), draws[6:9])
    )
    hue = HUE * (2 * draws[9] - 1)
    order = tuple(int(n) for n in np.argsort(draws[10:14], kind="stable"))
    return CropPair(first, second, brightness, contrast, saturation, hue, order)


def _draw_box(
    height: int, width: int, area: tuple[float, float], draws: list[float]
) -> tuple[int, int, int, int]:
    """A crop with the image's own aspect: its area and its place are uniform."""
    side = math.sqrt(area[0] + (area[1] - area[0]) * draws[0])
    h, w = max(1, round(height * side)), max(1, round(width * side))
    return int(draws[1] * (height - h + 1)), int(draws[2] * (width - w + 1)), h, w


def crop_views(image: Tensor, crops: CropPair, size: int) -> tuple[Tensor, Tensor]:
    """Both crops as views: the first as it is, the second recolored and mirrored left to right.

    Args:
        image: (3, H, W) uint8.
        size: side of the views in pixels.

    Returns:
        Two (3, size, size) uint8.
    """
    first, second = (
        F.interpolate(
            image[None, :, top : top + h, left : left + w],
            (size, size),
            mode="bicubic",
            align_corners=False,
            antialias=True,
        )[0]
        for top, left, h, w in (crops.first, crops.second)
    )
    operations = (
        lambda view: color.adjust_brightness(view, crops.brightness),
        lambda view: color.adjust_contrast(view, crops.contrast),
        lambda view: color.adjust_saturation(view, crops.saturation),
        lambda view: color.adjust_hue(view, crops.hue),
    )
    for number in crops.order:
        second = operations[number](second)
    return first, second.flip(2)


def true_places(
    first: Tensor, second: Tensor, grid: tuple[int, int], *, mirrored: bool = True
) -> tuple[Tensor, Tensor]:
    """Where the center of each token of the first crop is in the second.

    Args:
        first, second: (B, 4) boxes (top, left, height, width) of the crops, in one unit.
        grid: rows and columns of the tokens; K = rows * columns.
        mirrored: the second view is mirrored left to right.

    Returns:
        (B, K, 2) float64 (row, column) in units of the second view, and (B, K) bool, whether that lies inside it.
    """
    rows, columns = grid
    first, second = first.double()[:, None], second.double()[:, None]  # (B, 1, 4)
    centers = token_centers(grid).to(first)  # (K, 2)
    in_image = first[..., :2] + centers * first[..., 2:]
    places = (in_image - second[..., :2]) / second[..., 2:]
    if mirrored:
        places = torch.stack([places[..., 0], 1 - places[..., 1]], dim=-1)
    return places, ((places >= 0) & (places <= 1)).all(dim=-1)


def token_centers(grid: tuple[int, int]) -> Tensor:
    """(K, 2) float64 (row, column) of the tokens' centers in units of the view, row-major."""
    rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in grid)
    return torch.cartesian_prod(rows, columns)


@torch.no_grad()
def correspondence(
    tokens_a: Tensor,
    tokens_b: Tensor,
    boxes_a: Tensor,
    boxes_b: Tensor,
    grid: tuple[int, int] | None = None,
    *,
    mirrored: bool = True,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Share of the tokens of one crop that find their place in another crop of the same image.

    For every token of the first crop whose center lies inside the second: its nearest neighbor by cosine among
    the second crop's tokens is correct if that token's center is within `tolerance` of the true place. Of more
    than 1,024 tokens, an even sample is matched.

    Args:
        tokens_a, tokens_b: (B, K, C) floating point, row-major over the grid.
        boxes_a, boxes_b: (B, 4) or (4,) (top, left, height, width) of the two crops in the image, in one unit.
        grid: rows and columns; None for a square.
        mirrored: the second view is mirrored left to right.
        tolerance: distance in units of the view's side.

    Returns:
        (B,) float32 in [0, 1]; NaN where no token's center lies inside the other crop, or a token is not finite.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    B, K, C = tokens_a.shape
    side = math.isqrt(K)
    rows, columns = grid or (side, side)
    if tokens_b.shape != tokens_a.shape or rows * columns != K:
        raise ValueError(
            f"expected tokens of one shape (B, K, C) on a grid of K cells, got {tuple(tokens_a.shape)} and "
            f"{tuple(tokens_b.shape)} on {rows} x {columns}"
        )
    device = tokens_a.device
    first, second = (torch.as_tensor(box).reshape(-1, 4).expand(B, 4) for box in (boxes_a, boxes_b))
    places, inside = true_places(first, second, (rows, columns), mirrored=mirrored)
    queries = _even_sample(K, MAX_QUERIES)
    places, inside = places[:, queries], inside[:, queries]
    nearest = nearest_tokens(tokens_a[:, queries.to(device)], tokens_b).cpu()
    found = token_centers((rows, columns))[nearest]  # (B, Q, 2)
    correct = (found - places).norm(dim=-1) <= tolerance
    counted = inside.sum(dim=1)
    share = (correct & inside).sum(dim=1) / counted  # NaN where none is inside
    finite = tokens_a.isfinite().all(dim=(1, 2)) & tokens_b.isfinite().all(dim=(1, 2))
    return torch.where(finite.cpu(), share, torch.nan).float().to(device)


def _even_sample(count: int, most: int) -> Tensor:
    """Indices of at most `most` of `count` tokens, evenly spread."""
    if count <= most:
        return torch.arange(count)
    return torch.linspace(0, count - 1, most).round().long()


def nearest_tokens(queries: Tensor, tokens: Tensor) -> Tensor:
    """The nearest neighbor by cosine of each query.

    Args:
        queries: (B, Q, C). tokens: (B, K, C).

    Returns:
        (B, Q) int64, the first one where several are as near. The cosine with a zero token is 0.
    """
    with torch.autocast(queries.device.type, enabled=False):
        unit = [F.normalize(t.float(), dim=2) for t in (queries, tokens)]
        return (unit[0] @ unit[1].transpose(1, 2)).argmax(dim=2)


def pixel_cells(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Raw pixels on a teacher's grid: what its correspondence is compared with.

    Args:
        images: (B, 3, S, S) float, normalized.
        grid: rows and columns.

    Returns:
        (B, K, 3 * h * w): the RGB values of the h x w pixels of each cell. Where the grid does not divide the side,
        the view is resized to the next smaller multiple of it.
    """
    rows, columns = grid
    h, w = (max(1, side // n) for side, n in zip(images.shape[2:], grid))
    if images.shape[2:] != (rows * h, columns * w):
        images = F.interpolate(images, (rows * h, columns * w), mode="bilinear", antialias=True)
    cells = images.unflatten(2, (rows, h)).unflatten(4, (columns, w))  # (B, 3, rows, h, columns, w)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(len(images), rows * columns, -1)
