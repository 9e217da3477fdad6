"""Weighted k-nearest-neighbor classification of frozen features, as in DINO (arXiv 2104.14294, app. F.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from img2vec.evaluate.encoder import load_encoder
from img2vec.evaluate.features import extract_features, float64_device
from img2vec.evaluate.labeled import open_labeled
from img2vec.evaluate.results import Results, describe_data
from img2vec.evaluate.settings import KnnSettings
from tokdiv.data.source import storable
from tokdiv.dist import current_processes
from tokdiv.errors import UsageError
from tokdiv.teachers.teacher import Teacher

# Most similarities held at once, val images x training images: 256 MiB of float32.
MAX_SIMILARITIES = 2**26


def knn(
    model: str | Path | Teacher,
    train: str,
    val: str,
    out: str | Path | None = None,
    **options: Any,
) -> Results:
    """Accuracy of a weighted k-NN classifier on frozen features.

    Args:
        model: see `load_encoder`.
        train: DATA that the neighbors come from. val: DATA that is classified. Both with classes.
        out: folder for results.json and results.csv; None writes nothing.
        options: fields of `KnnSettings`. A k above the number of training images is left out.

    Returns:
        top1_kN for each k, and top5_kN where there are five classes or more, in [0, 1].

    Raises:
        UsageError, RunError: see `load_encoder`, `open_labeled`, `extract_features`.
    """
    settings = KnnSettings(**options)
    train_data, val_data = open_labeled(train, val)
    encoder = load_encoder(
        model,
        feature=settings.feature,
        image_size=settings.image_size,
        device=settings.device,
        dtype=settings.dtype,
    )
    device = encoder.mean.device
    group = current_processes(device)
    bank, queries = (
        extract_features(
            encoder,
            data,
            encoder.size,
            batch_size=settings.batch_size,
            workers=settings.workers,
            device=device,
            description=f"features of {name}",
        )
        for name, data in (("train", train_data), ("val", val_data))
    )
    used = usable_neighbors(settings.k, len(bank.labels))
    hits = weighted_knn_hits(
        bank.features,
        bank.labels,
        queries.features[group.rank :: group.world],
        queries.labels[group.rank :: group.world],
        num_classes=train_data.num_classes,
        k=used,
        temperature=settings.temperature,
        device=float64_device(device),
    )
    totals = group.sum(torch.tensor([hits[k] for k in used]))
    metrics = {}
    for k, (top1, top5) in zip(used, totals.tolist()):
        metrics[f"top1_k{k}"] = top1 / len(queries.labels)
        if train_data.num_classes >= 5:
            metrics[f"top5_k{k}"] = top5 / len(queries.labels)
    notes = []
    if left_out := [k for k in settings.k if k not in used]:
        notes.append(
            f"k = {', '.join(map(str, left_out))} left out: there are {len(bank.labels)} training images"
        )
    results = Results(
        task="knn",
        model=storable(encoder.name),
        metrics=metrics,
        settings={
            "k": used,
            "temperature": settings.temperature,
            "feature": settings.feature,
            "image_size": encoder.size,
            "dim": encoder.dim,
            "dtype": str(encoder.dtype).removeprefix("torch."),
        },
        data=describe_data(train_data, val_data, bank.skipped, queries.skipped),
        notes=notes,
    )
    if out is not None:
        group.on_first(lambda: results.write(out))
    return results


def usable_neighbors(k: Sequence[int], num_train: int) -> list[int]:
    """The distinct k up to the number of training images, ascending; that number where all exceed it."""
    return sorted({n for n in k if n <= num_train}) or [num_train]


@torch.no_grad()
def weighted_knn_hits(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    *,
    num_classes: int,
    k: Sequence[int],
    temperature: float = KnnSettings.temperature,
    device: str | torch.device = "cpu",
) -> dict[int, tuple[int, int]]:
    """For each k, how many val images are classified right, and how many have their class among the top five.

    Args:
        train_features: float (N, C). train_labels: int64 (N,), 0 to num_classes - 1.
        val_features: float (M, C). val_labels: int64 (M,).
        k: each at most N.

    Each of the k nearest by cosine votes for its class with weight exp(cosine / temperature). A class
    without votes never counts as right, also where fewer than five classes have votes.
    """
    largest = max(k)
    if largest > len(train_labels):
        raise UsageError(f"k = {largest} exceeds the {len(train_labels)} training images")
    bank = F.normalize(train_features.to(device, torch.float32), dim=1)
    bank_labels = train_labels.to(device)
    chunk = max(1, MAX_SIMILARITIES // len(train_labels))
    hits = dict.fromkeys(k, (0, 0))
    for start in range(0, len(val_labels), chunk):
        queries = F.normalize(val_features[start : start + chunk].to(device, torch.float32), dim=1)
        labels = val_labels[start : start + chunk].to(device)
        similarity, nearest = (queries @ bank.T).topk(largest, dim=1)
        classes = bank_labels[nearest]
        # Relative to the nearest neighbor: nothing overflows, however low the temperature.
        weights = ((similarity.double() - similarity[:, :1]) / temperature).exp()
        for n in k:
            votes = torch.zeros(len(labels), num_classes, dtype=torch.float64, device=device)
            votes.scatter_add_(1, classes[:, :n], weights[:, :n])
            best, ranked = votes.topk(min(5, num_classes), dim=1)
            right = (ranked == labels[:, None]) & (best > 0)
            top1, top5 = hits[n]
            hits[n] = top1 + int(right[:, 0].sum()), top5 + int(right.sum())
    return hits
