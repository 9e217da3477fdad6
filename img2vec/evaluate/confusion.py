"""From predicted and true labels to a confusion matrix, and from that to mIoU."""

from typing import Any

import torch
from torch import Tensor

IGNORED = -1  # label of the pixels that count nowhere


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true and predicted class.

    Args:
        predicted: integers (...), 0 to num_classes - 1.
        labels: integers of the same shape, 0 to num_classes - 1, or IGNORED.

    Returns:
        int64 (num_classes, num_classes), on the CPU: rows are true classes, columns predicted ones.
    """
    counted = labels != IGNORED
    pairs = labels[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes).cpu()


def mean_scores(confusion: Tensor) -> dict[str, float]:
    """miou, pixel_accuracy and mean_class_accuracy, in [0, 1].

    A class that neither the masks nor the predictions have has no IoU and is left out of the mean, as in
    mmsegmentation; a class that is predicted but not there counts with 0. The accuracy of a class is its recall,
    so that only classes in the masks have one.
    """
    iou, recall = class_scores(confusion)
    labeled = int(confusion.sum())
    return {
        "miou": float(iou.nanmean()),
        "pixel_accuracy": float(confusion.diagonal().sum()) / labeled if labeled else float("nan"),
        "mean_class_accuracy": float(recall.nanmean()),
    }


def class_scores(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and recall of each class.

    IoU = right / (true + predicted - right), recall = right / true, all counted in pixels.

    Returns:
        Two float64 (num_classes,), NaN where the denominator is 0.
    """
    counts = confusion.double()
    right, true, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    return right / (true + predicted - right), right / true


def class_table(confusion: Tensor, classes: list[str]) -> list[dict[str, Any]]:
    """A row per class: number, name, iou and accuracy (None where there is none), and its true pixels."""
    iou, recall = class_scores(confusion)
    return [
        {
            "number": number,
            "name": name,
            "iou": _or_none(iou[number]),
            "accuracy": _or_none(recall[number]),
            "pixels": int(confusion[number].sum()),
        }
        for number, name in enumerate(classes)
    ]


def _or_none(value: Tensor) -> float | None:
    return None if torch.isnan(value) else float(value)
