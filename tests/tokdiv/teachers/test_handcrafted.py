"""The classical targets against independent computations: numpy patches, scikit-image's HOG."""

import numpy as np
import pytest
import torch
from skimage.feature import hog as skimage_hog
from torch import Tensor

from tokdiv.teachers.handcrafted import Hog, Pixels
from tokdiv.teachers.load import load_teacher
from tokdiv.teachers.notation import parse_specs
from tokdiv.teachers.zoo import IMAGENET_MEAN, IMAGENET_STD

pytestmark = pytest.mark.usefixtures("one_thread")


def patches(array: np.ndarray, side: int = 16) -> np.ndarray:
    """(3, H, W) -> (K, 3, side, side), row-major over the grid."""
    _, H, W = array.shape
    return np.stack(
        [array[:, r : r + side, c : c + side] for r in range(0, H, side) for c in range(0, W, side)]
    )


def normalized(image: Tensor) -> np.ndarray:
    mean, std = np.array(IMAGENET_MEAN)[:, None, None], np.array(IMAGENET_STD)[:, None, None]
    return (image.numpy().astype(np.float64) / 255 - mean) / std


def test_pixels_are_the_normalized_patches(images: Tensor):
    tokens = load_teacher("pixels:size=64")(images)
    assert tokens.shape == (3, 16, 768)
    for image, found in zip(images, tokens):
        expected = patches(normalized(image)).reshape(16, 768)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


def test_pixels_of_a_view_that_is_no_square():
    image = torch.arange(3 * 32 * 48, dtype=torch.float32).view(1, 3, 32, 48)
    planes = Pixels()(image)
    assert planes.shape == (1, 768, 2, 3)
    expected = patches(image[0].numpy()).reshape(6, 768)
    np.testing.assert_array_equal(planes.flatten(2)[0].T.numpy(), expected)


def skimage_cells(plane: np.ndarray) -> np.ndarray:
    """(H, W) -> (H / 8, W / 8, 9): one L2-normalized histogram a cell."""
    cells = skimage_hog(
        plane,
        orientations=9,
        pixels_per_cell=(8, 8),
        cells_per_block=(1, 1),
        block_norm="L2",
        feature_vector=False,
    )[:, :, 0, 0]
    # Its epsilon of 1e-5 is in units of the image; ours is negligible.
    return cells / np.maximum(np.linalg.norm(cells, axis=-1, keepdims=True), 1e-12)


def test_hog_is_that_of_scikit_image_for_each_channel():
    generator = np.random.default_rng(0)
    smooth = generator.normal(size=(2, 3, 8, 8)).repeat(8, 2).repeat(8, 3)
    views = smooth + 0.3 * generator.normal(size=smooth.shape)
    planes = Hog()(torch.from_numpy(views).float()).numpy()
    assert planes.shape == (2, 108, 4, 4)
    for view, found in zip(views, planes):
        expected = np.stack([skimage_cells(plane) for plane in view])  # (3, 8, 8, 9)
        # A patch holds its 2 x 2 cells, for each channel and orientation.
        tokens = found.reshape(3, 9, 2, 2, 4, 4)  # channel, bin, cell row, cell column, patch
        cells = tokens.transpose(0, 4, 2, 5, 3, 1).reshape(3, 8, 8, 9)
        np.testing.assert_allclose(cells, expected, rtol=0, atol=2e-4)


def test_a_horizontal_ramp_votes_for_one_orientation():
    ramp = torch.arange(64.0).expand(1, 3, 64, 64)
    histogram = Hog()(ramp).view(3, 9, 4, 16)
    torch.testing.assert_close(histogram[:, 0], torch.ones(3, 4, 16))
    assert (histogram[:, 1:] == 0).all()


def test_opposite_gradients_vote_alike():
    ramp = torch.arange(64.0) * 3
    image = (ramp[:, None] + ramp[None] * 0.4).expand(1, 3, 64, 64)
    torch.testing.assert_close(Hog()(image), Hog()(-image))


def test_a_flat_image_has_zero_tokens_rather_than_nan():
    assert (Hog()(torch.full((1, 3, 32, 32), 0.3)) == 0).all()


def test_hog_as_a_teacher(images: Tensor):
    teacher = load_teacher("hog:size=64")
    assert (teacher.grid, teacher.num_tokens, teacher.dim) == ((4, 4), 16, 108)
    tokens = teacher(images)
    assert tokens.shape == (3, 16, 108) and tokens.isfinite().all()
    # Each of a patch's 4 cells is normalized for each channel, so a token's length is sqrt(12).
    lengths = tokens.norm(dim=2)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 12**0.5))


def test_both_are_baselines():
    assert [spec.baseline for spec in parse_specs(["pixels,hog"])] == [True, True]


def test_pixels_take_another_mean_and_std(images: Tensor):
    teacher = load_teacher("pixels:size=64:mean=0.1/0.2/0.3:std=0.5")
    assert teacher.spec.mean == (0.1, 0.2, 0.3)
    expected = images[0].double() / 255 - torch.tensor([0.1, 0.2, 0.3]).double().view(3, 1, 1)
    found = teacher(images)[0].double().numpy()
    np.testing.assert_allclose(
        found, patches((expected / 0.5).numpy()).reshape(16, 768), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["pixels", "hog"])
def test_bfloat16_leaves_them_exact(name: str, images: Tensor):
    exact = load_teacher(f"{name}:size=64")(images)
    assert torch.equal(load_teacher(f"{name}:size=64", dtype="bfloat16")(images), exact)
