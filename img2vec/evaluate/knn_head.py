"""Classes of patch tokens by their nearest neighbors among train's, without training.

As in Hummingbird (Balazevic et al., arXiv 2306.01667) and CAPI: every training token carries the shares of the
classes in its cell of the image; a token's scores are the mean of its k neighbors' shares, weighted by
exp(cosine / temperature).
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from img2vec.evaluate.confusion import IGNORED
from img2vec.evaluate.frozen_tokens import FrozenTokens, frozen_tokens
from img2vec.evaluate.linear_head import as_maps
from img2vec.evaluate.segment_settings import SegmentRecipe
from img2vec.evaluate.segmentation_data import SegmentationData, threaded
from img2vec.evaluate.segmentation_views import Layout, Scores, cut_labels
from tokdiv.dist import Processes
from tokdiv.progress import progress_bar
from tokdiv.teachers.teacher import Teacher

LABELS_PER_TOKEN = 8  # along each side: the shares are counts of 64 labels
MAX_SIMILARITIES = 2**26  # held at once, queries x bank: 256 MiB of float32


def fit_knn(
    encoder: Teacher,
    data: SegmentationData,
    layout: Layout,
    recipe: SegmentRecipe,
    group: Processes,
) -> tuple[Scores, int]:
    """Fill the bank; the scores of views, and the number of tokens in the bank."""
    frozen = frozen_tokens(encoder, data, layout, recipe, group, LABELS_PER_TOKEN)
    main_class = token_classes(frozen)
    chosen = choose_balanced(main_class, recipe.tokens_per_class, data.num_classes, recipe.seed)
    bank, shares = fill_bank(frozen, chosen)

    def scores(views: Tensor) -> Tensor:
        tokens = encoder(views)
        found = neighbor_scores(
            tokens.flatten(0, 1), bank, shares, k=recipe.k, temperature=recipe.temperature
        )
        return as_maps(found.unflatten(0, tokens.shape[:2]), encoder.grid)

    return scores, len(bank)


def token_classes(frozen: FrozenTokens) -> NDArray[np.int32]:
    """The most frequent class of every training token, int32 (V * K,); IGNORED where no pixel has a class.

    It takes the masks alone, so that only tokens in the bank are ever computed.
    """
    K, num_classes = frozen.encoder.num_tokens, frozen.data.num_classes

    def load(position: int) -> Tensor:
        labels = cut_labels(frozen.data.labels(position), frozen.layout, frozen.grid)
        counts = class_counts(labels, frozen.encoder.grid, num_classes)
        main = counts.argmax(axis=2)
        main[counts.max(axis=2) == 0] = IGNORED
        return torch.from_numpy(main.astype(np.int32).ravel())

    own = list(range(frozen.group.rank, len(frozen.data), frozen.group.world))
    parts = list(threaded(load, own, frozen.recipe.workers))
    gathered = frozen.group.gather_rows(torch.cat(parts) if parts else torch.empty(0).int())
    if frozen.group.world == 1:
        return gathered.numpy()
    # The parts of the processes one after the other: back into the order of the views.
    views = [
        np.flatnonzero(frozen.views[:, 0] % frozen.group.world == rank)
        for rank in range(frozen.group.world)
    ]
    classes = np.empty((len(frozen), K), dtype=np.int32)
    classes[np.concatenate(views)] = gathered.numpy().reshape(-1, K)
    return classes.ravel()


def class_counts(
    labels: NDArray[np.int16], grid: tuple[int, int], num_classes: int
) -> NDArray[np.int64]:
    """How often each class occurs in each cell of the tokens' grid.

    Args:
        labels: (n, rows * f, columns * f), 0 to num_classes - 1 or IGNORED.

    Returns:
        int64 (n, K, num_classes).
    """
    n, height, width = labels.shape
    rows, columns = grid
    cell = (np.arange(height) * rows // height)[:, None] * columns + np.arange(
        width
    ) * columns // width
    cell = cell + np.arange(n)[:, None, None] * rows * columns
    counted = labels != IGNORED
    index = cell[counted] * num_classes + labels[counted]
    counts = np.bincount(index, minlength=n * rows * columns * num_classes)
    return counts.reshape(n, rows * columns, num_classes)


def choose_balanced(
    classes: NDArray[np.int32], per_class: int, num_classes: int, seed: int
) -> NDArray[np.int64]:
    """Positions of `per_class` tokens of each class, drawn by chance; all of a class that has fewer.

    Returns:
        int64, ascending; none whose class is IGNORED.
    """
    generator = np.random.default_rng(seed)
    members = (np.flatnonzero(classes == number) for number in range(num_classes))
    chosen = [m if len(m) <= per_class else generator.permutation(m)[:per_class] for m in members]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def fill_bank(frozen: FrozenTokens, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """The chosen tokens, of length 1, (M, C), and the shares of the classes in their cells, (M, num_classes).

    Both are float32 on the device, alike on every process and in the order of `chosen`.
    """
    group, K = frozen.group, frozen.encoder.num_tokens
    own = frozen.own(np.unique(chosen // K))
    vectors, shares = (
        [torch.empty(0, frozen.encoder.dim)],
        [torch.empty(0, frozen.data.num_classes)],
    )
    bar = progress_bar(
        zip(own.tolist(), frozen.encode(own[:, None])),
        total=len(own),
        desc="tokens of train",
        unit="view",
        show=group.rank == 0,
    )
    for view, (tokens, labels) in bar:
        first, last = np.searchsorted(chosen, [view * K, (view + 1) * K])
        inside = chosen[first:last] - view * K
        counts = class_counts(labels.numpy(), frozen.encoder.grid, frozen.data.num_classes)
        vectors.append(F.normalize(tokens[0, inside].float(), dim=1).cpu())
        part = torch.from_numpy(counts[0, inside]).float()
        shares.append(part / part.sum(dim=1, keepdim=True))
    mine = chosen[np.isin(chosen // K, own)]
    order = torch.argsort(group.gather_rows(torch.from_numpy(mine)))
    bank = group.gather_rows(torch.cat(vectors))[order].to(group.device)
    return bank, group.gather_rows(torch.cat(shares))[order].to(group.device)


def neighbor_scores(
    tokens: Tensor, bank: Tensor, shares: Tensor, *, k: int, temperature: float
) -> Tensor:
    """The weighted mean of the shares of each token's k nearest neighbors by cosine.

    Args:
        tokens: (n, C). bank: (M, C), of length 1. shares: (M, num_classes).

    Returns:
        float32 (n, num_classes), rows of sum 1.
    """
    k = min(k, len(bank))
    found = []
    for part in F.normalize(tokens.float(), dim=1).split(max(1, MAX_SIMILARITIES // len(bank))):
        similarity, nearest = (part @ bank.T).topk(k, dim=1)
        # Relative to the nearest neighbor: nothing overflows, however low the temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        weights = weights / weights.sum(dim=1, keepdim=True)
        found.append(torch.einsum("nk,nkc->nc", weights, shares[nearest]))
    return torch.cat(found)
