"""The rules of --batch-size auto and --compile auto, on timings that are given."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import coded_tar, coded_teacher, similarities

import tokdiv
from tokdiv import Teacher, tuning
from tokdiv.errors import RunError

TINY = {"device": "cpu", "dtype": "float32", "workers": 1, "image_size": 32}


@pytest.fixture
def teacher() -> Teacher:
    return coded_teacher("one", np.zeros(4))


def timed(monkeypatch: pytest.MonkeyPatch, rate: Callable[[int], float]) -> list[int]:
    """Let a teacher make `rate(rows)` images a second; returns the sizes that were tried."""
    tried: list[int] = []

    def seconds_per_image(teachers: list[Teacher], rows: int) -> dict[str, float]:
        tried.append(rows)
        return {t.name: 1 / rate(rows) for t in teachers}

    monkeypatch.setattr(tuning, "seconds_per_image", seconds_per_image)
    return tried


class TestBatchSize:
    def test_doubles_while_it_pays(self, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
        rates = {16: 100.0, 32: 104.0, 64: 200.0}
        assert timed(monkeypatch, rates.__getitem__) == []
        assert tuning.choose_batch_size([teacher], None)[0] == 64
        rates[64] = 106.0  # 1.9% more
        assert tuning.choose_batch_size([teacher], None) == (32, {"one": 1 / 104})

    def test_tries_no_more_than_a_short_run_bears(
        self, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Two passes of 16 images and two of 32 are 2% of 4,800.
        tried = timed(monkeypatch, lambda rows: 100.0)
        assert tuning.choose_batch_size([teacher], 4_799) == (16, {})
        assert tried == []
        assert tuning.choose_batch_size([teacher], 4_800) == (16, {"one": 0.01})
        assert tried == [16, 32]

    def test_keeps_a_step_short(self, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
        timed(monkeypatch, lambda rows: 0.1 * rows)  # 10 s a step, whatever its size
        assert tuning.choose_batch_size([teacher], None)[0] == 16

    def test_shrinks_to_what_memory_holds(
        self, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def seconds_per_image(teachers: list[Teacher], rows: int) -> dict[str, float]:
            if rows > 4:
                raise torch.OutOfMemoryError
            return {"one": 1.0 / rows}

        monkeypatch.setattr(tuning, "seconds_per_image", seconds_per_image)
        assert tuning.choose_batch_size([teacher], None) == (4, {"one": 0.25})

    def test_times_each_teacher(self, teacher: Teacher) -> None:
        seconds = tuning.seconds_per_image([teacher], 3)
        assert set(seconds) == {"one"} and seconds["one"] > 0

    def test_is_stored_and_used_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = coded_tar(tmp_path / "images.tar", 40)
        teachers = [coded_teacher(n, s) for n, s in zip("ab", similarities(4096, 0.2, 0.21))]
        tried = timed(monkeypatch, lambda rows: 1e6)
        monkeypatch.setattr(tuning, "SHARE", 1e6)  # the run is long enough for trials
        run = tmp_path / "run"
        tokdiv.rank(data, teachers, run, max_images=20, certify="none", **TINY)
        assert tried == [16, 32]
        assert json.loads((run / "config.json").read_text())["settings"]["batch_size"] == 16
        grown = tokdiv.rank(data, teachers, run, max_images=40, certify="none", **TINY)
        assert tried == [16, 32] and grown.settings["batch_size"] == 16
        other = tokdiv.rank(
            data, teachers, run, max_images=40, certify="none", batch_size=8, **TINY
        )
        assert other.settings["batch_size"] == 8 and tried == [16, 32]


class TestCompile:
    @pytest.mark.parametrize(
        ("certify", "count", "limit", "expected"),
        [
            ("none", None, None, None),
            ("none", 5_000, None, 5_000),
            ("none", 5_000, 700, 700),
            ("order", None, None, tuning.CERTIFIED_IMAGES),
            ("best", 1_281_167, None, tuning.CERTIFIED_IMAGES),
            ("order", 200, None, 200),
        ],
    )
    def test_counts_on_the_images_that_are_likely(
        self, certify: str, count: int | None, limit: int | None, expected: int | None
    ) -> None:
        assert tuning.expected_images(count, limit, certify) == expected

    def test_pays_when_it_saves_more_than_it_takes(self) -> None:
        vit = tokdiv.load_teacher("timm:vit_tiny_patch16_224@random:depth=1", image_size=32)
        seconds = 0.1
        # 1.2 times as fast saves a sixth: 60 s are saved after 3,600 images.
        assert not tuning.pays_to_compile(vit, seconds, 3_599)
        assert tuning.pays_to_compile(vit, seconds, 3_601)
        assert tuning.pays_to_compile(vit, seconds, None)

    def test_leaves_what_is_no_network(self) -> None:
        assert not tuning.pays_to_compile(tokdiv.load_teacher("hog"), 100.0, None)

    def test_a_failure_leaves_the_teacher_as_it_is(
        self, teacher: Teacher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        def fail(*arguments: object, **options: object) -> None:
            raise RuntimeError("no C++ compiler\nlong story")

        monkeypatch.setattr(torch, "compile", fail)
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        before = teacher(images)
        tuning.compile_teacher(teacher, 2, must=False)
        assert capsys.readouterr().err == (
            "warning: one cannot be compiled here (no C++ compiler): it runs as it is\n"
        )
        assert torch.equal(teacher(images), before)
        with pytest.raises(RunError, match=r"one cannot be compiled here .*: use --compile off"):
            tuning.compile_teacher(teacher, 2, must=True)

    def test_serves_its_one_size_and_leaves_others_alone(
        self, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes: list[int] = []

        def compiled(function: Callable, **options: object) -> Callable:
            assert options == {"dynamic": False, "options": {"freezing": True}}

            def run(images: torch.Tensor) -> torch.Tensor:
                sizes.append(len(images))
                return function(images)

            return run

        monkeypatch.setattr(torch, "compile", compiled)
        teacher.compile_for(4)
        for rows in (4, 3, 4, 1):
            assert len(teacher(torch.zeros(rows, 3, 32, 32, dtype=torch.uint8))) == rows
        assert sizes == [4, 4, 4]  # the first is the trial
