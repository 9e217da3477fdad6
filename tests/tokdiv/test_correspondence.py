"""Correspondence against a loop over tokens, and on images whose answer is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tokdiv.correspondence import (
    CropPair,
    correspondence,
    crop_views,
    draw_crops,
    pixel_cells,
    token_centers,
    true_places,
)


def by_loop(a: Tensor, b: Tensor, box_a, box_b, grid, mirrored: bool, tolerance: float) -> float:
    """The definition, token by token, in float64."""
    rows, columns = grid
    centers = [((r + 0.5) / rows, (c + 0.5) / columns) for r in range(rows) for c in range(columns)]
    right, counted = 0, 0
    for index, (y, x) in enumerate(centers):
        Y, X = box_a[0] + y * box_a[2], box_a[1] + x * box_a[3]
        v, u = (Y - box_b[0]) / box_b[2], (X - box_b[1]) / box_b[3]
        u = 1 - u if mirrored else u
        if not (0 <= v <= 1 and 0 <= u <= 1):
            continue
        counted += 1
        best, found = -math.inf, 0
        for other in range(len(centers)):
            p, q = a[index].double(), b[other].double()
            norms = float(p.norm() * q.norm())
            cosine = float(p @ q) / norms if norms else 0.0
            if cosine > best:
                best, found = cosine, other
        right += math.dist(centers[found], (v, u)) <= tolerance
    return right / counted if counted else math.nan


@pytest.mark.parametrize("grid", [(7, 7), (5, 3), (2, 2), (1, 6)])
@pytest.mark.parametrize("mirrored", [True, False])
def test_it_is_the_definition(grid, mirrored):
    generator = torch.Generator().manual_seed(0)
    K = grid[0] * grid[1]
    a, b = torch.randn(2, 3, K, 6, generator=generator)
    a[0, 1] = 0
    boxes = torch.tensor([[0, 0, 80, 60], [10, 5, 70, 40], [30, 20, 50, 70]])
    others = torch.tensor([[5, 7, 60, 60], [0, 0, 90, 50], [40, 10, 30, 80]])
    found = correspondence(a, b, boxes, others, grid, mirrored=mirrored, tolerance=0.3)
    expected = [
        by_loop(a[n], b[n], boxes[n].tolist(), others[n].tolist(), grid, mirrored, 0.3)
        for n in range(3)
    ]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_tokens_that_name_their_place_in_the_image_find_it():
    # Each token is the image's own coordinate at its center, as far away from others as a circle allows.
    boxes = torch.tensor([[0.0, 0.0, 60.0, 60.0]]), torch.tensor([[20.0, 30.0, 60.0, 60.0]])
    grid = (14, 14)
    centers = token_centers(grid)

    def tokens(box: Tensor, mirrored: bool) -> Tensor:
        at = centers.clone()
        if mirrored:
            at[:, 1] = 1 - at[:, 1]
        places = box[0, :2] + at * box[0, 2:]
        angles = places / 100 * math.pi / 2
        return torch.stack(
            [f(angles[:, n]) for n in (0, 1) for f in (torch.sin, torch.cos)], dim=1
        )[None].float()

    same = correspondence(tokens(boxes[0], False), tokens(boxes[1], True), *boxes, grid)
    assert same.tolist() == [1.0]
    # Their position within the crop instead is no answer in the mirrored view.
    assert (
        float(correspondence(tokens(boxes[0], False), tokens(boxes[0], False), *boxes, grid)) < 0.2
    )


def test_nothing_shared_or_not_finite_is_nan():
    a = torch.randn(2, 4, 3)
    b = a.clone()
    b[1, 0, 0] = torch.nan
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]), torch.tensor([[5, 5, 1, 1], [0, 0, 1, 1]])
    assert correspondence(a, b, *boxes).isnan().all()
    with pytest.raises(ValueError, match="expected tokens of one shape"):
        correspondence(a, b[:, :3], *boxes)
    with pytest.raises(ValueError, match="on 3 x 3"):
        correspondence(a, b, *boxes, grid=(3, 3))


def test_many_tokens_are_sampled_evenly():
    a = torch.randn(1, 48 * 48, 4)
    box = torch.tensor([0, 0, 10, 10])
    assert float(correspondence(a, a, box, box, mirrored=False)) == 1.0


def test_crops_depend_on_seed_and_position_alone():
    assert draw_crops(300, 400, 1, 7) == draw_crops(300, 400, 1, 7)
    assert len({draw_crops(300, 400, s, p) for s in range(3) for p in range(3)}) == 9
    large, small = draw_crops(600, 800, 1, 7), draw_crops(300, 400, 1, 7)
    np.testing.assert_allclose(np.array(large.first) / 2, small.first, atol=1)


@pytest.mark.parametrize("shape", [(300, 400), (33, 1000), (1, 1), (2, 3), (8, 8)])
def test_crops_share_tokens_and_keep_the_aspect(shape):
    areas = []
    for position in range(200):
        crops = draw_crops(*shape, 0, position)
        for top, left, h, w in (crops.first, crops.second):
            assert 0 <= top <= shape[0] - h and 0 <= left <= shape[1] - w and h >= 1 and w >= 1
            areas.append(h * w / math.prod(shape))
        _, inside = true_places(torch.tensor([crops.first]), torch.tensor([crops.second]), (7, 7))
        assert inside.sum() >= 4
        assert 0.6 <= crops.brightness <= 1.4 and 0.8 <= crops.saturation <= 1.2
        assert -0.1 <= crops.hue <= 0.1 and sorted(crops.order) == [0, 1, 2, 3]
    if min(shape) > 30:
        assert min(areas) > 0.28 and max(areas) < 0.72 and np.std(areas) > 0.05


def test_views_are_the_crops_the_second_mirrored_and_recolored():
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    plain = CropPair((0, 0, 32, 32), (8, 20, 32, 32), 1, 1, 1, 0, (3, 1, 0, 2))
    first, second = crop_views(image, plain, 32)
    assert torch.equal(first, image[:, :32, :32])
    assert (second.flip(2).int() - image[:, 8:40, 20:52].int()).abs().max() <= 2  # by way of HSV
    dark = crop_views(
        image, CropPair((0, 0, 32, 32), (8, 20, 32, 32), 0.5, 1, 1, 0, (0, 1, 2, 3)), 32
    )
    assert torch.equal(dark[0], first)
    half = float(second.float().mean()) / 2
    assert float(dark[1].float().mean()) == pytest.approx(half, rel=0.02)


@pytest.mark.parametrize(("size", "grid"), [(32, (2, 2)), (30, (7, 7)), (28, (4, 2))])
def test_pixel_cells_hold_the_pixels_of_each_cell(size, grid):
    images = torch.randn(2, 3, size, size)
    cells = pixel_cells(images, grid)
    h, w = size // grid[0], size // grid[1]
    assert cells.shape == (2, grid[0] * grid[1], 3 * h * w)
    if size % grid[0] == 0 and size % grid[1] == 0:
        for r, c in itertools.product(range(grid[0]), range(grid[1])):
            expected = images[:, :, r * h : (r + 1) * h, c * w : (c + 1) * w].flatten(1)
            assert torch.equal(cells[:, r * grid[1] + c], expected)
