"""Large-scale jitter: images, masks and boxes against shapes that are drawn anew at every target pixel."""

import numpy as np
import pytest
import torch
from coco_shapes import disc, make_coco

from img2vec.evaluate.coco import open_coco
from img2vec.evaluate.detection_data import Sample, augment, tight_boxes, training_batches
from tokdiv.dist import current_processes

SIZE, HEIGHT, WIDTH = 96, 60, 90
CENTER, RADIUS = (52.0, 31.0), 17.0
DISC_BOX = [CENTER[0] - RADIUS, CENTER[1] - RADIUS, CENTER[0] + RADIUS, CENTER[1] + RADIUS]


def drawn() -> Sample:
    """A white disc on black, as an object; and a crowd."""
    inside = torch.from_numpy(disc(CENTER, RADIUS, (HEIGHT, WIDTH)))
    image = (inside * 255).to(torch.uint8).repeat(3, 1, 1)
    target = {
        "boxes": torch.tensor([DISC_BOX, [0, 0, 9, 9]]),
        "labels": torch.tensor([2, 1]),
        "masks": torch.stack([inside, torch.ones_like(inside)]).to(torch.uint8),
        "iscrowd": torch.tensor([0, 1]),
        "area": torch.tensor([900.0, 5400.0]),
    }
    return Sample(0, image, target)


def replayed(seed: int, scales: tuple[float, float], flip: float):
    """The numbers that `augment` draws, in its order: resized size, crop, top, left, whether flipped."""
    generator = np.random.default_rng(seed)
    scale = generator.uniform(*scales) * SIZE / max(HEIGHT, WIDTH)
    resized = [round(HEIGHT * scale), round(WIDTH * scale)]
    crop = [min(side, SIZE) for side in resized]
    top, left = (int(generator.integers(0, a - b + 1)) for a, b in zip(resized, crop))
    return resized, crop, top, left, generator.random() < flip


def slow_path(resized, crop, top, left, flipped) -> np.ndarray:
    """Bool mask of the disc: every target pixel's center is mapped back to the drawing."""
    mask = np.zeros(crop, dtype=bool)
    for row in range(crop[0]):
        for column in range(crop[1]):
            x = crop[1] - column - 0.5 if flipped else column + 0.5
            x = (x + left) * WIDTH / resized[1]
            y = (row + 0.5 + top) * HEIGHT / resized[0]
            mask[row, column] = np.hypot(x - CENTER[0], y - CENTER[1]) < RADIUS
    return mask


def border(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels within `thickness` of where the mask changes."""
    padded = np.pad(mask, thickness, mode="edge")
    views = [
        padded[dy : dy + mask.shape[0], dx : dx + mask.shape[1]]
        for dy in range(2 * thickness + 1)
        for dx in range(2 * thickness + 1)
    ]
    return np.any(views, axis=0) & ~np.all(views, axis=0)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("scales", "flip"),
    [((1.0, 1.0), 0.0), ((1.0, 1.0), 1.0), ((0.1, 0.9), 0.0), ((1.2, 2.0), 0.0), ((0.1, 2.0), 0.5)],
    ids=["resize", "flip", "shrink", "crop", "all"],
)
def test_image_mask_and_box_move_together(seed, scales, flip):
    drawing = replayed(seed, scales, flip)
    resized, crop, top, left, flipped = drawing
    expected = slow_path(*drawing)
    sample = augment(drawn(), SIZE, scales, flip, np.random.default_rng(seed))
    assert sample.image.shape == (3, *crop)
    if not len(sample.target["labels"]):  # cut away
        assert expected.sum() < 40
        return
    assert sample.target["labels"].tolist() == [2]  # the crowd is not trained on
    mask = sample.target["masks"][0].numpy().astype(bool)
    scale = resized[0] / HEIGHT
    # A source pixel's edge is at most half a source pixel from the disc's.
    off = (mask != expected) & ~border(expected, 1 + int(np.ceil(scale)))
    assert not off.any()
    assert abs(int(mask.sum()) - int(expected.sum())) <= 0.08 * expected.sum() + 4
    picture = sample.image[0].numpy() > 127
    assert not ((picture != mask) & ~border(mask, 1 + int(np.ceil(scale)))).any()

    x1, y1, x2, y2 = (
        side * factor - offset
        for side, factor, offset in zip(
            DISC_BOX,
            [resized[1] / WIDTH, resized[0] / HEIGHT] * 2,
            [left, top] * 2,
        )
    )
    inside = x1 >= 0 and y1 >= 0 and x2 <= crop[1] and y2 <= crop[0]
    if flipped:
        x1, x2 = crop[1] - x2, crop[1] - x1
    box = sample.target["boxes"][0].tolist()
    if inside:
        assert box == pytest.approx([x1, y1, x2, y2], abs=1e-3)
    else:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_a_mask_shrinks_about_its_middle():
    # Plain nearest-neighbor takes the corner of a cell: the mask would move up and left by half of it.
    sample = augment(drawn(), SIZE, (0.2, 0.2), 0.0, np.random.default_rng(0))
    rows, columns = np.nonzero(sample.target["masks"][0].numpy())
    height, width = sample.image.shape[1:]
    assert columns.mean() + 0.5 == pytest.approx(CENTER[0] * width / WIDTH, abs=0.2)
    assert rows.mean() + 0.5 == pytest.approx(CENTER[1] * height / HEIGHT, abs=0.2)


def test_an_object_outside_of_the_crop_is_dropped():
    found = [
        len(augment(drawn(), 16, (8.0, 8.0), 0.0, np.random.default_rng(seed)).target["labels"])
        for seed in range(20)
    ]
    assert set(found) == {0, 1}


def test_an_image_without_objects_passes_through():
    target = {name: values[:0] for name, values in drawn().target.items()}
    sample = augment(
        Sample(0, drawn().image, target), 64, (0.5, 2.0), 0.5, np.random.default_rng(0)
    )
    assert sample.target["boxes"].shape == (0, 4)
    assert sample.target["masks"].shape == (0, *sample.image.shape[1:])


def test_tight_boxes_hold_the_last_pixel():
    masks = torch.zeros(3, 20, 30, dtype=torch.uint8)
    masks[0, 4:9, 7:11] = 1
    masks[1, 19, 29] = 1
    boxes = tight_boxes(masks)
    assert boxes[:2].tolist() == [[7, 4, 11, 9], [29, 19, 30, 20]]
    assert (boxes[2, 2:] < boxes[2, :2]).all()
    assert tight_boxes(masks[:0]).shape == (0, 4)


def test_batches_are_the_same_for_any_number_of_workers_and_from_any_step(tmp_path):
    data = open_coco(make_coco(tmp_path, 7))
    options = {
        "size": 32, "scales": (0.5, 2.0), "flip": 0.5, "batch_size": 3, "num_steps": 6, "seed": 3,
        "group": current_processes(),
    }  # fmt: skip
    whole = list(training_batches(data, first_step=0, workers=0, **options))
    later = list(training_batches(data, first_step=2, workers=2, **options))
    assert len(whole) == 6 and len(later) == 4
    for batch, other in zip(whole[2:], later):
        for one, two in zip(batch, other):
            assert one.position == two.position
            assert torch.equal(one.image, two.image)
            assert torch.equal(one.target["boxes"], two.target["boxes"])
    epoch = [sample.position for batch in whole[:2] for sample in batch]
    assert len(set(epoch)) == 6  # no image twice in an epoch
