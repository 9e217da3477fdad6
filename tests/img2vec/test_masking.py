import numpy as np
import pytest
import torch

from img2vec.data import plan_epoch
from img2vec.masking import draw_mask, on_grid, plan_layout, split_indices
from tokdiv.errors import UsageError

PAPER = plan_layout(224, 16, 32, 0.6, (7, 7))


def test_the_papers_view_hides_29_of_49_blocks_and_116_of_196_patches():
    assert (PAPER.num_units, PAPER.num_masked) == (49, 29)
    assert PAPER.num_patches - PAPER.num_visible_patches == 116
    assert PAPER.num_masked_targets == 29
    for position in range(50):
        mask = draw_mask(PAPER, 0, 0, position)
        assert mask.shape == (49,)
        assert mask.sum() == 29


def test_every_image_has_its_own_mask_and_each_unit_is_hidden_equally_often():
    masks = np.stack([draw_mask(PAPER, 3, 1, position) for position in range(3000)])
    assert len({m.tobytes() for m in masks}) == 3000
    # 29/49 = 0.592; the standard deviation of a mean of 3000 is 0.009.
    assert np.abs(masks.mean(axis=0) - 29 / 49).max() < 0.04


def test_a_mask_depends_on_seed_epoch_and_position_alone():
    first = draw_mask(PAPER, 1, 2, 3)
    assert (first == draw_mask(PAPER, 1, 2, 3)).all()
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert (first != draw_mask(PAPER, *other)).any()


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_a_step_takes_the_same_images_on_every_number_of_processes(world, accumulate):
    alone = plan_epoch(1003, 64, 1, 1)
    shared = plan_epoch(1003, 64 // (world * accumulate), accumulate, world)
    assert shared.steps == alone.steps == 15
    blocks = [list(shared.blocks(rank)) for rank in range(world)]
    for step, expected in enumerate(alone.blocks(0)):
        parts = [
            blocks[rank][step * accumulate + inner]
            for inner in range(accumulate)
            for rank in range(world)
        ]
        assert np.concatenate(parts).tolist() == expected.tolist()


def test_a_batch_larger_than_the_data_takes_every_image_once():
    plan = plan_epoch(10, 8, 2, 2)
    assert (plan.steps, plan.global_batch) == (1, 10)
    taken = np.concatenate([block for rank in range(2) for block in plan.blocks(rank)])
    assert sorted(taken[taken >= 0].tolist()) == list(range(10))


def test_indices_are_those_of_a_slow_walk_over_the_image():
    layout = plan_layout(64, 8, 16, 0.5, (4, 4))
    masks = np.stack([draw_mask(layout, 0, 0, position) for position in range(5)])
    visible, masked, targets = split_indices(torch.from_numpy(masks), layout)
    for image, mask in enumerate(masks):
        hidden_units = mask.reshape(4, 4)
        seen = [r * 8 + c for r in range(8) for c in range(8) if not hidden_units[r // 2, c // 2]]
        wanted = [r * 4 + c for r in range(4) for c in range(4) if hidden_units[r, c]]
        cells = [
            (2 * (t // 4) + i) * 8 + 2 * (t % 4) + j for t in wanted for i in (0, 1) for j in (0, 1)
        ]
        assert visible[image].tolist() == seen
        assert targets[image].tolist() == wanted
        assert masked[image].tolist() == cells


def test_a_mask_on_a_finer_grid_repeats_each_unit():
    mask = torch.tensor([[True, False, False, True]])
    fine = on_grid(mask, (2, 2), (4, 6)).reshape(4, 6)
    assert fine.tolist() == [[r // 2 == c // 3 for c in range(6)] for r in range(4)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((230, 16, 32, 0.6, (7, 7)), "230 is not a multiple of the student's patch of 16 px"),
        ((240, 16, 32, 0.6, (7, 7)), "240 is not a multiple of --mask-unit of 32 px"),
        ((224, 16, 56, 0.6, (7, 7)), "--mask-unit 56 is not a multiple of the student's patch"),
        ((224, 16, 32, 0.001, (7, 7)), "leaves none masked"),
        ((224, 16, 32, 0.999, (7, 7)), "leaves none visible"),
        ((224, 16, 16, 0.6, (7, 7)), "--mask-unit 16 is finer than a token of res.*--mask-unit 32"),
        ((224, 16, 32, 0.6, (10, 10)), "10 x 10 tokens cannot be aligned"),
        ((224, 16, 32, 0.6, (28, 28), "pool-student"), "28 x 28 tokens cannot be aligned"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(arguments, expected):
    with pytest.raises(UsageError, match=expected) as caught:
        plan_layout(*arguments, teacher="res") if len(arguments) == 5 else plan_layout(
            *arguments[:5], align=arguments[5], teacher="res"
        )
    assert "\n" not in str(caught.value)


def test_resampling_the_teacher_lifts_the_limits_of_pooling():
    fine_mask = plan_layout(224, 16, 16, 0.6, (7, 7), "resample-teacher")
    assert (fine_mask.targets, fine_mask.resample) == ((14, 14), True)
    assert plan_layout(224, 16, 32, 0.6, (16, 16)).resample  # ViT/14: chosen by itself
    assert not plan_layout(224, 16, 16, 0.6, (14, 14)).resample
