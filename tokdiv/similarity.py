"""Token similarity: how alike the tokens of one image are, in closed form.

Pan et al., "Img2Vec: A Teacher of High Token-Diversity Helps Masked AutoEncoders", arXiv 2304.12535,
rank teachers by the mean cosine similarity over all pairs of distinct tokens. With unit tokens u_i the
sum over all pairs is ||sum_i u_i||^2, so a pass over the tokens is enough and no K x K matrix is built.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_similarity(tokens: Tensor) -> Tensor:
    """Mean cosine similarity over all ordered pairs of distinct tokens, for each image.

    S = (||sum_i u_i||^2 - K') / (K (K - 1)) with u_i = f_i / ||f_i||, where K' is the number of non-zero
    tokens: the cosine with a zero token is 0. Scaling a token by any positive number changes nothing.

    Args:
        tokens: (B, K, C) floating point, K >= 2. Half precision is computed in float32, float64 in itself.

    Returns:
        (B,) float32, in [-1 / (K - 1), 1]. An image with a token that is
        NaN or infinite gets NaN.

    Raises:
        ValueError: if `tokens` is not (B, K, C) floating point, or K < 2, where no pair exists.
    """
    if tokens.ndim != 3 or not tokens.is_floating_point():
        raise ValueError(
            f"tokens must be a floating-point tensor of shape (B, K, C), got {tokens.dtype} "
            f"of shape {tuple(tokens.shape)}"
        )
    B, K, C = tokens.shape
    if K < 2:
        raise ValueError(f"token similarity is undefined for K = {K}: it needs two tokens or more")
    if tokens.dtype != torch.float64:
        tokens = tokens.float()
    if tokens.device.type != "cpu":
        return _closed_form(tokens).float()
    # On a CPU the image is the unit of work: its tokens stay in the cache between the three passes.
    scores = [_closed_form(image) for image in tokens.split(1)]
    return torch.cat(scores).float() if scores else torch.zeros(0)


def _closed_form(tokens: Tensor) -> Tensor:
    """(B, K, C) -> (B,), elementwise sums only: a matrix product could run in bfloat16 or TF32."""
    K = tokens.shape[1]
    unit, nonzero = _unit(tokens)
    pairs = unit.sum(dim=1).square().sum(dim=1) - nonzero.sum(dim=(1, 2))
    return (pairs / (K * (K - 1))).clamp(-1 / (K - 1), 1)  # rounding could leave the range


def _unit(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K, C) -> tokens of length 1, zero tokens as they are; and which are not zero, (B, K, 1) bool."""
    # Dividing by the largest component first keeps the squares from over- or underflowing.
    scale = tokens.abs().amax(dim=2, keepdim=True)
    nonzero = scale != 0
    unit = tokens / torch.where(nonzero, scale, 1.0)
    return unit / torch.where(nonzero, unit.square().sum(dim=2, keepdim=True).sqrt(), 1.0), nonzero


def zero_share(tokens: Tensor) -> Tensor:
    """Share of the tokens of each image that are zero in all channels, whose cosines are undefined.

    Args:
        tokens: (B, K, C).

    Returns:
        (B,) float32 in [0, 1].
    """
    return (tokens.abs().amax(dim=2) == 0).float().mean(dim=1)


def pooled_similarity(tokens: Tensor, grid: tuple[int, int], side: int = 7) -> Tensor | None:
    """Token similarity after average pooling to a common `side` x `side` grid.

    It makes teachers of 49 and of 196 tokens comparable: the count of tokens itself moves the raw figure.

    Args:
        tokens: (B, K, C), row-major over the grid.
        grid: rows and columns, with rows * columns == K.
        side: rows and columns of the common grid.

    Returns:
        (B,) as in `token_similarity`; None where the teacher's grid is coarser than the common one.
    """
    rows, columns = grid
    if rows < side or columns < side or rows * columns != tokens.shape[1]:
        return None
    if (rows, columns) == (side, side):
        return token_similarity(tokens)
    if tokens.dtype != torch.float64:
        tokens = tokens.float()
    planes = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    if rows % side == 0 and columns % side == 0:
        pooled = F.avg_pool2d(planes, (rows // side, columns // side))
    else:
        pooled = F.adaptive_avg_pool2d(planes, (side, side))
    return token_similarity(pooled.flatten(2).transpose(1, 2))


def cosine_map(tokens: Tensor, query: int) -> Tensor:
    """Cosine of every token to the query token; 0 where either is zero.

    Args:
        tokens: (B, K, C) floating point.
        query: index of the query token, in [0, K).

    Returns:
        (B, K) float32 in [-1, 1]; 1 at the query.
    """
    unit, _ = _unit(tokens.float())
    return (unit * unit[:, query : query + 1]).sum(dim=2).clamp(-1, 1)


OUTLIER = 4.0  # a norm over this many times the median norm of the image
NEAR, DISTANT = 0.25, 0.5  # of the view's side
MAX_PAIRED = 1024  # tokens whose cosines are taken to each other; of more, an even sample


def outlier_share(tokens: Tensor) -> Tensor:
    """Share of outlier tokens: those whose norm is over 4 times the median norm of their image.

    Some ViTs without registers keep global information in a few such tokens (Darcet et al., arXiv 2309.16588).

    Args:
        tokens: (B, K, C) floating point.

    Returns:
        (B,) float32 in [0, 0.5].
    """
    norms = tokens.float().norm(dim=2)
    return (norms > OUTLIER * norms.median(dim=1, keepdim=True).values).float().mean(dim=1)


def local_minus_distant(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much more alike near tokens are than distant ones, the LDS of iREPA (arXiv 2512.10794).

    The mean cosine of tokens at most a quarter of the view's side apart minus that of tokens at least half of it
    apart.

    Args:
        tokens: (B, K, C), row-major over the grid.
        grid: rows and columns.

    Returns:
        (B,) float32 in [-2, 2]; NaN where the grid has no such pairs.
    """
    rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in grid)
    centers = torch.cartesian_prod(rows, columns)
    if len(centers) > MAX_PAIRED:
        kept = torch.linspace(0, len(centers) - 1, MAX_PAIRED).round().long()
        centers, tokens = centers[kept], tokens[:, kept.to(tokens.device)]
    distance = torch.cdist(centers, centers)
    near = ((distance <= NEAR) & (distance > 0)).float()
    distant = (distance >= DISTANT).float()
    weights = (near / near.sum() - distant / distant.sum()).to(tokens.device)
    found = []
    for image in tokens.split(1):  # K x K cosines of one image at a time
        unit, _ = _unit(image.float())
        found.append((unit[0] @ unit[0].T * weights).sum())
    return torch.stack(found) if found else torch.zeros(0, device=tokens.device)
