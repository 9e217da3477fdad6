import numpy as np
import pytest
import torch

from img2vec.loss import global_loss, patch_loss
from img2vec.masking import plan_layout
from img2vec.targets import area_weights, make_targets, normalize, resample, split_targets


def _slow_area_mean(tokens: np.ndarray, grid, to) -> np.ndarray:
    """Average by area on a common fine raster, in loops."""
    rows, columns = np.lcm(grid[0], to[0]), np.lcm(grid[1], to[1])
    result = np.zeros((to[0] * to[1], tokens.shape[1]))
    counts = np.zeros(to[0] * to[1])
    for r in range(rows):
        for c in range(columns):
            source = (r * grid[0] // rows) * grid[1] + c * grid[1] // columns
            cell = (r * to[0] // rows) * to[1] + c * to[1] // columns
            result[cell] += tokens[source]
            counts[cell] += 1
    return result / counts[:, None]


@pytest.mark.parametrize(
    ("grid", "to"), [((16, 16), (14, 14)), ((7, 7), (14, 14)), ((14, 14), (7, 7)), ((5, 3), (2, 4))]
)
def test_resampling_averages_by_area(grid, to):
    tokens = torch.randn(2, grid[0] * grid[1], 3, dtype=torch.float64)
    fast = resample(tokens, grid, to)
    for image in range(2):
        slow = _slow_area_mean(tokens[image].numpy(), grid, to)
        np.testing.assert_allclose(fast[image].numpy(), slow, atol=1e-6)


def test_area_weights_of_equal_grids_are_the_identity():
    assert torch.equal(area_weights(7, 7), torch.eye(7))


def test_normalized_tokens_have_the_stated_scale():
    tokens = torch.randn(2, 5, 64) * 7 + 3
    layer = normalize(tokens, "layer")
    torch.testing.assert_close(layer.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.var(-1, correction=0), torch.ones(2, 5))
    torch.testing.assert_close(normalize(tokens, "l2").norm(dim=-1), torch.ones(2, 5))
    assert normalize(tokens, "none") is tokens


def test_targets_are_resampled_before_they_are_normalized():
    layout = plan_layout(64, 16, 32, 0.5, (8, 8), "resample-teacher")
    tokens = torch.randn(2, 64, 6, dtype=torch.float64)
    targets = make_targets(tokens, (8, 8), layout, "layer")
    slow = torch.from_numpy(_slow_area_mean(tokens[1].numpy(), (8, 8), (4, 4)))
    slow = (slow - slow.mean(1, keepdim=True)) / (slow.var(1, correction=0) + 1e-6).sqrt()[:, None]
    torch.testing.assert_close(targets[1], slow, atol=1e-6, rtol=1e-6)


def test_losses_are_smooth_l1_with_beta_2_in_loops():
    def smooth(error: float) -> float:
        return error * error / 4 if abs(error) < 2 else abs(error) - 1

    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(3, 9, 4, generator=generator, dtype=torch.float64) * 3
    predictions = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    image = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    masked = torch.tensor([[0, 8], [3, 4], [1, 2]])
    hidden, mean = split_targets(targets, masked)
    patch, whole = patch_loss(predictions, hidden), global_loss(image, mean)
    for b in range(3):
        errors = [
            smooth(float(predictions[b, m, c] - targets[b, masked[b, m], c]))
            for m in range(2)
            for c in range(4)
        ]
        assert patch[b].item() == pytest.approx(sum(errors) / 8, abs=1e-12)
        means = [sum(float(targets[b, t, c]) for t in range(9)) / 9 for c in range(4)]
        errors = [smooth(float(image[b, c]) - means[c]) for c in range(4)]
        assert whole[b].item() == pytest.approx(sum(errors) / 4, abs=1e-12)
