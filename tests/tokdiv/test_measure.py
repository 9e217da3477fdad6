"""The measuring loop: right scores, right images, and an end at the right moment, whatever the batch size."""

import dataclasses
import inspect
import io
import json
import math
import typing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import timm
import torch
from fakes import (
    SIZE,
    coded_image,
    coded_tar,
    coded_teacher,
    numbers_in_order,
    similarities,
)
from PIL import Image
from torch import nn

import tokdiv
import tokdiv.data.decode
import tokdiv.data.loader
import tokdiv.measure
from tokdiv import Teacher
from tokdiv.certify import certify_order, look_schedule
from tokdiv.config import Settings
from tokdiv.data.open import open_source
from tokdiv.errors import RunError, UsageError
from tokdiv.judge import Judge, Plan, Share, Verdict

COUNT = 1200
TINY = {"workers": 2, "dtype": "float32", "device": "cpu", "report": False}


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coded_tar(tmp_path_factory.mktemp("coded") / "images.tar", COUNT)


@pytest.fixture(scope="module")
def numbers(coded: Path) -> np.ndarray:
    return numbers_in_order(coded)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda images: 1 / 0, "own: your code raised ZeroDivisionError: division by zero"),
        (lambda images: images[:, :, ::2], r"own gave tokens of shape \(.*, 512, 3\), expected"),
    ],
)
def test_a_network_of_ones_own_that_fails_on_an_image_is_named(
    coded: Path, answer: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    def tokens(images: torch.Tensor) -> torch.Tensor:
        return answer(images) if (images != images[0, 0, 0, 0]).any() else images

    own = Teacher(torch.nn.Identity(), tokens=tokens, size=32, name="own", mean=0.5, std=0.5)
    with pytest.raises(RunError, match=said):
        tokdiv.rank(coded, [own, "hog"], image_size=32, certify="none", max_images=20, **TINY)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven odd images of noise and four files that are none."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(3)

    def noise(*shape: int) -> np.ndarray:
        coarse = generator.integers(0, 256, (8, 8, *shape[2:]), np.uint8)
        return coarse.repeat(shape[0] // 8, axis=0).repeat(shape[1] // 8, axis=1)

    (folder / "a").mkdir()
    for number, (height, width) in enumerate([(64, 80), (96, 40), (32, 32), (200, 56)]):
        Image.fromarray(noise(height, width, 3)).save(folder / "a" / f"rgb{number}.png")
    Image.fromarray(noise(64, 64, 3)).save(folder / "photo.jpg", quality=90)
    Image.fromarray(noise(64, 48)).save(folder / "gray.png")
    Image.fromarray(noise(64, 48, 4), "CMYK").save(folder / "cmyk.tif")
    Image.fromarray(noise(48, 64, 4), "RGBA").save(folder / "alpha.png")
    Image.fromarray(noise(48, 64).astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(noise(64, 64, 3)).quantize(16).save(folder / "palette.png")
    Image.fromarray(noise(64, 64, 3)).save(folder / "lossless.webp", lossless=True)
    whole = (folder / "a" / "rgb0.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "corrupt.png").write_bytes(whole[:40] + bytes(200))
    (folder / "text.jpg").write_text("this is no picture\n")
    (folder / "empty.bmp").touch()
    return folder


UNUSABLE = {"corrupt.png", "empty.bmp", "text.jpg", "truncated.png"}


def naive_view(path: Path, size: int) -> np.ndarray:
    """(size, size, 3) in [0, 255]: the design's view through Pillow, in floats per channel."""
    image = Image.open(path)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode == "RGBA":
        image = Image.merge("RGB", image.split()[:3])
    image = image.convert("RGB")
    width, height = image.size
    side = round(size * 256 / 224)
    short = min(width, height)
    image = image.resize((round(width * side / short), round(height * side / short)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def naive_similarity(tokens: np.ndarray) -> float:
    """The mean over pairs (i, j), i != j, of the cosine; tokens (K, C) float64."""
    norms = np.linalg.norm(tokens, axis=1)
    cosines = tokens @ tokens.T / np.where(norms[:, None] * norms, norms[:, None] * norms, np.inf)
    pairs = ~np.eye(len(tokens), dtype=bool)
    return float(cosines[pairs].mean())


def naive_tokens(name: str, view: np.ndarray, networks: dict[str, nn.Module]) -> np.ndarray:
    """(K, C) float64 of one view, normalized with the mean and std that timm records."""
    if name == "pixels":
        x = (view / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        cells = x.reshape(x.shape[0] // 16, 16, x.shape[1] // 16, 16, 3)
        return cells.transpose(0, 2, 1, 3, 4).reshape(-1, 16 * 16 * 3)
    network = networks[name]
    config = network.pretrained_cfg
    x = torch.from_numpy((view / 255 - config["mean"]) / config["std"]).permute(2, 0, 1)[None]
    with torch.no_grad():
        tokens = network.double()(x)
    if tokens.ndim == 4:
        return tokens[0].flatten(1).T.numpy()
    return tokens[0, network.num_prefix_tokens :].numpy()


class Trunk(nn.Module):
    """A timm network up to its tokens, as the oracle runs it."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        arguments = {"img_size": size} if "vit" in name else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = timm.create_model(name, num_classes=0, **arguments).eval()
        self.pretrained_cfg = self.network.pretrained_cfg
        self.num_prefix_tokens = getattr(self.network, "num_prefix_tokens", 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network.forward_features(x)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


class TestScoresOfRealNetworks:
    size = 64
    names = ("pixels", "hog", "timm:test_vit@random", "timm:test_resnet@random")

    @pytest.fixture(scope="class")
    def run(self, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("run") / "RUN"
        tokdiv.rank(photographs, self.names, out, image_size=self.size, batch_size=4, **TINY)
        return out

    def test_mean_similarity_equals_a_naive_loop(self, run: Path, photographs: Path) -> None:
        networks = {n: Trunk(n.split(":")[1].split("@")[0], self.size) for n in self.names[2:]}
        files = [f for f in photographs.rglob("*.*") if f.name not in UNUSABLE]
        views = [naive_view(file, self.size) for file in files]
        teachers = {
            t["spec"]["architecture"]: t for t in read_json(run / "ranking.json")["teachers"]
        }
        for name in ("pixels", *self.names[2:]):
            scores = [naive_similarity(naive_tokens(name, view, networks)) for view in views]
            teacher = teachers[name.split(":")[-1].split("@")[0]]
            assert teacher["images"] == len(files)
            # Pillow rounds between its two passes of resizing: a level of 255 here and there.
            assert teacher["mean_similarity"] == pytest.approx(np.mean(scores), abs=2e-3), name

    def test_every_score_equals_the_naive_one_of_its_image(
        self, run: Path, photographs: Path
    ) -> None:
        table = pd.read_parquet(run / "scores.parquet").set_index("key")
        networks = {n: Trunk(n.split(":")[1].split("@")[0], self.size) for n in self.names[2:]}
        from tokdiv.data.loader import center_view, decode_image

        for key in table.index:
            data = next(photographs.rglob(Path(key).name)).read_bytes()
            view = center_view(decode_image(data), self.size).permute(1, 2, 0).numpy()
            for name in ("pixels", *self.names[2:]):
                column = next(c for c in table.columns if name.split(":")[-1].split("@")[0] in c)
                expected = naive_similarity(naive_tokens(name, view, networks))
                assert table.loc[key, column] == pytest.approx(expected, abs=1e-5), (key, name)

    def test_unusable_images_are_listed_and_have_no_row(self, run: Path) -> None:
        skipped = pd.read_csv(run / "skipped.csv")
        assert list(skipped.columns) == ["key", "reason"]
        assert {Path(key).name for key in skipped["key"]} == UNUSABLE
        assert skipped["reason"].str.len().min() > 3
        keys = pd.read_parquet(run / "scores.parquet")["key"]
        assert not {Path(key).name for key in keys} & UNUSABLE
        assert len(keys) == 11
        data = read_json(run / "ranking.json")["data"]
        assert (data["count"], data["images"], data["unusable"]) == (15, 15, 4)

    def test_scores_are_one_float32_column_a_teacher_in_the_seeded_order(
        self, run: Path, photographs: Path
    ) -> None:
        table = pq.read_table(run / "scores.parquet")
        names = [t["name"] for t in read_json(run / "ranking.json")["teachers"]]
        assert table.column_names[:2] == ["position", "key"]
        assert sorted(table.column_names[2:]) == sorted(names)
        assert {str(table.schema.field(name).type) for name in names} == {"float"}
        assert str(table.schema.field("position").type) == "int64"
        source = open_source(str(photographs))
        order = tokdiv.data.loader.permutation(source.count, 0)
        keys = [source.key(int(i)) for i in order]
        positions = table.column("position").to_pylist()
        assert positions == sorted(positions)
        assert table.column("key").to_pylist() == [keys[p] for p in positions]

    def test_baselines_are_no_winner_but_alone(self, run: Path) -> None:
        content = read_json(run / "ranking.json")
        assert all(t["baseline"] for t in content["teachers"])
        assert content["best"] == content["teachers"][0]["name"]
        assert any("no trained" in remark for remark in tokdiv.load_ranking(run).remarks())

    def test_the_mean_over_200_px_views_shares_a_decode_with_those_of_another_geometry(
        self, photographs: Path
    ) -> None:
        ranking = tokdiv.rank(
            photographs,
            ["pixels", "big=timm:test_vit@random:size=96", "hog"],
            image_size=32,
            **TINY,
        )
        assert ranking["pixels"].spec.num_tokens == 4
        assert ranking["big"].spec.num_tokens == 36
        assert ranking["big"].spec.size == 96


def test_image_size_native_takes_each_teachers_own(photographs: Path) -> None:
    teachers = ["pixels", "vit=timm:test_vit@random", "half=timm:test_resnet@random:size=64"]
    ranking = tokdiv.rank(photographs, teachers, image_size="native", **TINY)
    assert ranking["pixels"].spec.size == 224
    assert ranking["vit"].spec.size == 160
    assert ranking["half"].spec.size == 64
    assert ranking["vit"].spec.num_tokens == 100
    same = tokdiv.rank(photographs, [f"{teachers[1]}:size=160"], **TINY)
    assert same.teachers[0].mean_similarity == pytest.approx(
        ranking["vit"].mean_similarity, abs=1e-6
    )


class Patches(nn.Module):
    """Tokens (K, C) that depend on the image, with an offset that centring takes away."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        cells = nn.functional.avg_pool2d(images, 4)  # (B, 3, 8, 8)
        return torch.cat([cells, cells.square(), torch.full_like(cells, 0.7)], dim=1)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images, two of the first 256 in the order and one behind them unusable."""
    folder = tmp_path_factory.mktemp("noisy")
    generator = np.random.default_rng(5)
    order = tokdiv.data.loader.permutation(300, 0)
    broken = {int(order[17]), int(order[101]), int(order[270])}
    for number in range(300):
        data = generator.integers(0, 256, (8, 8, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(data).resize((37, 37), Image.BICUBIC).save(file, "PNG")
        content = file.getvalue()
        (folder / f"{number:03d}.png").write_bytes(content[:100] if number in broken else content)
    return folder


def patches() -> Teacher:
    return Teacher(Patches(), size=SIZE, name="patches")


@pytest.fixture(scope="module")
def noisy_tokens(noisy: Path) -> list[np.ndarray]:
    """(64, 9) float64 of each usable image, in the order of the run."""
    source = open_source(str(noisy))
    teacher, tokens = patches(), []
    for index in tokdiv.data.loader.permutation(300, 0):
        try:
            image = tokdiv.data.loader.decode_image(source.read(int(index)))
        except tokdiv.data.loader.UnusableImage:
            continue
        view = tokdiv.data.loader.center_view(image, SIZE)
        tokens.append(teacher(view[None])[0].double().numpy())
    assert len(tokens) == 297
    return tokens


@pytest.mark.parametrize("batch_size", [7, 64, 500])
def test_centred_similarity_is_of_the_images_after_the_first_256_usable(
    noisy: Path, noisy_tokens: list[np.ndarray], batch_size: int
) -> None:
    settings = dict(batch_size=batch_size, image_size=32, certify="none", **TINY)
    ranking = tokdiv.rank(noisy, [patches(), "pixels"], **settings)
    found = ranking["patches"]
    mean_token = np.mean(noisy_tokens[:256], axis=(0, 1))
    centred = np.mean([naive_similarity(t - mean_token) for t in noisy_tokens[256:]])
    assert found.centred_similarity == pytest.approx(centred, abs=1e-6)
    plain = np.mean([naive_similarity(t) for t in noisy_tokens])
    assert found.mean_similarity == pytest.approx(plain, abs=1e-6)
    assert abs(plain - centred) > 0.1
    pooled = []
    for tokens in noisy_tokens:
        plane = torch.from_numpy(tokens).T.reshape(1, -1, 8, 8)
        seven = nn.functional.adaptive_avg_pool2d(plane, 7)[0].flatten(1).T.numpy()
        pooled.append(naive_similarity(seven))
    assert found.similarity_7x7 == pytest.approx(np.mean(pooled), abs=1e-6)
    assert ranking["pixels"].similarity_7x7 is None  # a grid of 2 x 2


def test_centred_similarity_is_null_where_no_image_is_left_for_it(noisy: Path) -> None:
    few = tokdiv.rank(noisy, [patches()], max_images=258, batch_size=64, **TINY)
    assert few.teachers[0].images == 256
    assert few.teachers[0].centred_similarity is None
    one_more = tokdiv.rank(noisy, [patches()], max_images=259, batch_size=64, **TINY)
    assert one_more.teachers[0].centred_similarity is not None


def test_the_arguments_of_rank_are_the_settings() -> None:
    parameters = inspect.signature(tokdiv.rank).parameters
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    own = {"data", "teachers", "out", "resume", "report"}
    assert parameters.keys() == own | fields.keys()
    assert {name: parameters[name].default for name in fields} == {
        name: field.default for name, field in fields.items()
    }
    hints = typing.get_type_hints(Settings)
    assert {n: parameters[n].annotation for n in fields} == {n: hints[n] for n in fields}


class TestOrder:
    columns = similarities(COUNT, 0.2, 0.3, 0.33, 0.45)

    def teachers(self) -> list[Teacher]:
        return [coded_teacher(name, c) for name, c in zip("dbac", self.columns)]

    def expected_end(self, numbers: np.ndarray) -> int:
        scores = np.stack(self.columns, axis=1)[numbers]
        for look in look_schedule(COUNT):
            certificate = certify_order(scores[:look], COUNT, 0.01, 0.002, -1.0, 1.0)
            if certificate.certified:
                return int(look)
        raise AssertionError("the example is not certified at all")

    def test_looks_are_geometric_from_64_by_a_tenth_at_most(self) -> None:
        looks = look_schedule(COUNT)
        assert looks[0] == 64 and looks[-1] == COUNT
        assert (looks[1:] / looks[:-1]).max() <= 1.1

    @pytest.mark.parametrize("batch_size", [5, 64, 1000])
    def test_order_stops_at_the_first_look_that_settles_all_pairs(
        self, coded: Path, numbers: np.ndarray, batch_size: int, tmp_path: Path
    ) -> None:
        out = tmp_path / "RUN"
        ranking = tokdiv.rank(coded, self.teachers(), out, batch_size=batch_size, **TINY)
        end = self.expected_end(numbers)
        assert 64 <= end < COUNT
        assert ranking.certified and ranking.data["images"] == end
        assert [t.name for t in ranking.teachers] == list("dbac")
        assert [t.images for t in ranking.teachers] == [end] * 4
        table = pd.read_parquet(out / "scores.parquet")
        assert table["position"].tolist() == list(range(end))
        for name, column in zip("dbac", self.columns):
            np.testing.assert_allclose(table[name], column[numbers[:end]], atol=1e-6)
            mean = column[numbers[:end]].astype(np.float64).mean()
            assert ranking[name].mean_similarity == pytest.approx(mean, abs=1e-6)
            assert ranking[name].diversity == pytest.approx(1 - mean, abs=1e-6)
            assert ranking[name].ci_low < column.mean() < ranking[name].ci_high

    def test_the_order_is_that_of_all_images(self, coded: Path) -> None:
        early = tokdiv.rank(coded, self.teachers(), **TINY)
        full = tokdiv.rank(coded, self.teachers(), certify="none", **TINY)
        assert full.data["images"] == COUNT
        assert [t.name for t in early.teachers] == [t.name for t in full.teachers]
        for teacher, column in zip(full.teachers, self.columns):
            assert teacher.ci_low == pytest.approx(column.mean(), abs=1e-6)  # all is known
            assert teacher.ci_high == pytest.approx(column.mean(), abs=1e-6)

    def test_another_seed_is_another_sample(self, coded: Path, tmp_path: Path) -> None:
        out = tmp_path / "RUN"
        tokdiv.rank(coded, self.teachers(), out, seed=7, max_images=70, **TINY)
        found = numbers_in_order(coded, seed=7)
        keys = pd.read_parquet(out / "scores.parquet")["key"]
        assert [int(Path(k).stem[-4:]) for k in keys] == found[:70].tolist()

    def test_max_images_says_which_pairs_are_open_and_how_much_it_would_take(
        self, coded: Path
    ) -> None:
        ranking = tokdiv.rank(coded, self.teachers(), max_images=64, **TINY)
        assert not ranking.certified
        remarks = " ".join(ranking.remarks())
        assert "Not decided within 64 images: b before a, gap 0.0" in remarks
        assert "images more would settle it" in remarks
        pair = next(p for p in ranking.certificate.pairs if p.state == "open")
        assert pair.low < pair.gap < pair.high
        assert 0 < pair.more_images <= COUNT - 64

    def test_more_images_go_on_to_the_undisturbed_result(self, coded: Path, tmp_path: Path) -> None:
        for certify in ("order", "best"):
            grown, whole = tmp_path / f"{certify}-grown", tmp_path / f"{certify}-whole"
            for limit in (65, 100, 255, 300, None):
                teachers = self.teachers()
                tokdiv.rank(
                    coded, teachers, grown, certify=certify, max_images=limit, batch_size=50, **TINY
                )
            tokdiv.rank(coded, self.teachers(), whole, certify=certify, **TINY)
            first, second = (read_json(out / "ranking.json") for out in (grown, whole))
            assert first["settings"].pop("batch_size") != second["settings"].pop("batch_size")
            assert first == second
            pd.testing.assert_frame_equal(
                pd.read_parquet(grown / "scores.parquet"), pd.read_parquet(whole / "scores.parquet")
            )


class TestBest:
    def test_losers_are_dropped_and_cost_no_more(
        self, coded: Path, numbers: np.ndarray, tmp_path: Path
    ) -> None:
        columns = similarities(COUNT, 0.30, 0.32, 0.6, 0.7)
        teachers = [coded_teacher(name, c) for name, c in zip("abcd", columns)]
        out = tmp_path / "RUN"
        ranking = tokdiv.rank(coded, teachers, out, certify="best", batch_size=64, **TINY)
        assert ranking.best_name == "a" and ranking.best_certified
        assert [t.name for t in ranking.teachers] == list("abcd")
        images = {t.name: t.images for t in ranking.teachers}
        assert images["c"] == images["d"] == 64 < images["a"] == images["b"]
        table = pq.read_table(out / "scores.parquet")
        assert table.column("c").null_count == images["a"] - 64
        assert table.column("a").null_count == 0
        assert table.column("c").to_pylist()[64:] == [None] * (images["a"] - 64)
        passes = {t.name: len(t.module.seen) for t in teachers}
        assert passes["c"] == 64  # the batch that held the look, no more
        assert passes["a"] >= images["a"]

    def test_it_ends_at_the_same_image_for_any_batch_size(self, coded: Path) -> None:
        columns = similarities(COUNT, 0.3, 0.305, 0.33, 0.5, sd=0.03)
        results = []
        for batch_size in (5, 64, 700):
            teachers = [coded_teacher(name, c) for name, c in zip("abcd", columns)]
            ranking = tokdiv.rank(coded, teachers, certify="best", batch_size=batch_size, **TINY)
            results.append({t.name: t.images for t in ranking.teachers})
        assert results[0] == results[1] == results[2]
        assert results[0]["d"] < results[0]["c"] < results[0]["b"] == results[0]["a"]

    def test_equal_teachers_are_co_winners_and_the_run_ends(self, coded: Path) -> None:
        low, high = similarities(COUNT, 0.3, 0.5)
        teachers = [coded_teacher(n, c) for n, c in (("x", low), ("y", low.copy()), ("z", high))]
        ranking = tokdiv.rank(coded, teachers, certify="best", tie=0.05, **TINY)
        assert ranking.best_name in ("x", "y")
        assert {ranking.best_name, *ranking.co_winners} == {"x", "y"}
        assert ranking.data["images"] < COUNT
        assert ranking.teachers[-1].name == "z"
        assert any("tied with" in remark for remark in ranking.remarks())

    def test_a_teacher_beaten_by_way_of_a_dropped_one_does_not_hold_up_the_end(
        self, coded: Path, numbers: np.ndarray
    ) -> None:
        """b drops c at a moment at which a is not yet comparable to either; then a drops b."""
        a, b, c = np.full(COUNT, 0.0), np.full(COUNT, 0.3), np.full(COUNT, 0.45)
        a[numbers[:120]] = 0.35
        teachers = [coded_teacher(n, x) for n, x in (("a", a), ("b", b), ("c", c))]
        ranking = tokdiv.rank(coded, teachers, certify="best", **TINY)
        images = {t.name: t.images for t in ranking.teachers}
        assert images["c"] < images["b"] <= images["a"] < COUNT
        states = {frozenset((p.first, p.second)): p.state for p in ranking.certificate.pairs}
        assert states[frozenset("ac")] == "open"  # never compared again
        assert ranking.best_name == "a" and ranking.best_certified
        assert not any("Not decided" in remark for remark in ranking.remarks())

    def test_a_baseline_is_dropped_by_a_winner_but_never_wins(self, coded: Path) -> None:
        trained, other = similarities(COUNT, 0.3, 0.5)
        teachers = [coded_teacher("a", trained), coded_teacher("b", other), "pixels"]
        ranking = tokdiv.rank(coded, teachers, certify="best", image_size=SIZE, **TINY)
        assert ranking.best_name == "a"  # pixels of one color: similarity 1
        assert ranking["pixels"].rank == 3 and ranking["pixels"].mean_similarity == pytest.approx(1)


def test_none_measures_every_image(coded: Path) -> None:
    low, high = similarities(COUNT, 0.1, 0.8)
    teachers = [coded_teacher("low", low), coded_teacher("high", high)]
    ranking = tokdiv.rank(coded, teachers, certify="none", **TINY)
    assert [t.images for t in ranking.teachers] == [COUNT, COUNT]
    assert ranking.certified


def test_one_teacher_alone_is_measured_with_an_interval(coded: Path) -> None:
    (column,) = similarities(COUNT, 0.4)
    for certify in ("order", "best"):
        ranking = tokdiv.rank(
            coded, [coded_teacher("a", column)], certify=certify, max_images=500, **TINY
        )
        assert ranking.teachers[0].images == 500
        assert ranking.teachers[0].ci_low < 0.4 < ranking.teachers[0].ci_high
        assert not ranking.certified
        assert any("nothing to order" in remark for remark in ranking.remarks())


def test_equal_teachers_are_a_tie_and_the_run_ends(coded: Path) -> None:
    (column,) = similarities(COUNT, 0.4)
    teachers = [coded_teacher("one", column), coded_teacher("two", column.copy())]
    ranking = tokdiv.rank(coded, teachers, tie=0.05, **TINY)
    assert [p.state for p in ranking.certificate.pairs] == ["tie"]
    assert ranking.certified and ranking.data["images"] < COUNT


def test_a_baseline_above_the_winner_is_said_and_wins_only_if_allowed(coded: Path) -> None:
    (column,) = similarities(COUNT, 0.9)
    other = coded_teacher("trained", column)
    noise = coded_teacher("noise", similarities(COUNT, 0.1)[0])
    noise.spec = dataclasses.replace(noise.spec, baseline=True)
    ranking = tokdiv.rank(coded, [other, noise], **TINY)
    assert [t.name for t in ranking.teachers] == ["noise", "trained"]
    assert ranking.best_name == "trained"
    assert any("noise stands above the winner" in remark for remark in ranking.remarks())
    lifted = tokdiv.rank(coded, [other, noise], allow_baselines=True, **TINY)
    assert lifted.best_name == "noise"


class TestJoining:
    columns = similarities(COUNT, 0.2, 0.3, 0.45, 0.33)

    @pytest.mark.parametrize("certify", ["order", "best", "none"])
    @pytest.mark.parametrize("place", [0, 2])
    def test_a_teacher_that_joins_is_measured_alone_on_the_same_images(
        self, coded: Path, tmp_path: Path, certify: str, place: int
    ) -> None:
        out = tmp_path / "RUN"
        limit = 300 if certify == "none" else None
        settings = dict(certify=certify, batch_size=50, max_images=limit, **TINY)

        def three(join: bool) -> list[Teacher]:
            made = [coded_teacher(n, c) for n, c in zip("ab", self.columns)]
            if join:
                made.insert(place, coded_teacher("c", self.columns[2]))
            return made

        before = tokdiv.rank(coded, three(False), out, **settings)
        teachers = three(True)
        after = tokdiv.rank(coded, teachers, out, **settings)
        passes = {t.name: len(t.module.seen) for t in teachers}
        assert passes["c"] > 0
        assert after["c"].images > 0 and not math.isnan(after["c"].mean_similarity)
        more = after.data["images"] - before.data["images"]
        assert passes["a"] <= more + 50 and passes["b"] <= more + 50
        if certify == "none":
            assert passes == {"a": 0, "b": 0, "c": 300}
        assert [t.name for t in after.teachers] == ["a", "b", "c"]
        together = tokdiv.rank(coded, three(True), **settings)
        if certify != "best":  # where c would have been dropped sooner
            assert after.data["images"] == max(before.data["images"], together.data["images"])
        if certify != "best" and after.data["images"] == together.data["images"]:
            pd.testing.assert_frame_equal(after.table, together.table)

    def test_the_mean_token_is_of_the_same_images_where_a_run_ended_before_it_was_whole(
        self, coded: Path, tmp_path: Path
    ) -> None:
        """Two far apart end at 64 images; a close third makes it go on past the first 256."""
        out = tmp_path / "RUN"
        far, near = similarities(COUNT, 0.2, 0.6)
        third = np.clip(near + similarities(COUNT, 0.01, sd=0.05, seed=9)[0], -0.99, 0.99)

        def some(count: int) -> list[Teacher]:
            made = zip(("far", "near", "third"), (far, near, third))
            return [coded_teacher(name, column) for name, column in made][:count]

        settings = dict(batch_size=500, **TINY)
        assert tokdiv.rank(coded, some(2), out, **settings).data["images"] == 64
        grown = tokdiv.rank(coded, some(3), out, **settings)
        assert grown.data["images"] > 256
        together = tokdiv.rank(coded, some(3), **settings)
        pd.testing.assert_frame_equal(grown.table, together.table)


class TestBadTeachers:
    def test_nan_names_the_teacher_and_the_image_and_keeps_what_was_measured(
        self, coded: Path, numbers: np.ndarray, tmp_path: Path
    ) -> None:
        out = tmp_path / "RUN"
        columns = similarities(COUNT, 0.3, 0.301)
        bad = int(numbers[200])

        def pair(spoiled: list[int]) -> list[Teacher]:
            return [
                coded_teacher("good", columns[0]),
                coded_teacher("bad", columns[1], spoiled=spoiled),
            ]

        with pytest.raises(RunError, match=f"bad gives NaN .* '.*{bad:04d}.png'"):
            tokdiv.rank(coded, pair([bad, int(numbers[210])]), out, batch_size=64, **TINY)
        (chunk,) = (out / "state").glob("scores-*.parquet")
        stored = pq.read_table(chunk)
        assert len(stored) == 200
        assert stored.column("bad").null_count == 0
        with pytest.raises(UsageError, match="bad: sha256"):
            tokdiv.rank(coded, pair([]), out, batch_size=64, **TINY)

    def test_nan_behind_the_end_of_the_run_does_not_matter_for_any_batch_size(
        self, coded: Path, numbers: np.ndarray
    ) -> None:
        low, high = similarities(COUNT, 0.2, 0.8)
        for batch_size in (64, 1000):
            teachers = [
                coded_teacher("low", low),
                coded_teacher("high", high, spoiled=[int(numbers[100])]),
            ]
            ranking = tokdiv.rank(coded, teachers, batch_size=batch_size, **TINY)
            assert ranking.data["images"] == 64

    def test_nan_of_a_teacher_that_is_out_does_not_matter_for_any_batch_size(
        self, coded: Path, numbers: np.ndarray
    ) -> None:
        columns = similarities(COUNT, 0.3, 0.31, 0.8)
        results = []
        for batch_size in (64, 100, 1000):
            spoiled = [int(numbers[70])]
            teachers = [coded_teacher(n, c) for n, c in zip("ab", columns)]
            teachers.append(coded_teacher("c", columns[2], spoiled=spoiled))
            ranking = tokdiv.rank(coded, teachers, certify="best", batch_size=batch_size, **TINY)
            results.append({t.name: t.images for t in ranking.teachers})
        assert results[0]["c"] == 64 < results[0]["a"]
        assert results[0] == results[1] == results[2]

    def test_one_token_has_no_similarity(self, coded: Path) -> None:
        with pytest.raises(UsageError, match=r"K = 1 .*needs two"):
            tokdiv.rank(coded, ["timm:test_resnet@random", "pixels"], image_size=32, **TINY)

    def test_no_usable_image_is_a_failure(self, tmp_path: Path) -> None:
        coded_tar(tmp_path / "bad.tar", 5, broken=range(5))
        with pytest.raises(RunError, match="none of the 5 images"):
            tokdiv.rank(tmp_path / "bad.tar", ["pixels", "hog"], image_size=32, **TINY)


def test_scores_of_teachers_that_were_dropped_meanwhile_are_not_entered(
    coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU launches the next step before it hears that a teacher was dropped."""
    take = Judge.take

    def with_late_scores(judge: Judge, shares: list[Share], plan: Plan) -> Verdict:
        for share in shares:
            late = np.isnan(share.scores).all(axis=(0, 2))
            share.scores[:, late, 0] = 0.9
        return take(judge, shares, plan)

    monkeypatch.setattr(Judge, "take", with_late_scores)
    columns = similarities(COUNT, 0.30, 0.32, 0.9)
    teachers = [coded_teacher(n, c) for n, c in zip("abc", columns)]
    ranking = tokdiv.rank(coded, teachers, tmp_path / "RUN", certify="best", **TINY)
    assert ranking.best_name == "a" and ranking["c"].images == 64
    scores = pd.read_parquet(tmp_path / "RUN" / "scores.parquet")
    assert scores["c"].notna().sum() == 64 < len(scores)
    pairs = {frozenset((p.first, p.second)): p for p in ranking.certificate.pairs}
    assert pairs[frozenset("ac")].images == pairs[frozenset("bc")].images == 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_measures_what_the_cpu_does(coded: Path) -> None:
    columns = similarities(COUNT, 0.30, 0.32, 0.9)
    rankings = []
    for device in ("cpu", "cuda"):
        teachers = [coded_teacher(n, c) for n, c in zip("abc", columns)]
        for teacher in teachers:
            teacher.module.to(device)
        settings = TINY | {"device": device}
        rankings.append(tokdiv.rank(coded, teachers, certify="best", **settings))
    assert [t.images for t in rankings[0].teachers] == [t.images for t in rankings[1].teachers]


def test_an_image_is_decoded_once_for_all_teachers(
    coded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = tokdiv.data.loader.decode_image
    monkeypatch.setattr(
        tokdiv.data.loader, "decode_image", lambda data: (decoded.append(1), decode(data))[1]
    )
    teachers = ["pixels", "hog", "other=pixels:size=48", "timm:test_vit@random"]
    tokdiv.rank(coded, teachers, certify="none", max_images=70, image_size=32, **TINY)
    assert len(decoded) == 70


def test_coded_images_are_read_back() -> None:
    """The oracle's own check."""
    teacher = coded_teacher("a", np.linspace(-1, 1, 4096))
    for number in (0, 1, 15, 16, 255, 256, 4095):
        view = tokdiv.data.loader.center_view(
            tokdiv.data.loader.decode_image(coded_image(number)), SIZE
        )
        teacher(view[None])
    assert teacher.module.seen == [0, 1, 15, 16, 255, 256, 4095]
