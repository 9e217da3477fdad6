"""The linear and the k-NN head on frozen tokens, against closed forms and brute force."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shapes import SEGMENTER, draw_shapes

from img2vec.evaluate import frozen_tokens as frozen_module
from img2vec.evaluate.confusion import IGNORED
from img2vec.evaluate.encoder import load_encoder
from img2vec.evaluate.frozen_tokens import choose_blocks, fill_cache, fits_in_memory, frozen_tokens
from img2vec.evaluate.knn_head import (
    choose_balanced,
    class_counts,
    fill_bank,
    neighbor_scores,
    token_classes,
)
from img2vec.evaluate.linear_head import (
    LinearHead,
    as_maps,
    channel_statistics,
    draw_batches,
    linear_step,
    read_tokens,
)
from img2vec.evaluate.segment_settings import SegmentRecipe
from img2vec.evaluate.segmentation_data import open_segmentation
from img2vec.evaluate.segmentation_views import Layout, cut_labels, cut_views
from tokdiv import Teacher
from tokdiv.dist import current_processes
from tokdiv.errors import UsageError

GROUP = current_processes()


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    root = draw_shapes(tmp_path_factory.mktemp("shapes") / "data", {"train": 5})
    return open_segmentation(f"{root}:split=train", f"{root}:split=train", GROUP, 2)[0]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(SEGMENTER, image_size=32, device="cpu", dtype="float32")


def frozen(encoder, train, labels_per_token=4, stride=None, **changes):
    recipe = SegmentRecipe(**{"encode_batch_size": 3, "workers": 2, **changes})
    return frozen_tokens(encoder, train, Layout(32, stride), recipe, GROUP, labels_per_token)


# Tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 20])
@pytest.mark.parametrize("cache_gib", [None, 0])
def test_tokens_and_labels_of_a_batch_cached_or_not(encoder, train, stride, cache_gib):
    views = frozen(encoder, train, stride=stride, cache_gib=cache_gib)
    assert fits_in_memory(views) == (cache_gib is None)
    assert len(views) == sum(len(views.layout.corners(*size)) for size in train.sizes.tolist())
    batches = [np.array([3, 0, 4]), np.array([1]), np.array([2, 2, 3])]
    found = list(read_tokens(views)(batches))
    for batch, (tokens, labels) in zip(batches, found):
        for number, one, label in zip(batch, tokens, labels):
            position, view = views.views[number]
            image = cut_views(train.image(position), views.layout)[view]
            assert torch.allclose(one, encoder(image[None])[0], atol=1e-5)
            expected = cut_labels(train.labels(position), views.layout, (16, 16))[view]
            assert label.tolist() == expected.tolist() and label.dtype == torch.int64


def test_memory_decides_on_the_cache(encoder, train, monkeypatch):
    monkeypatch.setattr(frozen_module, "free_memory", lambda: 2.0**30)
    assert fits_in_memory(frozen(encoder, train))
    monkeypatch.setattr(frozen_module, "free_memory", lambda: 1000.0)
    assert not fits_in_memory(frozen(encoder, train))
    assert frozen_module.UNKNOWN_MEMORY > 0


def test_blocks_are_concatenated(encoder, train):
    both = choose_blocks(encoder, [1, 3])
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = both(images)
    assert both.grid == (4, 4) and tokens.shape == (2, 16, 64) and both.dim == 64
    assert torch.allclose(tokens[..., 32:], encoder(images), atol=1e-5)  # the last one, normed
    with pytest.raises(UsageError, match=r"--blocks 1,9: .* has blocks 0 to 3"):
        choose_blocks(encoder, [1, 9])
    with pytest.raises(UsageError, match="no blocks that are known"):
        choose_blocks(load_encoder("hog", device="cpu"), [0])


def test_stages_of_a_convnet_come_on_the_finest_grid():
    network = load_encoder("timm:resnet18@random", image_size=64, device="cpu", dtype="float32")
    both = choose_blocks(network, [2, 4])
    assert both.grid == (8, 8) and both.dim == 128 + 512


# Linear ------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_tokens(encoder, train):
    views = frozen(encoder, train, stride=20)
    mean, variance = channel_statistics(read_tokens(views), views)
    cache = fill_cache(views).tokens.double().flatten(0, 1)
    assert torch.allclose(mean, cache.mean(dim=0)) and torch.allclose(
        variance, cache.var(dim=0, unbiased=False)
    )
    head = LinearHead(mean, variance, 3, seed=0)
    normed = head.norm(as_maps(fill_cache(views).tokens, encoder.grid))
    assert normed.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (normed.var(dim=(0, 2, 3)) - 1).abs().max() < 1e-2


def test_a_step_minimizes_the_mean_over_labeled_pixels():
    torch.manual_seed(0)
    maps, labels = torch.randn(3, 8, 2, 2), torch.randint(0, 4, (3, 6, 6))
    labels[0, :3] = IGNORED
    head = LinearHead(torch.zeros(8), torch.ones(8), 4, seed=1)
    before = head.conv.weight.detach().clone()
    # The slow path: a logit for each pixel, one at a time.
    weight, bias = before[:, :, 0, 0].clone().requires_grad_(), torch.zeros(4, requires_grad=True)
    logits = torch.einsum("nchw,kc->nkhw", maps / (1 + 1e-5) ** 0.5, weight) + bias[:, None, None]
    up = F.interpolate(logits, size=(6, 6), mode="bilinear")
    losses = [
        -up[n, :, y, x].log_softmax(dim=0)[labels[n, y, x]]
        for n in range(3) for y in range(6) for x in range(6) if labels[n, y, x] != IGNORED
    ]  # fmt: skip
    expected = torch.stack(losses).mean()
    expected.backward()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    loss = linear_step(head, optimizer, maps, labels, GROUP)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(
        head.conv.weight[:, :, 0, 0], before[:, :, 0, 0] - 0.5 * weight.grad, atol=1e-6
    )
    assert torch.allclose(head.conv.bias, -0.5 * bias.grad, atol=1e-6)
    # Without views, or without labeled pixels, nothing changes and nothing fails.
    kept = head.conv.weight.detach().clone()
    empty = torch.empty(0)
    assert linear_step(head, optimizer, empty, empty.long(), GROUP) == 0
    assert linear_step(head, optimizer, maps, torch.full_like(labels, IGNORED), GROUP) == 0
    assert torch.equal(head.conv.weight, kept)


def test_batches_pass_over_all_views_and_go_on_from_any_step():
    batches = list(draw_batches(5, 3, 10, seed=1))
    assert sorted(np.concatenate(batches).tolist()) == sorted(list(range(5)) * 6)
    for epoch in range(6):
        assert sorted(np.concatenate(batches)[5 * epoch : 5 * epoch + 5].tolist()) == list(range(5))
    for first in range(10):
        later = list(draw_batches(5, 3, 10, seed=1, first_step=first))
        assert [b.tolist() for b in later] == [b.tolist() for b in batches[first:]]


# k-NN --------------------------------------------------------------------------------------------


def test_neighbors_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(40, 6, generator=generator), dim=1)
    shares = torch.rand(40, 3, generator=generator).softmax(dim=1)
    tokens = torch.randn(7, 6, generator=generator)
    found = neighbor_scores(tokens, bank, shares, k=5, temperature=0.1)
    for token, row in zip(tokens, found):
        cosines = [float(token @ b / token.norm()) for b in bank]
        nearest = sorted(range(40), key=lambda n: -cosines[n])[:5]
        weights = np.exp(np.array([cosines[n] for n in nearest]) / 0.1)
        expected = sum(w * shares[n] for w, n in zip(weights, nearest)) / weights.sum()
        assert torch.allclose(row, expected.float(), atol=1e-5)
    assert torch.allclose(found.sum(dim=1), torch.ones(7))
    # A k beyond the bank takes all of it, and no temperature overflows.
    everything = neighbor_scores(tokens, bank, shares, k=100, temperature=1e-4)
    assert torch.isfinite(everything).all()


def test_class_counts_against_a_loop():
    labels = np.random.default_rng(0).integers(IGNORED, 3, (2, 6, 8)).astype(np.int16)
    counts = class_counts(labels, (3, 2), 3)
    for n in range(2):
        for row in range(3):
            for column in range(2):
                cell = labels[n, 2 * row : 2 * row + 2, 4 * column : 4 * column + 4]
                expected = [(cell == number).sum() for number in range(3)]
                assert counts[n, row * 2 + column].tolist() == expected


def test_the_bank_has_the_same_number_of_each_class():
    classes = (
        np.random.default_rng(0)
        .choice([IGNORED, 0, 1, 2], 900, p=[0.1, 0.8, 0.09, 0.01])
        .astype(np.int16)
    )
    chosen = choose_balanced(classes, 40, 4, seed=3)
    counts = np.bincount(classes[chosen], minlength=4)
    assert counts.tolist() == [40, 40, (classes == 2).sum(), 0] and counts[2] < 40
    assert (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, choose_balanced(classes, 40, 4, seed=3))
    assert not np.array_equal(chosen, choose_balanced(classes, 40, 4, seed=4))


@pytest.mark.parametrize("stride", [None, 20])
def test_the_bank_holds_the_chosen_tokens_and_the_shares_of_their_cells(encoder, train, stride):
    views = frozen(encoder, train, labels_per_token=8, stride=stride)
    classes = token_classes(views)
    assert len(classes) == len(views) * 16
    chosen = choose_balanced(classes, 9, 3, seed=0)
    bank, shares = fill_bank(views, chosen)
    assert bank.shape == (len(chosen), 32) and shares.shape == (len(chosen), 3)
    for index, vector, share in zip(chosen, bank, shares):
        number, token = divmod(int(index), 16)
        position, view = views.views[number]
        tokens = encoder(cut_views(train.image(position), views.layout)[view][None])[0]
        assert torch.allclose(vector, F.normalize(tokens[token], dim=0), atol=1e-5)
        labels = cut_labels(train.labels(position), views.layout, (32, 32))[view]
        row, column = divmod(token, 4)
        cell = labels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        counts = np.array([(cell == c).sum() for c in range(3)])
        assert share.tolist() == pytest.approx(counts / counts.sum())
        assert classes[index] == counts.argmax()


def test_a_teacher_made_in_code_is_taken(train):
    module = torch.nn.Conv2d(3, 5, 8, stride=8)
    teacher = Teacher(module, size=32, name="mine")
    tokens, _ = next(iter(frozen(teacher, train).encode([np.array([0])])))
    assert tokens.shape == (1, 16, 5)
