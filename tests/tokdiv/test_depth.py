"""Depth curves: each block's value is the one that `rank` gives for `:blocks=N`."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fakes import coded_tar, coded_teacher, similarities
from PIL import Image

import tokdiv
from tokdiv.depth import measure_depth
from tokdiv.errors import RunError, UsageError

TINY = {"workers": 2, "dtype": "float32", "device": "cpu", "image_size": 64}
COUNT = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        cells = generator.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(cells).resize((73, 80)).save(folder / f"{number:02d}.png")
    (folder / "text.jpg").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    out = tmp_path_factory.mktemp("depth") / "RUN"
    specs = ["vit=timm:test_vit@random", "resnet=timm:test_resnet@random", "pixels"]
    return out, measure_depth(str(images), specs, out, batch_size=8, **TINY)


def value(table: pd.DataFrame, teacher: str, block: int, norm: bool = False) -> float:
    rows = table[
        (table["teacher"] == teacher) & (table["block"] == block) & (table["norm"] == norm)
    ]
    assert len(rows) == 1
    return float(rows["mean_similarity"].iloc[0])


def ranked(images: Path, *specs: str) -> tokdiv.Ranking:
    return tokdiv.rank(images, specs, certify="none", **TINY)


def test_the_last_block_is_what_rank_gives(images: Path, run: tuple[Path, pd.DataFrame]) -> None:
    table = run[1]
    ranking = ranked(images, "vit=timm:test_vit@random", "resnet=timm:test_resnet@random", "pixels")
    last = int(table[table["teacher"] == "vit"]["block"].max())
    assert value(table, "vit", last, norm=True) == pytest.approx(
        ranking["vit"].mean_similarity, abs=1e-5
    )
    last = int(table[table["teacher"] == "resnet"]["block"].max())
    assert value(table, "resnet", last) == pytest.approx(
        ranking["resnet"].mean_similarity, abs=1e-5
    )
    assert value(table, "pixels", 0) == pytest.approx(ranking["pixels"].mean_similarity, abs=1e-6)


@pytest.mark.parametrize(("teacher", "blocks"), [("vit", (0, 2)), ("resnet", (0, 2))])
def test_every_block_is_what_rank_gives_for_it(
    images: Path, run: tuple[Path, pd.DataFrame], teacher: str, blocks: tuple[int, ...]
) -> None:
    specs = [f"b{n}=timm:test_{teacher}@random:blocks={n}" for n in blocks]
    ranking = ranked(images, *specs)
    for block in blocks:
        found = ranking[f"b{block}"]
        assert value(run[1], teacher, block) == pytest.approx(found.mean_similarity, abs=1e-5)
        row = run[1][(run[1]["teacher"] == teacher) & (run[1]["block"] == block)].iloc[0]
        assert (row["num_tokens"], row["dim"]) == (found.spec.num_tokens, found.spec.dim)


def test_intervals_hold_the_mean_and_count_usable_images(run: tuple[Path, pd.DataFrame]) -> None:
    table = run[1]
    assert (table["images"] == COUNT).all()
    assert (table["ci_low"] <= table["mean_similarity"]).all()
    assert (table["mean_similarity"] <= table["ci_high"]).all()


def test_a_norm_of_feature_maps_is_applied_as_the_network_does(
    images: Path, tmp_path: Path
) -> None:
    spec = "timm:resnetv2_50@random"
    table = measure_depth(str(images), [f"r={spec}"], tmp_path, max_images=4, **TINY)
    ranking = tokdiv.rank(images, [f"r={spec}"], certify="none", max_images=4, **TINY)
    expected = ranking["r"].mean_similarity
    assert value(table, "r", 4, norm=True) == pytest.approx(expected, abs=1e-5)
    assert value(table, "r", 4) != pytest.approx(expected, abs=1e-3)


def test_unusable_images_are_listed(run: tuple[Path, pd.DataFrame]) -> None:
    lines = (run[0] / "skipped.csv").read_text().splitlines()
    assert lines[0] == "key,reason" and len(lines) == 2 and lines[1].startswith("text.jpg,")


def test_a_teacher_of_nan_is_named_with_the_image(images: Path, tmp_path: Path) -> None:
    teacher = tokdiv.load_teacher("broken=timm:test_vit@random", image_size=64)
    next(teacher.module.blocks[1].parameters()).fill_(np.nan)
    with pytest.raises(RunError, match=r"broken gives NaN tokens at block 1 for '\d\d.png'"):
        measure_depth(str(images), [teacher], tmp_path, **TINY)


def test_files_hold_the_table(run: tuple[Path, pd.DataFrame]) -> None:
    out, table = run
    pd.testing.assert_frame_equal(pd.read_csv(out / "depth.csv"), table, check_dtype=False)
    content = json.loads((out / "depth.json").read_text())
    assert len(content["blocks"]) == len(table)
    assert [t["name"] for t in content["teachers"]] == ["vit", "resnet", "pixels"]
    with Image.open(out / "depth.png") as picture:
        assert min(picture.size) > 200


def test_a_spec_that_names_a_block_ends_there(images: Path, tmp_path: Path) -> None:
    table = measure_depth(
        str(images), ["timm:test_vit@random:blocks=1"], tmp_path, max_images=8, **TINY
    )
    assert table["block"].tolist() == [0, 1]
    assert not table["norm"].any()


def test_mistakes_are_said(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"give a(nother)? folder"):
            measure_depth(str(images), ["pixels"], out, **TINY)
    with pytest.raises(UsageError, match=r"one token|K = 1"):
        measure_depth(
            str(images), ["timm:test_resnet@random"], tmp_path, **TINY | {"image_size": 32}
        )
    own = coded_teacher("own", similarities(5, 0.5)[0])
    with pytest.raises(UsageError, match="blocks of a module of your own are unknown"):
        measure_depth(str(images), [own], tmp_path / "own", **TINY)
    for name in ("max_images", "batch_size", "workers"):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} 0: expected"):
            measure_depth(str(images), ["pixels"], tmp_path / "zero", **TINY | {name: 0})


def test_no_usable_image_is_a_failure(tmp_path: Path) -> None:
    data = coded_tar(tmp_path / "bad.tar", 3, broken=range(3))
    with pytest.raises(RunError, match="none of the 3 images"):
        measure_depth(str(data), ["pixels"], tmp_path / "RUN", **TINY)
