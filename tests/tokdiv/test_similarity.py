"""Token similarity against the naive double loop over all pairs in float64."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokdiv.metric import TokenSimilarity
from tokdiv.similarity import cosine_map, pooled_similarity, token_similarity


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """In float64; numbers of any scale are first brought to 1, which no cosine sees."""
    if not a.any() or not b.any():
        return 0.0
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def naive(tokens: Tensor) -> np.ndarray:
    """The definition, pair by pair: (B, K, C) -> (B,) float64."""
    scores = []
    for image in tokens.double().numpy():
        pairs = itertools.permutations(image, 2)
        scores.append(np.mean([cosine(a, b) for a, b in pairs]))
    return np.array(scores)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(tokens: Tensor, tolerance: float = 1e-5) -> None:
    scores = token_similarity(tokens)
    assert scores.dtype == torch.float32
    assert scores.shape == (len(tokens),)
    np.testing.assert_allclose(scores.double().numpy(), naive(tokens), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "tokens",
    [
        normal(3, 20, 8),
        normal(2, 49, 64).relu(),
        normal(2, 30, 16) + 3,
        normal(2, 30, 16) + 300,
        normal(3, 2, 5),
        normal(2, 9, 1),
        -normal(2, 30, 16).abs(),
        normal(2, 20, 8) * torch.logspace(-30, 30, 20)[None, :, None],
        normal(2, 20, 8) * torch.logspace(-6, 6, 8),
    ],
    ids=[
        "plain",
        "relu",
        "offset",
        "far",
        "pair",
        "one_channel",
        "negative",
        "token_scales",
        "channel_scales",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_closed_form_is_the_mean_over_all_pairs(tokens: Tensor, dtype: torch.dtype):
    close(tokens.to(dtype), 1e-5 if dtype == torch.float32 else 1e-7)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e37])
def test_no_scale_under_or_overflows(scale: float):
    tokens = normal(2, 12, 6)
    expected = token_similarity(tokens)
    torch.testing.assert_close(token_similarity(tokens * scale), expected, rtol=0, atol=1e-5)


def test_many_tokens_that_are_almost_alike_stay_exact():
    K = 4096
    tokens = (normal(1, K, 32) * 0.01 + normal(1, 1, 32, seed=1)).float()
    unit = torch.nn.functional.normalize(tokens.double(), dim=2)[0]
    expected = ((unit @ unit.T).sum() - K) / (K * (K - 1))
    assert abs(token_similarity(tokens).item() - expected.item()) < 1e-5


def test_half_precision_is_computed_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        tokens = (normal(2, 30, 64) + 1).to(dtype)
        close(tokens)
        torch.testing.assert_close(token_similarity(tokens), token_similarity(tokens.float()))


def test_float16_at_its_limit_does_not_overflow():
    close(torch.full((1, 4, 8), 65504.0, dtype=torch.float16))


def test_a_flattened_feature_map_needs_no_copy():
    planes = normal(2, 16, 5, 7)
    tokens = planes.flatten(2).transpose(1, 2)
    assert not tokens.is_contiguous()
    close(tokens)
    close(planes.to(memory_format=torch.channels_last).flatten(2).transpose(1, 2))
    torch.testing.assert_close(token_similarity(tokens), token_similarity(tokens.contiguous()))


def test_the_input_is_left_as_it_was():
    tokens = normal(2, 6, 4)
    before = tokens.clone()
    token_similarity(tokens), cosine_map(tokens, 0), pooled_similarity(tokens, (2, 3))
    assert torch.equal(tokens, before)


def test_an_image_s_score_does_not_depend_on_its_batch():
    tokens = normal(5, 20, 8)
    together = token_similarity(tokens)
    alone = torch.cat([token_similarity(image[None]) for image in tokens])
    assert torch.equal(together, alone)


# Edges


def test_identical_tokens_have_similarity_one():
    tokens = normal(3, 1, 8).expand(3, 30, 8)
    torch.testing.assert_close(token_similarity(tokens), torch.ones(3), rtol=0, atol=1e-6)
    assert (token_similarity(tokens) <= 1).all()


def test_orthogonal_tokens_have_similarity_zero():
    torch.testing.assert_close(token_similarity(torch.eye(6)[None] * 7), torch.zeros(1))


def test_opposite_tokens_reach_the_lower_end():
    pair = torch.tensor([[[1.0, 2.0], [-2.0, -4.0]]])
    torch.testing.assert_close(token_similarity(pair), torch.tensor([-1.0]))
    simplex = torch.eye(5) - 1 / 5  # K tokens as far apart as K tokens can be
    torch.testing.assert_close(token_similarity(simplex[None]), torch.tensor([-1 / 4]))


def test_the_cosine_with_a_zero_token_is_zero():
    tokens = normal(2, 10, 4) + 2
    tokens[0, 3:6] = 0
    close(tokens)
    tokens[1, 1:] = 0  # a single non-zero token is in no pair that counts
    assert token_similarity(tokens)[1] == 0


def test_an_image_of_zero_tokens_has_similarity_zero():
    assert token_similarity(torch.zeros(2, 5, 3)).tolist() == [0, 0]
    assert token_similarity(-torch.zeros(1, 5, 3)).tolist() == [0]


def test_nan_and_infinity_spoil_their_own_image_only():
    tokens = normal(4, 10, 4)
    tokens[0, 2, 1] = math.nan
    tokens[1, 2, 1] = math.inf
    tokens[2, 2] = -math.inf
    scores = token_similarity(tokens)
    assert scores[:3].isnan().all()
    torch.testing.assert_close(scores[3:], token_similarity(tokens[3:]))


def test_an_empty_batch_has_no_scores():
    scores = token_similarity(torch.zeros(0, 5, 3))
    assert scores.shape == (0,) and scores.dtype == torch.float32


def test_one_token_has_no_pair():
    with pytest.raises(ValueError, match="undefined for K = 1: it needs two tokens or more"):
        token_similarity(normal(2, 1, 8))


@pytest.mark.parametrize(
    "tokens", [normal(4, 8), normal(1, 2, 3, 4), torch.ones(1, 4, 3, dtype=torch.int64)]
)
def test_anything_but_floating_tokens_is_refused_with_its_shape(tokens: Tensor):
    with pytest.raises(ValueError, match=r"of shape \(B, K, C\), got torch.* of shape \("):
        token_similarity(tokens)


# Properties


@st.composite
def token_batches(draw: st.DrawFn) -> Tensor:
    K, C = draw(st.integers(2, 12)), draw(st.integers(1, 8))
    tokens = normal(1, K, C, seed=draw(st.integers(0, 2**31)))
    tokens = tokens * 10.0 ** draw(st.integers(-25, 25)) + draw(st.sampled_from([0.0, 0.0, 2.0]))
    keep = draw(st.lists(st.booleans(), min_size=K, max_size=K))
    return tokens * torch.tensor(keep, dtype=tokens.dtype)[None, :, None]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(token_batches())
def test_it_agrees_with_the_definition_within_its_range(tokens: Tensor):
    close(tokens)
    K = tokens.shape[1]
    assert -1 / (K - 1) - 1e-6 <= token_similarity(tokens).item() <= 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(token_batches(), st.randoms(use_true_random=False), st.floats(-8, 8))
def test_order_and_length_of_tokens_do_not_matter(tokens: Tensor, random, exponent: float):
    expected = token_similarity(tokens)
    order = list(range(tokens.shape[1]))
    random.shuffle(order)
    changed = tokens[:, order].clone()
    changed[:, random.randrange(len(order))] *= 10**exponent
    torch.testing.assert_close(token_similarity(changed), expected, rtol=0, atol=1e-5)


# Pooled to a common grid


def pooled(tokens: Tensor, rows: int, columns: int, side: int = 7) -> Tensor:
    """Cell by cell: the mean over the tokens that a cell touches."""
    grid = tokens.double().unflatten(1, (rows, columns))
    cells = []
    for r, c in itertools.product(range(side), repeat=2):
        up, down = r * rows // side, -(-(r + 1) * rows // side)
        left, right = c * columns // side, -(-(c + 1) * columns // side)
        cells.append(grid[:, up:down, left:right].mean(dim=(1, 2)))
    return torch.stack(cells, dim=1)


@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (16, 16), (10, 13), (28, 14), (37, 37)])
def test_pooling_averages_the_tokens_of_each_cell(grid: tuple[int, int]):
    tokens = normal(2, grid[0] * grid[1], 6) + 0.5
    scores = pooled_similarity(tokens, grid)
    assert scores is not None and scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), naive(pooled(tokens, *grid)), rtol=0, atol=1e-5)
    exact = pooled_similarity(tokens.double(), grid)
    assert exact is not None and exact.dtype == torch.float32
    np.testing.assert_allclose(exact.numpy(), naive(pooled(tokens, *grid)), rtol=0, atol=1e-7)


def test_pooling_to_another_side():
    tokens = normal(2, 8 * 8, 6)
    scores = pooled_similarity(tokens, (8, 8), side=4)
    assert scores is not None
    np.testing.assert_allclose(scores.numpy(), naive(pooled(tokens, 8, 8, 4)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(5, 5), (6, 14), (14, 6), (1, 49)])
def test_a_coarser_grid_has_no_pooled_similarity(grid: tuple[int, int]):
    assert pooled_similarity(normal(1, grid[0] * grid[1], 4), grid) is None


def test_pooling_takes_bfloat16_feature_maps():
    planes = normal(2, 6, 14, 14).bfloat16()
    tokens = planes.flatten(2).transpose(1, 2)
    scores = pooled_similarity(tokens, (14, 14))
    assert scores is not None
    np.testing.assert_allclose(scores.numpy(), naive(pooled(tokens, 14, 14)), rtol=0, atol=1e-5)


# Cosine maps


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_cosine_map_is_the_cosine_of_each_token_to_the_query(scale: float):
    tokens = normal(2, 12, 6)
    tokens[0, 3] = 0
    maps = cosine_map(tokens * scale, 5)
    assert maps.shape == (2, 12) and maps.dtype == torch.float32
    for b, k in itertools.product(range(2), range(12)):
        expected = cosine(tokens[b, k].double().numpy(), tokens[b, 5].double().numpy())
        assert maps[b, k].item() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(maps[:, 5], torch.ones(2))


def test_the_map_of_a_zero_query_is_zero():
    tokens = normal(1, 4, 3)
    tokens[0, 0] = 0
    assert cosine_map(tokens, 0).tolist() == [[0, 0, 0, 0]]


def test_a_cosine_map_takes_bfloat16():
    tokens = normal(1, 9, 8).bfloat16()
    torch.testing.assert_close(cosine_map(tokens, 4), cosine_map(tokens.float(), 4))


# The metric


def test_the_metric_is_the_mean_over_images_of_all_batches():
    batches = [normal(n, 10, 4, seed=n) for n in (3, 1, 0, 5)]
    metric = TokenSimilarity()
    for batch in batches:
        metric.update(batch)
    scores = torch.cat([token_similarity(batch) for batch in batches])
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(scores.double().mean().item(), abs=1e-15)


def test_batches_may_differ_in_their_number_of_tokens():
    metric = TokenSimilarity()
    metric.update(torch.ones(1, 4, 3))
    metric.update(torch.eye(6)[None])
    assert metric.compute().item() == pytest.approx(0.5, abs=1e-6)


def test_a_reset_metric_has_seen_nothing():
    metric = TokenSimilarity()
    metric.update(torch.ones(1, 4, 3))
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute().isnan()
    metric.update(torch.eye(4)[None])
    assert metric.compute().item() == pytest.approx(0, abs=1e-6)


def test_a_pickled_metric_goes_on_where_it_was():
    metric = TokenSimilarity()
    metric.update(torch.ones(3, 4, 3))
    copy = pickle.loads(pickle.dumps(metric))
    copy.update(torch.eye(4)[None])
    assert copy.compute().item() == pytest.approx(0.75, abs=1e-6)
    assert metric.compute().item() == pytest.approx(1, abs=1e-6)


def test_forward_gives_the_batch_s_own_mean_and_keeps_the_total():
    metric = TokenSimilarity()
    metric(torch.ones(3, 4, 3))
    assert metric(torch.eye(4)[None]).item() == pytest.approx(0, abs=1e-6)
    assert metric.compute().item() == pytest.approx(0.75, abs=1e-6)


def test_two_processes_with_uneven_images_agree_on_the_mean():
    other = TokenSimilarity()
    other.update(torch.eye(4)[None])
    theirs = iter([other.total, other.count])
    metric = TokenSimilarity(
        distributed_available_fn=lambda: True,
        dist_sync_fn=lambda state, group: [state, next(theirs)],
    )
    metric.update(torch.ones(3, 4, 3))
    assert metric.compute().item() == pytest.approx(0.75, abs=1e-6)
    assert metric.total.item() == pytest.approx(3, abs=1e-6)  # its own again after the merge
