"""Weighted k-nearest-neighbor classification of frozen features, as in DINO (arXiv 2104.14294, app. F.1)."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from img2vec.evaluate.encoder import load_encoder
from img2vec.evaluate.features import (
    check_positive,
    exact_device,
    extract_features,
    process,
    sum_over_processes,
)
from img2vec.evaluate.labeled import open_labeled
from img2vec.evaluate.results import Results, describe_data
from tokdiv.errors import UsageError
from tokdiv.teachers.teacher import Teacher

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
# Similarities held at once, test images x training images: 256 MiB of float32.
SIMILARITIES = 2**26


def knn(
    model: str | Path | Teacher,
    train: str,
    val: str,
    out: str | Path | None = None,
    *,
    k: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    feature: str = "mean",
    image_size: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Results:
    """Accuracy of a weighted k-NN classifier on frozen features.

    Args:
        model, feature, image_size, device, dtype: see `load_encoder`.
        train: DATA that the neighbors come from. val: DATA that is classified. Both with classes.
        out: folder for results.json and results.csv; None writes nothing.
        k: numbers of neighbors; one above the number of training images is left out.
        temperature: of the votes.
        batch_size: images in a forward pass of one process.
        workers: decoding threads of one process; None for one per core.

    Returns:
        top1_kN for each k, and top5_kN where there are five classes or more, in [0, 1].

    Raises:
        UsageError, RunError: see `load_encoder`, `open_labeled`, `extract_features`.
    """
    check_positive(temperature=temperature, batch_size=batch_size, k=min(k, default=0))
    learn, measure = open_labeled(train, val)
    encoder = load_encoder(
        model, feature=feature, image_size=image_size, device=device, dtype=dtype
    )
    place = encoder.mean.device
    bank, queries = (
        extract_features(
            encoder,
            data,
            encoder.size,
            batch_size=batch_size,
            workers=workers,
            device=place,
            description=description,
        )
        for data, description in ((learn, "features of train"), (measure, "features of val"))
    )
    used = usable_neighbors(k, len(bank.labels))
    rank, world = process()
    hits = weighted_knn_hits(
        bank.features,
        bank.labels,
        queries.features[rank::world],
        queries.labels[rank::world],
        num_classes=learn.num_classes,
        k=used,
        temperature=temperature,
        device=exact_device(place),
    )
    totals = sum_over_processes(torch.tensor([hits[count] for count in used]), place)
    metrics = {}
    for count, (top1, top5) in zip(used, totals.tolist()):
        metrics[f"top1_k{count}"] = top1 / len(queries.labels)
        if learn.num_classes >= 5:
            metrics[f"top5_k{count}"] = top5 / len(queries.labels)
    notes = []
    if left_out := [count for count in k if count not in used]:
        notes.append(
            f"k = {', '.join(map(str, left_out))} left out: there are {len(bank.labels)} training images"
        )
    results = Results(
        task="knn",
        model=encoder.name,
        metrics=metrics,
        settings={
            "k": list(used),
            "temperature": temperature,
            "feature": feature,
            "image_size": encoder.size,
            "dim": encoder.dim,
            "dtype": str(encoder.dtype).removeprefix("torch."),
        },
        data=describe_data(learn, measure, bank.skipped, queries.skipped),
        notes=notes,
    )
    if out is not None and rank == 0:
        results.write(out)
    return results


def usable_neighbors(k: Sequence[int], num_train: int) -> list[int]:
    """The distinct k up to the number of training images, ascending; that number where all exceed it."""
    return sorted({count for count in k if count <= num_train}) or [num_train]


def weighted_knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int | None = None,
    k: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, float]:
    """Top-1 accuracy in [0, 1] for each k.

    Args:
        train_features: float (N, C). train_labels: int64 (N,), 0 to num_classes - 1.
        test_features: float (M, C). test_labels: int64 (M,).
        num_classes: None for what the labels show.
        k, temperature: see `knn`.
    """
    used = usable_neighbors(k, len(train_labels))
    if num_classes is None:
        num_classes = 1 + int(max(train_labels.max(), test_labels.max()))
    hits = weighted_knn_hits(
        train_features,
        train_labels,
        test_features,
        test_labels,
        num_classes=num_classes,
        k=used,
        temperature=temperature,
        device=train_features.device,
    )
    return {count: hits[count][0] / len(test_labels) for count in used}


@torch.no_grad()
def weighted_knn_hits(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int,
    k: Sequence[int],
    temperature: float,
    device: str | torch.device,
) -> dict[int, tuple[int, int]]:
    """How many test images are right at first, and among the five classes with the most votes.

    Each of the k nearest by cosine votes for its class with weight exp(cosine / temperature). A class
    without votes is never right, also where fewer than five have any. Test images are taken in chunks, so
    that at most SIMILARITIES numbers are held beside the features.
    """
    largest = max(k)
    if largest > len(train_labels):
        raise UsageError(f"k = {largest} exceeds the {len(train_labels)} training images")
    bank = F.normalize(train_features.to(device, torch.float32), dim=1)
    bank_labels = train_labels.to(device)
    chunk = max(1, SIMILARITIES // len(train_labels))
    hits = {count: [0, 0] for count in k}
    for start in range(0, len(test_labels), chunk):
        queries = F.normalize(test_features[start : start + chunk].to(device, torch.float32), dim=1)
        labels = test_labels[start : start + chunk].to(device)
        similarity, nearest = (queries @ bank.T).topk(largest, dim=1)
        classes = bank_labels[nearest]
        # Relative to the nearest: the same order, and nothing overflows however low the temperature.
        weights = ((similarity.double() - similarity[:, :1]) / temperature).exp()
        for count in k:
            votes = torch.zeros(len(labels), num_classes, dtype=torch.float64, device=device)
            votes.scatter_add_(1, classes[:, :count], weights[:, :count])
            best, ranked = votes.topk(min(5, num_classes), dim=1)
            right = (ranked == labels[:, None]) & (best > 0)
            hits[count][0] += int(right[:, 0].sum())
            hits[count][1] += int(right.sum())
    return {count: (first, five) for count, (first, five) in hits.items()}
