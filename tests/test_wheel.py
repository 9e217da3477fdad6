"""The wheel: the packages with all the files they read, and none of the tests."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files() -> set[str]:
    """The paths that the builder would pack; nothing is built."""
    wheel = pytest.importorskip("hatchling.builders.wheel")
    builder = wheel.WheelBuilder(str(ROOT))
    return {Path(file.distribution_path).as_posix() for file in builder.recurse_included_files()}


def in_the_tree(pattern: str) -> set[str]:
    found = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
    assert found, pattern
    return found


@pytest.mark.parametrize(
    "pattern",
    [
        "tokdiv/**/*.py",
        "img2vec/**/*.py",
        "*/py.typed",
        "tokdiv/report/templates/*.html",
        "img2vec/templates/*.html",
        "tokdiv/samples/LICENSES.md",
        "tokdiv/samples/images/*.jpg",
        "tokdiv/samples/teachers/*.safetensors",
        "tokdiv/samples/teachers/*.md",  # LICENSE.md and a card each
    ],
)
def test_all_that_the_packages_read_is_packed(files: set[str], pattern: str) -> None:
    assert in_the_tree(pattern) <= files


def test_sample_teachers_come_with_their_cards_and_their_license(files: set[str]) -> None:
    folder = "tokdiv/samples/teachers/"
    weights = {name for name in files if name.endswith(".safetensors")}
    assert len(weights) == 3
    for name in weights:
        assert name.startswith(folder) and name.replace(".safetensors", ".md") in files
    assert folder + "LICENSE.md" in files


def test_nothing_else_is_packed(files: set[str]) -> None:
    assert {name.partition("/")[0] for name in files} == {"tokdiv", "img2vec"}
    assert not [name for name in files if "__pycache__" in name]
