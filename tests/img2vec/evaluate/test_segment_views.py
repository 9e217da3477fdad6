"""Views and labels of images of any size, and predictions back at that size, against plain loops."""

import itertools

import numpy as np
import pytest
import torch

from img2vec.evaluate.confusion import IGNORED
from img2vec.evaluate.segmentation_data import threaded
from img2vec.evaluate.segmentation_views import (
    Layout,
    cut_labels,
    cut_views,
    in_batches,
    join_views,
)

SIZES = [(32, 32), (48, 40), (40, 56), (20, 90), (31, 33)]


@pytest.mark.parametrize("size", SIZES)
def test_windows_cover_the_image_and_end_at_its_border(size):
    layout = Layout(32, 20)
    height, width = layout.resized(*size)
    assert min(height, width) == 32
    assert abs(height / width - size[0] / size[1]) < 0.03 * size[0] / size[1]
    covered = np.zeros((height, width), bool)
    corners = layout.corners(*size)
    for top, left in corners:
        assert 0 <= top <= height - 32 and 0 <= left <= width - 32
        covered[top : top + 32, left : left + 32] = True
    assert covered.all() and len(set(corners)) == len(corners)
    lefts = sorted({left for _, left in corners})
    assert all(b - a <= 20 for a, b in itertools.pairwise(lefts))


def test_a_whole_image_is_one_view_whatever_its_aspect():
    layout = Layout(32, None)
    assert layout.corners(48, 90) == [(0, 0)]
    image = torch.randint(0, 256, (3, 48, 90), dtype=torch.uint8)
    expected = torch.nn.functional.interpolate(
        image[None], size=(32, 32), mode="bicubic", antialias=True
    )
    assert torch.equal(cut_views(image, layout), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [None, 20])
@pytest.mark.parametrize("grid", [(32, 32), (8, 4)])
def test_labels_of_views_are_those_at_the_centers_of_their_cells(size, stride, grid):
    layout = Layout(32, stride)
    labels = np.random.default_rng(0).integers(IGNORED, 5, size).astype(np.int16)
    height, width = layout.resized(*size)
    views = cut_labels(labels, layout, grid)
    for view, (top, left) in zip(views, layout.corners(*size)):
        for row in range(grid[0]):
            for column in range(grid[1]):
                y = (top + 32 * (row + 0.5) / grid[0]) * size[0] / height  # a point of the original
                x = (left + 32 * (column + 0.5) / grid[1]) * size[1] / width
                assert view[row, column] == labels[int(y), int(x)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [None, 20])
def test_a_smooth_image_comes_back_from_its_views(size, stride):
    # Scores that are the image itself: cutting and joining is a resize to and fro.
    layout = Layout(32, stride)
    y = torch.linspace(40, 200, size[0])[:, None].expand(*size)
    x = torch.linspace(30, 220, size[1]).expand(*size)
    image = torch.stack([y, x, (x + y) / 2]).round().to(torch.uint8)
    joined = join_views(cut_views(image, layout).float(), layout, *size)
    assert joined.shape == (3, *size)
    inner = (joined - image)[:, 2:-2, 2:-2].abs()
    assert inner.max() < 6 and inner.mean() < 1.5


def test_scores_of_overlapping_windows_are_averaged():
    layout = Layout(4, 2)
    scores = torch.stack([torch.full((1, 2, 2), float(n)) for n in range(2)])
    joined = join_views(scores, layout, 4, 6)  # windows at the columns 0-3 and 2-5
    assert joined[0, 0].tolist() == [0, 0, 0.5, 0.5, 1, 1]


def test_items_of_any_number_of_views_get_their_own_outputs():
    counts = [2, 0, 5, 1, 3, 0]
    items = []
    for number, count in enumerate(counts):
        views = torch.full((count, 3, 2, 2), number, dtype=torch.uint8)
        items.append((views if count else torch.empty(0, dtype=torch.uint8), number))
    sizes = []

    def network(views):
        sizes.append(len(views))
        return views.float().mean(dim=(1, 2, 3))

    found = list(in_batches(network, items, 4, torch.device("cpu")))
    assert [rest for _, rest in found] == list(range(6))
    assert [output.tolist() for output, _ in found] == [
        [float(n)] * c for n, c in enumerate(counts)
    ]
    assert max(sizes) <= 4 and min(sizes) >= 1


def test_threads_keep_the_order_and_hand_on_errors():
    def square(number):
        if number == 7:
            raise ValueError("seven")
        return number**2

    assert list(threaded(square, range(7), 3)) == [n**2 for n in range(7)]
    with pytest.raises(ValueError, match="seven"):
        list(threaded(square, range(9), 2))
