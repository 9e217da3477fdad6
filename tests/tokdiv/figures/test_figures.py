"""What the figures show, checked on their artists; how they look was judged by eye."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation, Text
from numpy.typing import ArrayLike
from PIL import Image

from tokdiv.errors import RunError, UsageError
from tokdiv.figures.depth import depth_figure
from tokdiv.figures.diversity_accuracy import diversity_accuracy_figure
from tokdiv.figures.evidence import evidence_figure
from tokdiv.figures.maps import maps_figure
from tokdiv.figures.similarity import _densities, similarity_figure
from tokdiv.figures.style import fit_name, save_figure, teacher_colors

ROOT = Path(__file__).resolve().parents[3]
SAMPLES = ROOT / "tokdiv" / "samples"
NAMES = ["mae_vit_base", "dino_resnet50", "pixels"]
LONG_NAMES = [
    "bird=timm:mobilenetv2_100@weights/of/mine.safetensors:pad_type=same",
    "timm:vit_large_patch14_reg4_dinov2.lvd142m_with_registers_448",
    "y" * 60,
    "price_in_$_and_$",
]


def texts_of(figure: Figure) -> str:
    figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in figure.findobj(Text) if text.get_visible())


def scores(means: list[float], num_images: int = 200) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(means, 0.05, (num_images, len(means)))


def drawn_similarity(names: list[str], values: np.ndarray, **options: object) -> Figure:
    means = np.nanmean(values, axis=0)
    baselines = [name == "pixels" for name in names]
    return similarity_figure(names, values, means - 0.01, means + 0.01, baselines, **options)


def drawn_evidence(
    images: ArrayLike,
    evidence: ArrayLike,
    labels: list[str],
    threshold: float,
    tied: list[bool] | None = None,
    colors: dict[str, str] | None = None,
    **options: Any,
) -> Figure:
    tied = tied or [False] * len(labels)
    return evidence_figure(images, evidence, labels, tied, threshold, colors or {}, **options)


def row_labels(figure: Figure) -> list[str]:
    figure.draw_without_rendering()
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def inside_canvas(figure: Figure) -> bool:
    """Whether all that is drawn, labels of points included, lies within the figure."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    boxes = [figure.get_tightbbox(renderer).transformed(figure.dpi_scale_trans)]
    for annotation in figure.findobj(Annotation):
        if annotation.get_text():
            boxes.append(Text.get_window_extent(annotation, renderer))
    return all(
        box.x0 > -2 and box.y0 > -2 and box.x1 < figure.bbox.x1 + 2 and box.y1 < figure.bbox.y1 + 2
        for box in boxes
    )


def maps_input(num_images: int, grids: list[int]) -> dict[str, object]:
    rng = np.random.default_rng(1)
    return {
        "views": [rng.integers(0, 256, (28, 28, 3), dtype=np.uint8) for _ in range(num_images)],
        "maps": [[rng.uniform(-0.3, 1, (g, g)) for g in grids] for _ in range(num_images)],
        "queries": [(7 / 14, 7 / 14, 8 / 14, 8 / 14)] * num_images,
        "tokens": [[(g // 2, g // 2) for g in grids]] * num_images,
        "similarities": rng.uniform(0.1, 0.9, (num_images, len(grids))),
    }


def test_drawing_never_imports_pyplot_and_leaves_global_settings_alone(tmp_path: Path) -> None:
    code = """
import sys, numpy
from matplotlib import rcParams
names = [name for name in rcParams if name != "backend"]  # to read it imports pyplot
before = [rcParams[name] for name in names]
from tokdiv.figures import depth, diversity_accuracy, evidence, maps
from tokdiv.figures.similarity import similarity_figure
from tokdiv.figures.style import save_figure
figure = similarity_figure(["a"], numpy.ones((3, 1)), [1.0], [1.0], [False])
save_figure(figure, sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
assert "torch" not in sys.modules
assert [rcParams[name] for name in names] == before
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class TestColors:
    def test_do_not_depend_on_the_order_of_the_names(self) -> None:
        assert teacher_colors(NAMES) == teacher_colors(NAMES[::-1])

    def test_of_28_teachers_are_distinct(self) -> None:
        colors = teacher_colors([f"teacher {i}" for i in range(28)])
        assert len(set(colors.values())) == 28

    def test_given_are_used_in_every_figure(self) -> None:
        colors = {"a": "#123456", "b": "#654321"}
        values = scores([0.4, 0.5])
        figures = [
            similarity_figure(["a", "b"], values, [0.3, 0.4], [0.5, 0.6], [0, 0], colors=colors),
            depth_figure({name: ([0.1], [0.1], [0.1]) for name in "ab"}, colors=colors),
            diversity_accuracy_figure(
                pd.DataFrame({"name": ["a", "b"], "diversity": [0.1, 0.2], "accuracy": [0.5, 0.6]}),
                colors=colors,
            ),
        ]
        for figure in figures:
            faces = {line.get_markerfacecolor() for line in figure.axes[0].lines}
            assert set(colors.values()) <= faces
        maps = maps_input(1, [3, 4])
        frames = [
            axes.spines["left"].get_edgecolor()[:3]
            for axes in maps_figure(names=["a", "b"], colors=colors, **maps).axes[1:3]
        ]
        assert frames == [to_rgb("#123456"), to_rgb("#654321")]


class TestNames:
    def test_that_fit_are_kept(self) -> None:
        assert fit_name("dino_resnet50", 30) == "dino_resnet50"

    @pytest.mark.parametrize("name", LONG_NAMES)
    @pytest.mark.parametrize(("width", "lines"), [(12, 1), (15, 3), (30, 2)])
    def test_too_long_are_broken_and_elided_keeping_both_ends(
        self, name: str, width: int, lines: int
    ) -> None:
        fitted = fit_name(name, width, lines).replace("\\$", "$").split("\n")
        assert len(fitted) <= lines
        assert max(map(len, fitted)) <= width
        assert name.startswith(fitted[0].split("…")[0])
        assert name.endswith(fitted[-1].split("…")[-1])
        assert len(name) <= width * lines or "…" in "".join(fitted)

    def test_with_dollars_are_not_read_as_formulas(self) -> None:
        figure = drawn_similarity(["$\\frac{$", "b"], scores([0.2, 0.3]))
        assert "frac" in texts_of(figure)


class TestSimilarityFigure:
    def test_puts_the_most_diverse_teacher_on_top(self) -> None:
        figure = drawn_similarity(NAMES, scores([0.6, 0.4, 0.2]))
        assert row_labels(figure) == ["pixels (baseline)", "dino_resnet50", "mae_vit_base"]
        bottom, top = figure.axes[0].get_ylim()
        assert bottom > top

    def test_marks_the_winner_and_the_baselines(self) -> None:
        figure = drawn_similarity(NAMES, scores([0.6, 0.4, 0.2]), best="dino_resnet50")
        assert "★ dino_resnet50" in row_labels(figure)
        means = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
        assert [line.get_markerfacecolor() == "white" for line in means] == [True, False, False]

    def test_labels_means_and_intervals(self) -> None:
        values = np.repeat([[0.25, 0.5]], 4, axis=0)
        figure = similarity_figure(
            ["a", "b"], values, [0.2, 0.4], [0.3, 0.6], [False, False], confidence=0.99
        )
        text = texts_of(figure)
        assert "0.250  [0.200, 0.300]" in text
        assert "0.500  [0.400, 0.600]" in text
        assert "99% interval" in text
        assert "mean token similarity (lower = more diverse)" in text
        assert "token diversity = 1 - similarity" in text
        assert "4 images" in text

    def test_leaves_out_unmeasured_images(self) -> None:
        values = np.array([[0.2, 0.9, np.nan], [0.4, np.nan, np.nan]])
        none = [np.nan] * 3
        figure = similarity_figure(["half", "one", "none"], values, none, none, [False] * 3)
        text = texts_of(figure)
        assert "0.300" in text
        assert "0.900" in text
        assert "not measured" in text
        assert row_labels(figure) == ["half", "one", "none"]

    @pytest.mark.parametrize("values", [np.full((1, 2), 0.5), np.full((50, 2), 0.5)])
    def test_draws_equal_scores_and_a_single_image(
        self, values: np.ndarray, tmp_path: Path
    ) -> None:
        figure = similarity_figure(["a", "b"], values, [0.5] * 2, [0.5] * 2, [False] * 2)
        save_figure(figure, tmp_path / "figure.png")
        assert "0.500" in texts_of(figure)

    def test_draws_many_scores_as_few_points(self) -> None:
        values = np.random.default_rng(0).normal(0.5, 0.1, (200_000, 2)).astype(np.float32)
        figure = drawn_similarity(["a", "b"], values)
        axes = figure.axes[0]
        drawn = sum(len(path.vertices) for c in axes.collections for path in c.get_paths())
        assert drawn + sum(len(line.get_xdata()) for line in axes.lines) < 10_000

    def test_shows_a_density_that_peaks_where_the_scores_are(self) -> None:
        rng = np.random.default_rng(0)
        values = np.concatenate([rng.normal(0.2, 0.02, 3000), rng.normal(0.7, 0.02, 1000)])
        grid, densities, shown = _densities(values[:, None])
        density = densities[0]
        assert density is not None
        assert abs(grid[density.argmax()] - 0.2) < 0.02
        second = np.where(grid > 0.45, density, 0)
        assert abs(grid[second.argmax()] - 0.7) < 0.02
        # Equal widths, a third of the images: a third of the height.
        assert abs(second.max() - 1 / 3) < 0.05
        assert shown[0] < 0.15
        assert shown[1] > 0.75

    @pytest.mark.parametrize("width", [3.4, 6.5])
    def test_keeps_long_names_inside(self, width: float) -> None:
        figure = drawn_similarity(LONG_NAMES, scores([0.2, 0.3, 0.4, 0.5]), width=width)
        assert inside_canvas(figure)
        assert figure.axes[0].get_position().width > 0.3

    def test_refuses_arrays_that_do_not_match(self) -> None:
        with pytest.raises(ValueError, match="low has 1 entries, expected 2, one per teacher"):
            similarity_figure(["a", "b"], scores([0.2, 0.3]), [0.1], [0.2, 0.3], [0, 0])


class TestMapsFigure:
    @pytest.mark.parametrize(("num_images", "grids"), [(1, [7]), (2, [14, 7, 16])])
    def test_has_a_panel_an_image_and_teacher_on_one_scale(
        self, num_images: int, grids: list[int]
    ) -> None:
        names = [f"teacher {i}" for i in range(len(grids))]
        data = maps_input(num_images, grids)
        figure = maps_figure(names=names, **data)
        assert len(figure.axes) == num_images * (len(grids) + 1) + 1  # and the color bar
        panels = [axes for axes in figure.axes[:-1] if axes.images]
        shown = [a.images[0] for a in panels if a.images[0].get_array().ndim == 2]
        assert [image.get_array().shape for image in shown] == [(g, g) for g in grids] * num_images
        lowest = min(m.min() for row in data["maps"] for m in row)
        for image in shown:
            assert image.get_clim()[1] == 1
            assert lowest - 0.05 <= image.get_clim()[0] <= lowest
            assert image.get_interpolation() == "nearest"
        text = texts_of(figure)
        assert text.count("S(x) = ") == num_images * len(grids)
        assert f"S(x) = {data['similarities'][0, 0]:.3f}" in text
        assert "cosine similarity" in text

    def test_outlines_the_query_patch_and_each_teachers_own_token(self) -> None:
        figure = maps_figure(names=["fine", "coarse"], **maps_input(1, [14, 7]))
        boxes = [axes.findobj(Rectangle)[0].get_bbox().extents for axes in figure.axes[:3]]
        # The view is 28 pixels wide; patch 7 of 14 lies in token 3 of 7.
        assert boxes[0].tolist() == [14, 14, 16, 16]
        assert boxes[1].tolist() == [14, 14, 16, 16]
        assert boxes[2].tolist() == [12, 12, 16, 16]

    def test_outlines_the_tokens_that_it_is_told(self) -> None:
        figure = maps_figure(names=["a"], **(maps_input(1, [7]) | {"tokens": [[(0, 6)]]}))
        assert figure.axes[1].findobj(Rectangle)[0].get_bbox().extents.tolist() == [24, 0, 28, 4]

    def test_scale_starts_at_zero_where_no_cosine_is_negative(self) -> None:
        data = maps_input(1, [7])
        data["maps"] = [[np.full((7, 7), 0.8)]]
        assert maps_figure(names=["a"], **data).axes[1].images[0].get_clim() == (0, 1)

    def test_keeps_long_names_inside(self) -> None:
        assert inside_canvas(maps_figure(names=LONG_NAMES, **maps_input(2, [7, 7, 7, 7])))

    def test_refuses_lengths_that_do_not_match(self) -> None:
        data = maps_input(2, [7]) | {"queries": [(0, 0, 1, 1)]}
        with pytest.raises(ValueError, match="2 views, 2 rows of maps and 1 queries"):
            maps_figure(names=["a"], **data)


class TestDepthFigure:
    def test_marks_the_most_diverse_block(self) -> None:
        mean = np.array([0.5, 0.2, 0.4])
        figure = depth_figure({"a": (mean, mean - 0.1, mean + 0.1)})
        text = texts_of(figure)
        assert "a: 0.200 at block 1" in text
        large = [line for line in figure.axes[0].lines if line.get_markersize() == 8]
        assert [line.get_xydata().tolist() for line in large] == [[[1.0, 0.2]]]
        assert "block (zero-based)" in text

    def test_refuses_nothing_and_unequal_lengths(self) -> None:
        with pytest.raises(ValueError, match="no curve to draw"):
            depth_figure({})
        with pytest.raises(ValueError, match="a: mean, low and high have 2, 1 and 1"):
            depth_figure({"a": ([0.1, 0.2], [0.1], [0.1])})


class TestDiversityAccuracyFigure:
    def table(self, num_teachers: int) -> pd.DataFrame:
        rng = np.random.default_rng(2)
        return pd.DataFrame(
            {
                "name": [f"teacher_number_{i}" for i in range(num_teachers)],
                "diversity": rng.normal(0.5, 0.01, num_teachers),
                "accuracy": rng.normal(0.8, 0.01, num_teachers),
                "baseline": [i == 0 for i in range(num_teachers)],
            }
        )

    def test_names_every_teacher_in_the_order_of_accuracy(self) -> None:
        table = self.table(10)
        figure = diversity_accuracy_figure(table)
        assert inside_canvas(figure)
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        best_first = table.sort_values("accuracy", ascending=False)["name"]
        assert [name.removesuffix(" (baseline)") for name in names] == list(best_first)
        drawn = [line.get_xydata()[0].tolist() for line in figure.axes[0].lines]
        assert sorted(drawn) == sorted(table[["diversity", "accuracy"]].to_numpy().tolist())

    def test_marks_baselines_and_leaves_out_rows_without_values(self) -> None:
        table = self.table(3)
        table.loc[2, "accuracy"] = np.nan
        text = texts_of(diversity_accuracy_figure(table))
        assert "teacher_number_0 (baseline)" in text
        assert "teacher_number_1" in text
        assert "teacher_number_2" not in text

    def test_refuses_a_table_without_its_columns(self) -> None:
        with pytest.raises(ValueError, match="no column 'accuracy'"):
            diversity_accuracy_figure(self.table(2).drop(columns="accuracy"))


class TestEvidenceFigure:
    def test_says_when_each_pair_was_decided(self) -> None:
        images = np.array([10, 100, 1000])
        evidence = np.array([[1.0, 1.0, 0.0], [50.0, 2.0, np.inf], [900.0, 3.0, np.inf]])
        figure = drawn_evidence(images, evidence, ["a < b", "a < c", "b < c"], 20)
        text = texts_of(figure)
        assert "a < b (100 images)" in text
        assert "a < c (open)" in text
        assert "b < c (100 images)" in text
        assert "decided\nat 20" in text
        assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"

    def test_names_those_decided_last_and_counts_the_rest(self) -> None:
        images = np.arange(1, 41)
        evidence = np.exp(np.outer(np.arange(40), np.linspace(0.01, 2, 20)))
        labels = [f"pair {i}" for i in range(20)]
        text = texts_of(drawn_evidence(images, evidence, labels, 100, num_named=5))
        assert "pair 0 (open)" in text
        assert "pair 5" not in text
        assert "15 more pairs (0 open)" in text

    def test_a_tie_is_not_open(self) -> None:
        evidence = np.array([[1.0, 30.0, 2.0]])
        figure = drawn_evidence([64], evidence, list("abc"), 20, tied=[True, False, False])
        text = texts_of(figure)
        assert "a (tie)" in text and "b (64 images)" in text and "c (open)" in text
        rest = drawn_evidence(
            [64], evidence, list("abc"), 20, tied=[True, False, False], num_named=1
        )
        assert "2 more pairs (0 open)" in texts_of(rest)  # the open one is named first
        assert "c (open)" in texts_of(rest)
        ties = drawn_evidence(
            [64], evidence, list("abc"), 20, tied=[True, False, True], num_named=2
        )
        assert "1 more pair (0 open)" in texts_of(ties)  # ties before what was decided
        assert "a (tie)" in texts_of(ties) and "c (tie)" in texts_of(ties)

    def test_a_pair_has_the_colors_of_its_teachers(self) -> None:
        colors = teacher_colors(["a", "b"])
        figure = drawn_evidence([64, 70], [[1.0], [30.0]], ["a < b"], 20, colors=colors)
        lines = figure.axes[0].get_lines()
        assert lines[0].get_color() == colors["a"]
        assert lines[1].get_markerfacecolor() == colors["b"]
        # A name may hold what stands between two.
        drawn_evidence([64], [[1.0]], ["a < b < c < d"], 20, colors=colors)

    def test_takes_pairs_that_were_dropped_and_one_look(self) -> None:
        nothing = np.full((1, 2), np.nan)
        assert "a (open)" in texts_of(drawn_evidence([64], nothing, ["a", "b"], 10))

    def test_refuses_shapes_that_do_not_match(self) -> None:
        with pytest.raises(ValueError, match=r"shape \(2, 1\), expected \(1, 1\)"):
            drawn_evidence([64], [[1.0], [2.0]], ["a"], 10)


class TestSaveFigure:
    def figure(self) -> Figure:
        return drawn_similarity(NAMES, scores([0.6, 0.4, 0.2]))

    @pytest.mark.parametrize(
        ("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")]
    )
    def test_writes_equal_files_of_equal_figures(
        self, tmp_path: Path, suffix: str, start: bytes
    ) -> None:
        first = save_figure(self.figure(), tmp_path / f"first{suffix}")
        second = save_figure(self.figure(), str(tmp_path / f"second{suffix}"))
        assert first.read_bytes().startswith(start)
        assert first.read_bytes() == second.read_bytes()
        assert sorted(tmp_path.iterdir()) == [first, second]

    def test_writes_200_dots_an_inch(self, tmp_path: Path) -> None:
        figure = self.figure()
        with Image.open(save_figure(figure, tmp_path / "figure.png")) as image:
            assert abs(image.width - 200 * figure.get_figwidth()) <= 1

    def test_keeps_the_old_file_when_writing_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "figure.png"
        path.write_bytes(b"old")

        def fail(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(RunError, match="the disk is full"):
            save_figure(self.figure(), path)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_refuses_other_suffixes(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"figure\.gif.*\.png, \.svg or \.pdf"):
            save_figure(self.figure(), tmp_path / "figure.gif")

    def test_draws_alike_under_a_users_own_settings(self, tmp_path: Path) -> None:
        plain = save_figure(self.figure(), tmp_path / "plain.png")
        with mpl.rc_context({"font.size": 20, "axes.grid": True, "figure.facecolor": "black"}):
            own = save_figure(self.figure(), tmp_path / "own.png")
        assert plain.read_bytes() == own.read_bytes()


class TestSampleImages:
    images = sorted((SAMPLES / "images").glob("*.jpg"))

    def test_are_20_to_40_under_2_megabytes(self) -> None:
        assert 20 <= len(self.images) <= 40
        assert sum(path.stat().st_size for path in self.images) < 2_000_000

    def test_decode_and_are_large_enough_for_the_view(self) -> None:
        for path in self.images:
            with Image.open(path) as image:
                image.load()
                assert min(image.size) >= 256, path.name

    def test_are_each_listed_with_a_free_license(self) -> None:
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in (SAMPLES / "LICENSES.md").read_text(encoding="utf-8").splitlines()
            if line.startswith("| `")
        ]
        assert {row[0].strip("`") for row in rows} == {f"images/{p.name}" for p in self.images}
        for row in rows:
            assert all(row), row
            assert row[4] in {"CC0 1.0", "public domain"}, row

    def test_no_photograph_dominates(self) -> None:
        subjects = [path.stem.split("_")[0] for path in self.images]
        assert max(subjects.count(subject) for subject in subjects) <= 5
