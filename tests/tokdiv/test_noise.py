"""The correspondence phase: noise-like teachers are told from others, alike for any number of processes."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import tokdiv
from tokdiv import Teacher
from tokdiv.config import Settings
from tokdiv.correspondence import correspondence, crop_views, draw_crops
from tokdiv.data.decode import decode_image
from tokdiv.data.open import open_source
from tokdiv.data.source import permutation
from tokdiv.dist import Interruption, current_processes
from tokdiv.errors import Interrupted, RunError
from tokdiv.noise import MARGIN, measure_correspondence
from tokdiv.similarity import local_minus_distant, outlier_share

SIZE = 64


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 pictures of colored discs, one of them damaged."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[:96, :128]
    for number in range(40):
        pixels = np.zeros((96, 128, 3)) + draw.integers(0, 256, 3)
        for _ in range(12):
            y, x, radius = draw.uniform(0, 96), draw.uniform(0, 128), draw.uniform(6, 20)
            pixels[np.hypot(rows - y, columns - x) < radius] = draw.integers(0, 256, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.png")
    (folder / "05.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    return folder


class Blurs(nn.Module):
    """Gray values around each cell at several scales: hardly changed by mirroring and recoloring."""

    def forward(self, images):
        gray = images.mean(dim=1, keepdim=True)
        gray = (gray - gray.mean(dim=(2, 3), keepdim=True)) / (
            gray.std(dim=(2, 3), keepdim=True) + 1e-6
        )
        scales = [
            F.avg_pool2d(gray, k, 1, k // 2, count_include_pad=False) for k in (3, 7, 13, 21, 31)
        ]
        planes = torch.cat([*scales, *(scale.square() for scale in scales)], dim=1)
        return F.interpolate(planes, (8, 8), mode="area")


class Noise(nn.Module):
    """Tokens that are the same whatever the image."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("tokens", torch.randn(1, 16, 8, 8, generator=generator))

    def forward(self, images):
        return self.tokens.expand(len(images), -1, -1, -1)


def teachers():
    return [
        Teacher(Blurs(), size=SIZE, name="blurs"),
        Teacher(Noise(), size=SIZE, name="noise"),
    ]


def settings(**changes) -> Settings:
    return Settings(**{"correspondence_images": 24, "workers": 1, "dtype": "float32", **changes})


def found(photos, run=None, given=None, signal=0, **changes):
    source = open_source(str(photos))
    order = permutation(source.count, changes.get("seed", 0))
    return measure_correspondence(
        given or teachers(),
        source,
        order,
        settings(**changes),
        current_processes(),
        Interruption(signal),
        run,
    )


def test_it_is_the_mean_over_the_first_usable_images(photos):
    result = found(photos, confidence=0.6)
    source = open_source(str(photos))
    expected = {t.name: [] for t in teachers()}
    num_images = result["blurs"].images
    for position, index in enumerate(permutation(source.count, 0)):
        if source.key(int(index)) == "05.png" or len(expected["noise"]) == num_images:
            continue
        image = decode_image(source.read(int(index)))
        crops = draw_crops(96, 128, 0, position)
        views = crop_views(image, crops, SIZE)
        for teacher in teachers():
            tokens = [teacher(view[None]) for view in views]
            boxes = torch.tensor(crops.first), torch.tensor(crops.second)
            expected[teacher.name].append(float(correspondence(*tokens, *boxes, teacher.grid)))
    for name, values in expected.items():
        assert result[name].correspondence == pytest.approx(np.mean(values), abs=1e-6)
        assert result[name].low <= result[name].correspondence <= result[name].high


def test_noise_is_told_from_tokens_about_the_image(photos, tmp_path):
    (tmp_path / "many").mkdir()
    for number in range(400):  # the crops of a copy are others
        name = f"{number % 40:02d}.png"
        if name != "05.png":
            (tmp_path / "many" / f"{number:03d}.png").symlink_to(photos / name)
    result = found(tmp_path / "many", correspondence_images=195, confidence=0.6)
    assert result["noise"].noise_like is True
    assert result["blurs"].noise_like is False
    assert result["blurs"].correspondence > result["blurs"].pixels + MARGIN


def test_it_goes_on_to_twice_as_many_images_while_a_trained_teacher_is_undecided(photos):
    undecided = found(photos, correspondence_images=8)
    assert undecided["blurs"].images == 16
    alone = teachers()[1]
    alone.spec = dataclasses.replace(alone.spec, baseline=True)
    assert found(photos, given=[alone], correspondence_images=8)["noise"].images == 8
    assert found(photos, correspondence_images=0) == {}


def test_a_stored_phase_is_resumed_and_only_by_the_same_run(photos, tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(Interrupted):
        found(photos, tmp_path, signal=15, correspondence_images=40)
    first = found(photos, tmp_path, correspondence_images=40)
    assert first == found(photos, None, correspondence_images=40)

    class Untouched(Noise):
        def forward(self, images):
            assert (
                images.abs().max() == images.abs().min()
            )  # the image that a new Teacher is tried with
            return super().forward(images)

    again = teachers()
    again[1].module = Untouched()
    assert found(photos, tmp_path, given=again, correspondence_images=40) == first
    other = found(photos, tmp_path, seed=1, correspondence_images=20)
    assert other == found(photos, None, seed=1, correspondence_images=20)


def test_damaged_or_edited_state_is_measured_again(photos, tmp_path):
    expected = found(photos, tmp_path)
    path = tmp_path / "state" / "correspondence.parquet"
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[draw.integers(len(whole))] ^= 1 << draw.integers(8)
        path.write_bytes(damaged)
        assert found(photos, tmp_path) == expected
    for content in (b"", b"PAR1", whole[:100], b"{}"):
        path.write_bytes(content)
        assert found(photos, tmp_path) == expected


def test_nan_tokens_are_an_error_that_names_the_teacher(photos):
    class Broken(Noise):
        def forward(self, images):
            return super().forward(images) + images.mean() * torch.nan

    with pytest.raises(RunError, match="broken gives NaN or infinite tokens"):
        found(photos, given=[Teacher(Broken(), size=SIZE, name="broken", grid=(8, 8))])


def test_outliers_and_local_similarity_by_loop():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 20, 5, generator=generator)
    tokens[0, 3] *= 100
    norms = tokens.double().norm(dim=2).numpy()
    expected = [np.mean(n > 4 * np.sort(n)[9]) for n in norms]  # torch's median is the lower one
    np.testing.assert_allclose(outlier_share(tokens).numpy(), expected)
    centers = [((r + 0.5) / 4, (c + 0.5) / 5) for r in range(4) for c in range(5)]
    for image, value in zip(tokens.double().numpy(), local_minus_distant(tokens, (4, 5))):
        near, distant = [], []
        for i, a in enumerate(centers):
            for j, b in enumerate(centers):
                if i != j:
                    d = np.hypot(a[0] - b[0], a[1] - b[1])
                    cosine = (
                        image[i] @ image[j] / np.linalg.norm(image[i]) / np.linalg.norm(image[j])
                    )
                    near += [cosine] if d <= 0.25 else []
                    distant += [cosine] if d >= 0.5 else []
        assert float(value) == pytest.approx(np.mean(near) - np.mean(distant), abs=1e-5)


def test_a_noise_like_teacher_is_ranked_and_shown_but_does_not_win(photos, tmp_path):
    (tmp_path / "many").mkdir()
    for number in range(400):
        name = f"{number % 40:02d}.png"
        if name != "05.png":
            (tmp_path / "many" / f"{number:03d}.png").symlink_to(photos / name)
    options = {"correspondence_images": 195, "confidence": 0.6, "certify": "none", "max_images": 32}
    ranking = tokdiv.rank(tmp_path / "many", teachers(), tmp_path / "run", **options)
    assert [t.name for t in ranking.teachers] == ["noise", "blurs"]  # noise is the more diverse one
    assert ranking.best_name == "blurs" and ranking["noise"].noise_like
    assert any("noise is noise-like and cannot win" in remark for remark in ranking.remarks())
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Are the tokens about the image?" in page and "noise (noise-like)" in page
    assert (tmp_path / "run" / "correspondence.png").is_file()
    again = tokdiv.load_ranking(tmp_path / "run")
    assert again.best_name == "blurs" and again["noise"] == ranking["noise"]
    alone = tokdiv.rank(tmp_path / "many", teachers()[1:], **options)
    assert alone.best_name == "noise"
    assert any("No trained teacher is fit to win" in remark for remark in alone.remarks())
