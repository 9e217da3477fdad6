"""The rules of --batch-size auto and --compile auto, on timings that are given."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import coded_tar, coded_teacher, similarities
from torch._dynamo.testing import CompileCounter

import tokdiv
from tokdiv import Teacher
from tokdiv import autotune as tuning
from tokdiv.errors import UsageError

TINY = {"device": "cpu", "dtype": "float32", "workers": 1, "image_size": 32, "report": False}


@pytest.fixture
def teacher() -> Teacher:
    return coded_teacher("one", np.zeros(4))


def timed(monkeypatch: pytest.MonkeyPatch, rate: Callable[[int], float]) -> list[int]:
    """Let a step take rows / rate(rows) seconds; returns the sizes that were tried."""
    tried: list[int] = []

    def step_seconds(teachers: list[Teacher], rows: int) -> float:
        tried.append(rows)
        return rows / rate(rows)

    monkeypatch.setattr(tuning, "step_seconds", step_seconds)
    return tried


class TestBatchSize:
    def test_doubles_while_it_pays(self, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
        rates = {16: 100.0, 32: 104.0, 64: 200.0}
        timed(monkeypatch, rates.__getitem__)
        assert tuning.choose_batch_size([teacher], None) == 64
        rates[64] = 106.0  # 1.9% more
        assert tuning.choose_batch_size([teacher], None) == 32

    def test_a_short_run_is_not_kept_waiting(
        self, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tried = timed(monkeypatch, lambda rows: 1e6 * rows)
        assert tuning.choose_batch_size([teacher], 255) == 16
        assert tried == []
        assert tuning.choose_batch_size([teacher], 256) == 64

    def test_trials_of_slow_networks_take_a_fiftieth_of_the_run(
        self, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # 10 images/s: a trial takes five steps of 1.6 s, a fiftieth of 4,000 images.
        tried = timed(monkeypatch, lambda rows: 10.0)
        assert tuning.choose_batch_size([teacher], 3_999) == 16
        assert tried == [16]
        assert tuning.choose_batch_size([teacher], 4_001) == 16
        assert tried == [16, 16, 16, 32, 32]

    def test_keeps_a_step_short(self, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
        timed(monkeypatch, lambda rows: 0.1 * rows)  # 10 s a step, whatever its size
        assert tuning.choose_batch_size([teacher], None) == 16

    def test_shrinks_to_what_memory_holds(
        self, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def step_seconds(teachers: list[Teacher], rows: int) -> float:
            if rows > most:
                raise torch.OutOfMemoryError
            return 1.0

        monkeypatch.setattr(tuning, "step_seconds", step_seconds)
        for most in (1, 4, 16, 40):
            assert tuning.choose_batch_size([teacher], None) == min(most, 32)
        most = 0
        with pytest.raises(torch.OutOfMemoryError):
            tuning.choose_batch_size([teacher], None)

    def test_a_step_is_timed(self, teacher: Teacher) -> None:
        assert tuning.step_seconds([teacher], 3) > 0

    def test_is_stored_and_used_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = coded_tar(tmp_path / "images.tar", 40)
        teachers = [coded_teacher(n, s) for n, s in zip("ab", similarities(4096, 0.2, 0.21))]
        tried = timed(monkeypatch, lambda rows: 1e6)
        monkeypatch.setattr(tuning, "TRIAL_IMAGES", 1)
        run = tmp_path / "run"
        tokdiv.rank(data, teachers, run, max_images=20, certify="none", **TINY)
        assert tried == [16, 16, 32, 32]
        assert json.loads((run / "config.json").read_text())["settings"]["batch_size"] == 16
        grown = tokdiv.rank(data, teachers, run, max_images=40, certify="none", **TINY)
        assert len(tried) == 4 and grown.settings.batch_size == 16
        other = tokdiv.rank(
            data, teachers, run, certify="none", batch_size=8, max_images=40, **TINY
        )
        assert other.settings.batch_size == 8 and len(tried) == 4

    def test_a_run_with_nothing_to_measure_tries_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = coded_tar(tmp_path / "images.tar", 30)
        teachers = [coded_teacher("a", similarities(4096, 0.2)[0])]
        run = tmp_path / "run"
        tokdiv.rank(data, teachers, run, **TINY)
        config = json.loads((run / "config.json").read_text())
        del config["settings"]["batch_size"]  # as an earlier version wrote it
        (run / "config.json").write_text(json.dumps(config))
        tried = timed(monkeypatch, lambda rows: 1e6)
        monkeypatch.setattr(tuning, "TRIAL_IMAGES", 1)
        assert tokdiv.rank(data, teachers, run, **TINY).data["images"] == 30
        assert tried == []


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

    def test_pays_for_a_long_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for device in (torch.device("cpu"), torch.device("cuda")):
            monkeypatch.setenv("CXX", sys.executable)  # any program that is there
            assert not tuning.compiles("auto", device, 49_999)
            assert tuning.compiles("auto", device, 50_000)
            assert tuning.compiles("auto", device, None) == (device.type == "cuda")
            assert tuning.compiles("on", device, 1) and not tuning.compiles("off", device, None)
            monkeypatch.setenv("CXX", "no-such-compiler")
            assert tuning.compiles("auto", device, 50_000) == (device.type == "cuda")
        assert not tuning.compiles("auto", torch.device("mps"), None)

    def test_without_a_compiler_it_cannot_be_asked_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(UsageError, match="no C\\+\\+ compiler no-such-compiler"):
            tuning.compiles("on", torch.device("cpu"), 1)

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
    def test_compiled_on_a_cpu_the_similarities_are_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        torch._dynamo.reset()
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        teacher = tokdiv.load_teacher("timm:test_vit@random", image_size=64)
        plain = tokdiv.token_similarity(teacher(images))
        compiled = tokdiv.token_similarity(teacher.prepare("cpu", compile=True)(images))
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)

    def test_ten_networks_are_each_compiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # torch gives up after 8 graphs of one function. The counter takes graphs and generates no code, which
        # would need a C++ compiler and a minute.
        counter, compiler = CompileCounter(), torch.compile
        monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend=counter))
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        torch._dynamo.reset()
        for depth in range(1, 11):
            teacher = tokdiv.load_teacher(f"timm:test_vit@random:depth={depth}", image_size=32)
            plain = teacher(images)
            torch.testing.assert_close(teacher.prepare("cpu", compile=True)(images), plain)
        assert counter.frame_count == 10
