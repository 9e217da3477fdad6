"""Similarity maps: the right query, the right cosines, and one line for what cannot be drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokdiv
import tokdiv.maps
from tokdiv.data.loader import center_view, decode_image
from tokdiv.errors import RunError, UsageError
from tokdiv.maps import draw_maps

TEACHERS = ["pixels", "timm:test_vit@random", "fine=pixels:size=128"]


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = []
    for number, shape in enumerate([(80, 64, 3), (64, 64, 3)]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(generator.integers(0, 256, shape, np.uint8)).save(path)
        paths.append(path)
    return paths


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is handed to the figure."""
    given: dict[str, Any] = {}
    figure = tokdiv.maps.maps_figure

    def record(*arguments: Any) -> Any:
        names = ("views", "names", "maps", "rectangles", "tokens", "scores")
        given.update(zip(names, arguments, strict=True))
        return figure(*arguments)

    monkeypatch.setattr(tokdiv.maps, "maps_figure", record)
    return given


def test_a_picture_is_written_with_a_row_an_image(images: list[Path], tmp_path: Path) -> None:
    for suffix in ("png", "svg", "pdf"):
        out = tmp_path / f"maps.{suffix}"
        draw_maps(images, TEACHERS, out, image_size=64, dtype="float32", device="cpu")
        assert out.stat().st_size > 1000
    with Image.open(tmp_path / "maps.png") as picture:
        assert min(picture.size) > 200


@pytest.mark.parametrize(
    ("query", "cell", "fine"),
    [
        (None, (2, 2), (4, 4)),
        ((0.0, 0.0), (0, 0), (0, 0)),
        ((1.0, 1.0), (3, 3), (7, 7)),
        ((0.3, 0.8), (1, 3), (2, 6)),
        ((0, 0), (0, 0), (0, 0)),
        ((1, 1), (0, 0), (1, 1)),
        ((7, 2), (3, 1), (7, 2)),
    ],
)
def test_cosines_are_those_to_the_query_token(
    images: list[Path],
    tmp_path: Path,
    drawn: dict[str, Any],
    query: tuple[float, float] | None,
    cell: tuple[int, int],
    fine: tuple[int, int],
) -> None:
    draw_maps(
        images,
        TEACHERS,
        tmp_path / "o.png",
        query=query,
        image_size=64,
        dtype="float32",
        device="cpu",
    )
    assert drawn["names"] == ["pixels", "timm:test_vit@random", "fine"]
    assert drawn["tokens"][0] == [cell, cell, fine]
    for row, path in enumerate(images):
        for column, spec in enumerate(TEACHERS):
            teacher = tokdiv.load_teacher(spec, image_size=64)
            view = center_view(decode_image(path.read_bytes()), teacher.size)
            tokens = teacher(view[None])[0].double()
            place = drawn["tokens"][row][column]
            chosen = tokens[place[0] * teacher.grid[1] + place[1]]
            expected = torch.nn.functional.cosine_similarity(tokens, chosen[None], dim=1)
            np.testing.assert_allclose(
                drawn["maps"][row][column], expected.view(teacher.grid), atol=1e-5
            )
            assert drawn["maps"][row][column][place] == pytest.approx(1)
            score = tokdiv.token_similarity(tokens[None])[0]
            assert drawn["scores"][row][column] == pytest.approx(float(score), abs=1e-5)
    top, left = fine[0] / 8, fine[1] / 8
    assert drawn["rectangles"][0] == pytest.approx((top, left, top + 1 / 8, left + 1 / 8))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("text.jpg", b"no picture", "text.jpg' is no usable image"),
        ("gone.png", None, "gone.png': No such file"),
    ],
)
def test_an_unreadable_image_is_named(
    images: list[Path], tmp_path: Path, name: str, data: bytes | None, said: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=said):
        draw_maps([*images, tmp_path / name], ["pixels"], tmp_path / "o.png", image_size=64)
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    ("out", "said"), [("maps.jpg", "ends in .png"), ("no/where.png", "there is no folder")]
)
def test_a_picture_that_cannot_be_written_is_a_mistake(
    images: list[Path], tmp_path: Path, out: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        draw_maps(images, ["pixels"], tmp_path / out, image_size=64)


def test_a_query_outside_of_the_finest_grid_is_a_mistake(
    images: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"--query 8,0: the finest grid has 8 x 8 patches"):
        draw_maps(images, TEACHERS, tmp_path / "o.png", query=(8, 0), image_size=64)


def test_a_teacher_of_nan_is_named_with_the_image(images: list[Path], tmp_path: Path) -> None:
    teacher = tokdiv.load_teacher("broken=timm:test_vit@random", image_size=64)
    next(teacher.module.parameters()).fill_(np.nan)
    with pytest.raises(RunError, match=r"broken gives NaN tokens for '.*0.png'"):
        draw_maps(images, ["pixels", teacher], tmp_path / "o.png", image_size=64)
    assert not (tmp_path / "o.png").exists()


def test_one_token_has_no_other_to_compare(images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"K = 1 token at 32 px"):
        draw_maps(images, ["timm:test_resnet@random"], tmp_path / "o.png", image_size=32)
