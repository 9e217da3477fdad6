"""mIoU against a plain loop over pixels, with ignored pixels and absent classes."""

import math

import numpy as np
import pytest
import torch

from img2vec.evaluate.confusion import (
    IGNORED,
    class_scores,
    class_table,
    confusion_matrix,
    mean_scores,
)


def scores_by_loop(predicted, labels, num_classes):
    """IoU and recall of each class from sets of pixels; None where a class has none."""
    ious, recalls = [], []
    for number in range(num_classes):
        both = either = true = 0
        for guess, label in zip(predicted.ravel(), labels.ravel()):
            if label == IGNORED:
                continue
            both += guess == number and label == number
            either += guess == number or label == number
            true += label == number
        ious.append(both / either if either else None)
        recalls.append(both / true if true else None)
    return ious, recalls


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_a_loop_over_pixels(seed):
    generator = np.random.default_rng(seed)
    # Of six classes, 4 is in no mask but predicted, and 5 in neither.
    labels = generator.choice([IGNORED, 0, 1, 2, 3], (2, 7, 9))
    predicted = np.where(
        generator.random(labels.shape) < 0.6, labels, generator.integers(0, 5, labels.shape)
    )
    predicted = np.where(predicted == IGNORED, 4, predicted)
    predicted.flat[:5] = 4
    labels.flat[:3] = 0
    confusion = sum(
        confusion_matrix(torch.from_numpy(guess), torch.from_numpy(mask), 6)
        for guess, mask in zip(predicted, labels)
    )
    ious, recalls = scores_by_loop(predicted, labels, 6)
    assert ious[4] == 0 and ious[5] is None and recalls[4] is None
    table = class_table(confusion, list("abcdef"))
    assert [row["iou"] for row in table] == pytest.approx(ious)
    assert [row["accuracy"] for row in table] == pytest.approx(recalls)
    assert [row["pixels"] for row in table] == [int((labels == n).sum()) for n in range(6)]
    metrics = mean_scores(confusion)
    assert metrics["miou"] == pytest.approx(np.mean([v for v in ious if v is not None]))
    assert metrics["mean_class_accuracy"] == pytest.approx(
        np.mean([v for v in recalls if v is not None])
    )
    counted = labels != IGNORED
    assert metrics["pixel_accuracy"] == pytest.approx((predicted == labels)[counted].mean())


def test_the_matrix_has_true_classes_as_rows_and_leaves_ignored_pixels_out():
    labels = torch.tensor([[0, 0, 1], [2, IGNORED, IGNORED]], dtype=torch.int16)
    predicted = torch.tensor([[0, 1, 1], [0, 2, 0]])
    confusion = confusion_matrix(predicted, labels, 3)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    iou, recall = class_scores(confusion)
    assert iou.tolist() == pytest.approx([1 / 3, 1 / 2, 0]) and recall.tolist() == [0.5, 1, 0]


def test_nothing_labeled_is_no_number_and_no_crash():
    assert all(math.isnan(v) for v in mean_scores(torch.zeros(3, 3, dtype=torch.int64)).values())
