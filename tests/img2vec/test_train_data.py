import numpy as np
import torch
import torch.nn.functional as F

from img2vec.data import View, crop_box, epoch_seed, plan_epoch, random_view, read_epoch
from img2vec.masking import draw_mask, plan_layout
from tokdiv.data.loader import decode_image, permutation
from tokdiv.data.open import open_source

LAYOUT = plan_layout(64, 16, 16, 0.6, (4, 4))
VIEW = View(64, (0.2, 1.0), LAYOUT, seed=5)


def test_crops_have_the_area_and_aspect_of_the_recipe():
    boxes = [crop_box(300, 400, (0.2, 1.0), 0, 0, position) for position in range(4000)]
    areas = np.array([h * w for _, _, h, w, _ in boxes]) / (300 * 400)
    aspects = np.array([w / h for _, _, h, w, _ in boxes])
    assert areas.min() > 0.195
    assert areas.max() <= 1
    assert aspects.min() > 0.74
    assert aspects.max() < 1.35
    for top, left, h, w, _ in boxes:
        assert 0 <= top <= 300 - h
        assert 0 <= left <= 400 - w
    # Uniform in area but for the largest, which often do not fit: the lower half of the range.
    counts, _ = np.histogram(areas, bins=4, range=(0.2, 0.6))
    assert counts.min() > 0.85 * counts.max()
    assert 0.47 < np.mean([flip for *_, flip in boxes]) < 0.53


def test_a_line_of_pixels_gets_the_largest_central_crop():
    assert crop_box(2, 900, (0.9, 1.0), 0, 0, 0)[:4] == (0, 448, 2, 3)


def test_a_view_is_the_crop_resized_and_perhaps_flipped():
    # Of low contrast: both passes of the resize round to 0..255, so overshoot is cut twice.
    image = torch.randint(100, 156, (3, 90, 70), dtype=torch.uint8)
    flips = set()
    for position in range(12):
        top, left, h, w, flip = crop_box(90, 70, VIEW.scale, VIEW.seed, 2, position)
        part = image[None, :, top : top + h, left : left + w].float()
        slow = F.interpolate(part, (64, 64), mode="bicubic", antialias=True)[0].clamp(0, 255)
        slow = slow.flip(2) if flip else slow
        view = random_view(image, VIEW, 2, position)
        assert view.dtype == torch.uint8
        assert (view.float() - slow).abs().max() <= 2  # fixed point against floating point
        flips.add(flip)
    assert flips == {True, False}


def test_views_and_masks_belong_to_positions_on_every_number_of_processes(photos):
    source = open_source(str(photos))
    order = permutation(24, epoch_seed(5, 3))
    assert order.tolist() != permutation(24, epoch_seed(5, 4)).tolist()
    for world, accumulate, batch_size in ((1, 1, 8), (2, 2, 2), (1, 2, 4)):
        plan = plan_epoch(24, batch_size, accumulate, world)
        seen = []
        for rank in range(world):
            for batch in read_epoch(source, plan, VIEW, 3, rank=rank, workers=2):
                for row, position in enumerate(batch.positions.tolist()):
                    image = decode_image(source.read(int(order[position])))
                    assert torch.equal(batch.images[row], random_view(image, VIEW, 3, position))
                    expected = draw_mask(LAYOUT, 5, 3, position)
                    assert batch.masks[row].tolist() == expected.tolist()
                    seen.append(position)
        assert sorted(seen) == list(range(24))


def test_an_epoch_can_begin_at_any_step(photos):
    source, plan = open_source(str(photos)), plan_epoch(24, 4, 2, 1)
    whole = list(read_epoch(source, plan, VIEW, 0))
    rest = list(read_epoch(source, plan, VIEW, 0, first=2))
    assert len(whole) == 6
    assert len(rest) == 2
    for a, b in zip(whole[4:], rest):
        assert torch.equal(a.images, b.images)
        assert (a.positions == b.positions).all()


def test_filling_and_unusable_images_weigh_nothing(tmp_path, photos):
    for number, path in enumerate(sorted(photos.rglob("*.png"))[:3]):
        (tmp_path / f"{number}.png").write_bytes(path.read_bytes())
    (tmp_path / "bad.png").write_bytes(b"no image")
    reported = []
    batches = list(
        read_epoch(
            open_source(str(tmp_path)),
            plan_epoch(4, 3, 1, 2),
            VIEW,
            0,
            rank=1,
            report=lambda key, reason: reported.append(key),
        )
    )
    assert len(batches) == 1
    positions, usable = batches[0].positions.tolist(), batches[0].usable.tolist()
    assert positions == [2, 3]
    assert batches[0].masks.sum(1).tolist() == [10, 10]
    assert sum(usable) == 2 - len(reported)
    filled = list(read_epoch(open_source(str(photos / "disc")), plan_epoch(12, 8, 1, 2), VIEW, 0))
    assert filled[0].usable.tolist() == [1.0] * 6
    odd = plan_epoch(11, 8, 1, 2)
    last = next(iter(read_epoch(open_source(str(photos / "disc")), odd, VIEW, 0, rank=1)))
    assert last.positions.tolist() == [6, 7, 8, 9, 10, -1]
    assert last.usable.tolist() == [1.0] * 5 + [0.0]
