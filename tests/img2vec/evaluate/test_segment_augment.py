"""Augmentation of image and labels together: a shape is drawn, transformed, and found where a slow path says."""

import numpy as np
import pytest
import torch

from img2vec.evaluate import segmentation_augment
from img2vec.evaluate.confusion import IGNORED
from img2vec.evaluate.segmentation_augment import (
    BRIGHTNESS,
    augment,
    augmented_batches,
    draw_crop,
    jitter_colors,
)

COLORS = torch.tensor([[200, 30, 30], [30, 200, 30], [30, 30, 200]], dtype=torch.uint8)
FILL = [10.0, 90.0, 170.0]


def drawn(height, width, seed=0):
    """An image whose colors are its labels': a disc and a bar on a ground."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    labels = np.zeros((height, width), np.int16)
    labels[:, width // 3 : width // 2] = 2
    center = generator.uniform(0.3, 0.7, 2) * (height, width)
    labels[(y - center[0]) ** 2 + (x - center[1]) ** 2 < (min(height, width) / 4) ** 2] = 1
    labels = torch.from_numpy(labels)
    return COLORS[labels.long()].permute(2, 0, 1), labels


class Draws:
    """Records what `augment` draws, so that a slow path can repeat it."""

    def __init__(self, seed):
        self.generator, self.scale, self.corner, self.coins = (
            np.random.default_rng(seed),
            None,
            None,
            [],
        )

    def uniform(self, *limits):
        value = self.generator.uniform(*limits)
        self.scale = value if self.scale is None else self.scale
        return value

    def integers(self, high):
        value = self.generator.integers(high)
        self.corner = [*(self.corner or []), int(value)]
        return value

    def random(self):
        self.coins.append(float(self.generator.random()))
        return self.coins[-1]

    def permutation(self, count):
        return self.generator.permutation(count)


@pytest.mark.parametrize("shape", [(60, 60), (45, 80), (90, 40)])
@pytest.mark.parametrize("seed", range(6))
def test_labels_follow_the_image(shape, seed, monkeypatch):
    monkeypatch.setattr(segmentation_augment, "jitter_colors", lambda image, generator: image)
    image, labels = drawn(*shape, seed)
    draws = Draws(seed)
    view, mask = augment(image, labels, 32, FILL, draws)
    assert view.dtype == torch.uint8 and view.shape == (3, 32, 32)
    assert mask.dtype == torch.int16 and mask.shape == (32, 32)
    assert type(view) is type(mask) is torch.Tensor
    # The labels, pixel by pixel, from the crop's corner and side in the original.
    side = round(min(shape) / draws.scale)
    top, left = draws.corner[-2:]
    for row in range(32):
        for column in range(32):
            source = 31 - column if draws.coins[0] < 0.5 else column
            y, x = int(top + (row + 0.5) * side / 32), int(left + (source + 0.5) * side / 32)
            inside = y < shape[0] and x < shape[1]
            assert mask[row, column] == (labels[y, x] if inside else IGNORED)
    # The image's colors are those of its labels, but for the pixels at an edge.
    expected = COLORS[mask.clamp_min(0).long()].permute(2, 0, 1).float()
    expected[:, mask == IGNORED] = torch.tensor(FILL)[:, None]
    wrong = ((view.float() - expected).abs().amax(dim=0) > 60).float().mean()
    assert wrong < 0.12


def test_everything_drawn_depends_on_the_generator_alone():
    image, labels = drawn(50, 70)
    first, again, other = (
        augment(image, labels, 32, FILL, np.random.default_rng(s)) for s in (3, 3, 4)
    )
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_scales_flips_and_jitter_have_their_ranges_and_rates(monkeypatch):
    monkeypatch.setattr(segmentation_augment, "jitter_colors", lambda image, generator: image)
    image, labels = drawn(40, 40)
    scales, flips = [], []
    for seed in range(200):
        draws = Draws(seed)
        augment(image, labels, 16, FILL, draws)
        scales.append(draws.scale)
        flips.append(draws.coins[0] < 0.5)
    assert 0.5 <= min(scales) < 0.6 and 1.9 < max(scales) <= 2.0
    assert 0.35 < np.mean(flips) < 0.65


def test_colors_change_and_labels_never_do():
    image, _ = drawn(20, 20)
    results = [jitter_colors(image, np.random.default_rng(seed)) for seed in range(60)]
    changed = [not torch.equal(result, image) for result in results]
    assert 0.75 < np.mean(changed) < 1  # one in 16 has none of the four
    gray = torch.full((3, 4, 4), 100, dtype=torch.uint8)  # of a gray, only brightness shows
    levels = {int(jitter_colors(gray, np.random.default_rng(s))[0, 0, 0]) for s in range(200)}
    assert (
        100 * BRIGHTNESS[0] - 2 <= min(levels) < 90 and 110 < max(levels) <= 100 * BRIGHTNESS[1] + 2
    )


def test_a_crop_of_one_class_alone_is_drawn_again():
    labels = torch.zeros(40, 400, dtype=torch.int16)
    labels[:, 190:210] = 1
    shares = []
    for seed in range(30):
        top, left = draw_crop(labels, 40, np.random.default_rng(seed))
        shares.append(float((labels[top : top + 40, left : left + 40] == 1).float().mean()))
    # 15% of all crops are mixed enough; within ten trials four of five are.
    assert np.mean([share >= 0.25 for share in shares]) > 0.5


def test_batches_are_the_same_for_any_number_of_threads_and_from_any_step(tmp_path):
    class Data:
        def image(self, position):
            return drawn(40, 50, position)[0]

        def labels(self, position):
            return drawn(40, 50, position)[1].numpy()

    batches = [(step, np.arange(step, step + 3)) for step in range(4)]
    options = {"size": 16, "fill": FILL, "seed": 5}
    one = list(augmented_batches(Data(), iter(batches), **options, workers=1))
    four = list(augmented_batches(Data(), iter(batches), **options, workers=4))
    later = list(augmented_batches(Data(), iter(batches[2:]), **options, workers=2))
    assert len(one) == 4 and one[0][0].shape == (3, 3, 16, 16) and one[0][1].dtype == torch.int64
    for first, second in [*zip(one, four), *zip(one[2:], later)]:
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
