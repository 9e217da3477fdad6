"""Whatever ends a run, the same command goes on, and ends with the ranking of an undisturbed run."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fakes import (
    ROOT,
    coded_tar,
    coded_teacher,
    command,
    environment,
    numbers_in_order,
    similarities,
    teacher_file,
)

import tokdiv
import tokdiv.judge
import tokdiv.measure
import tokdiv.run_dir
import tokdiv.scores
import tokdiv.state
from tokdiv import Teacher
from tokdiv.data.loader import Batch
from tokdiv.errors import Interrupted, RunError, UsageError

COUNT = 600
TINY = {"workers": 2, "dtype": "float32", "device": "cpu", "report": False}
COLUMNS = similarities(COUNT, 0.30, 0.301, 0.45)


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coded_tar(tmp_path_factory.mktemp("coded") / "images.tar", COUNT, broken=(5, 77, 300))


def teachers(**options: object) -> list[Teacher]:
    """Three, of which the first may have options of `fakes.Lookup`."""
    named = zip("abc", COLUMNS)
    return [coded_teacher(n, c, **(options if n == "a" else {})) for n, c in named]


def files(run: Path) -> dict[str, str]:
    """What a finished RUN says."""
    scores = pd.read_parquet(run / "scores.parquet").to_csv()
    names = ("ranking.json", "ranking.csv", "skipped.csv")
    return {name: (run / name).read_text() for name in names} | {"scores": scores}


@pytest.fixture(scope="module")
def undisturbed(coded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    for certify in ("none", "best"):
        tokdiv.rank(coded, teachers(), folder / certify, certify=certify, batch_size=10, **TINY)
    return {certify: files(folder / certify) for certify in ("none", "best")}


def small_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    for module in (tokdiv.scores, tokdiv.state):
        monkeypatch.setattr(module, "CHUNK", rows)


class Killed(BaseException):
    """Stands for SIGKILL at one instant of one process: nothing that catches errors catches it."""


@pytest.mark.slow
def test_killed_at_twenty_random_moments(
    coded: Path,
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
) -> None:
    """Real SIGKILLs, in a child that measures twenty times: each takes up what the one before left."""
    out = tmp_path / "RUN"
    random.seed(1)
    gaps = [str(random.randint(1, 45)) for _ in range(20)]
    script = tmp_path / "killed.py"
    script.write_text(
        f"import os, sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        f"import timm, torchvision\n"  # once, not in every child
        f"import tokdiv, tokdiv.judge\n"
        f"import test_resume as t\n"
        f"tokdiv.judge.SAVE_SECONDS = 0.1\n"
        f"for gap in sys.argv[1:]:\n"
        f"    child = os.fork()\n"  # a fork costs no import of torch
        f"    if child == 0:\n"
        f"        after = None if gap == 'never' else int(gap)\n"
        f"        settings = dict(certify='none', batch_size=10, correspondence_images=0, **t.TINY)\n"
        f"        some = t.teachers(kill_after=after)\n"
        f"        tokdiv.rank({str(coded)!r}, some, {str(out)!r}, **settings)\n"
        f"        os._exit(0)\n"
        f"    print(gap, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
    )
    result = subprocess.run(
        [sys.executable, str(script), *gaps, "never"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    codes = [int(line.split()[1]) for line in result.stdout.splitlines()]
    assert codes == [-signal.SIGKILL] * 20 + [0]
    assert files(out) == undisturbed["none"]


@pytest.mark.parametrize("certify", ["none", "best"])
def test_killed_at_every_kind_of_write(
    coded: Path,
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    certify: str,
) -> None:
    """Cut off before, within and after each rename: the only moments at which files change."""
    out = tmp_path / "RUN"
    settings = {"certify": certify, "batch_size": 10, **TINY}
    monkeypatch.setattr(tokdiv.judge, "SAVE_SECONDS", 0)
    moments = itertools.count()
    fatal: list[int] = []

    def risky(function):  # type: ignore[no-untyped-def]
        def call(*arguments, **named):  # type: ignore[no-untyped-def]
            if next(moments) in fatal:
                raise Killed
            result = function(*arguments, **named)
            if next(moments) in fatal:
                raise Killed
            return result

        return call

    monkeypatch.setattr(os, "fsync", risky(os.fsync))
    monkeypatch.setattr(Path, "replace", risky(Path.replace))
    monkeypatch.setattr(Path, "mkdir", risky(Path.mkdir))
    kills = 0
    for distance in [*range(1, 16), *range(17, 120, 13)]:
        fatal[:] = [next(moments) + distance]
        try:
            tokdiv.rank(coded, teachers(), out, **settings)
        except Killed:
            kills += 1
    fatal.clear()
    assert kills >= 16
    tokdiv.rank(coded, teachers(), out, **settings)
    assert files(out) == undisturbed[certify]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_ends_with_its_code(
    coded: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "RUN"
    own = teacher_file(tmp_path / "own.py", COLUMNS[0], kill_after=95, stop_with=int(number))
    arguments = ["rank", coded, "-t", "pixels", "--teacher-module", own, "-o", out]
    arguments += ["--image-size", 32, "--certify", "none", "--batch-size", 10]
    arguments += ["--device", "cpu", "--dtype", "float32"]
    first = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert first.returncode == code, first.stderr
    assert "Traceback" not in first.stderr
    said = [line for line in first.stderr.splitlines() if line.startswith("error")]
    assert len(said) == 1 and "the same command goes on" in said[0]
    assert int(re.search(r"after (\d+) images", said[0])[1]) >= 95
    assert not (out / "ranking.json").exists()
    with pytest.raises(UsageError, match="not finished"):
        tokdiv.load_ranking(out)
    # The same run, but for the signal: the rest is measured, and no image again.
    own = coded_teacher("own", COLUMNS[0])
    settings = {"certify": "none", "batch_size": 10, "image_size": 32, **TINY}
    ranking = tokdiv.rank(coded, ["pixels", own], out, **settings)
    again = own.module.seen
    assert len(again) == len(set(again)) <= COUNT - 3 - 93
    assert ranking["own"].images == COUNT - 3


def interrupt(out: Path, coded: Path, after: int, **settings: object) -> None:
    """A run that a SIGTERM ends after so many images."""
    settings = {"certify": "none", "batch_size": 10, **TINY, **settings}
    stopped = teachers(kill_after=after, stop_with=signal.SIGTERM)
    with pytest.raises(Interrupted):
        tokdiv.rank(coded, stopped, out, **settings)


def passes(some: list[Teacher]) -> int:
    return len(some[0].module.seen)


def test_work_done_stays_done(
    coded: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    out = tmp_path / "RUN"
    interrupt(out, coded, 400)
    rest = teachers()
    tokdiv.rank(coded, rest, out, certify="none", batch_size=10, **TINY)
    assert passes(rest) <= COUNT - 3 - 400
    assert files(out) == undisturbed["none"]
    nothing = teachers()
    tokdiv.rank(coded, nothing, out, certify="none", batch_size=10, **TINY)
    assert passes(nothing) == 0
    assert files(out) == undisturbed["none"]


@pytest.mark.parametrize("chunk", [50, 300])
@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "gone", "progress-cut", "progress-gone", "second"]
)
def test_damaged_state_is_measured_again(
    coded: Path,
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    damage: str,
) -> None:
    small_chunks(monkeypatch, chunk)
    out = tmp_path / "RUN"
    interrupt(out, coded, 500)
    number = 1 if damage == "second" else 0  # chunks of 50: within the mean token's images
    name = "progress.safetensors" if "progress" in damage else f"scores-{number:05d}-*.parquet"
    (file,) = (out / "state").glob(name)
    content = bytearray(file.read_bytes())
    if damage.endswith("gone"):
        file.unlink()
    elif damage.endswith("cut"):
        file.write_bytes(content[: len(content) // 2])
    else:
        for place in range(40, len(content) // 2, 97):  # in the pages of data, not the footer
            content[place] ^= 0x55
        file.write_bytes(content)
    rest = teachers()
    tokdiv.rank(coded, rest, out, certify="none", batch_size=10, **TINY)
    assert passes(rest) > COUNT - 500
    assert files(out) == undisturbed["none"]


def test_the_state_of_a_run_of_another_seed_is_measured_again(
    coded: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    out, other = tmp_path / "RUN", tmp_path / "OTHER"
    interrupt(out, coded, 300)
    interrupt(other, coded, 400, seed=1)
    shutil.rmtree(out / "state")
    (other / "state").rename(out / "state")
    rest = teachers()
    tokdiv.rank(coded, rest, out, certify="none", batch_size=10, **TINY)
    assert passes(rest) == COUNT - 3
    assert files(out) == undisturbed["none"]


@pytest.mark.parametrize("shift", [True, False])
def test_edited_scores_are_measured_again(
    coded: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, shift: bool
) -> None:
    out = tmp_path / "RUN"
    interrupt(out, coded, 300)
    (chunk,) = (out / "state").glob("scores-*.parquet")
    stored = pd.read_parquet(chunk)
    if shift:
        stored["position"] += 1
    else:
        stored["a"] = 0.5
    stored.to_parquet(chunk)
    tokdiv.rank(coded, teachers(), out, certify="none", batch_size=10, **TINY)
    assert files(out) == undisturbed["none"]


@pytest.mark.parametrize("ahead", [0, 1])
def test_data_that_vanish_are_stored_as_nothing_and_the_run_goes_on_when_they_are_back(
    coded: Path,
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ahead: int,
) -> None:
    """The reader gives up after some images that cannot be read, of which a few came in a batch before."""
    out, read = tmp_path / "RUN", tokdiv.measure.read_batches
    vanish_at = 20 + 10 * ahead

    def vanishing(*arguments: Any, **options: Any) -> Iterator[Batch]:
        for number, batch in enumerate(read(*arguments, **options)):
            if number == vanish_at:
                raise RunError("'images.tar' cannot be read any more (Stale file handle)")
            if number == vanish_at - 1:
                gone = 4
                reasons = [*batch.reasons[:-gone], *["cannot be read: Stale file handle"] * gone]
                usable = np.array([reason is None for reason in reasons])
                views = {size: view[: usable.sum()] for size, view in batch.views.items()}
                batch = Batch(batch.positions, batch.keys, usable, reasons, views)
            yield batch

    monkeypatch.setattr(tokdiv.measure, "read_batches", vanishing)
    settings = {"certify": "none", "batch_size": 10, **TINY}
    with pytest.raises(RunError, match="cannot be read any more"):
        tokdiv.rank(coded, teachers(), out, **settings)
    monkeypatch.undo()
    rest = teachers()
    tokdiv.rank(coded, rest, out, **settings)
    assert passes(rest) < COUNT - 3 - 150  # what was measured before is kept
    assert files(out) == undisturbed["none"]


def test_a_run_that_ends_in_an_earlier_chunk_than_it_measured(
    coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, 70)
    low, high = similarities(COUNT, 0.2, 0.8)
    for batch_size in (100, 300):
        out = tmp_path / str(batch_size)
        some = [coded_teacher("low", low), coded_teacher("high", high)]
        ranking = tokdiv.rank(coded, some, out, batch_size=batch_size, **TINY)
        assert ranking.data["images"] == 64
        some = [coded_teacher("low", low), coded_teacher("high", high)]
        again = tokdiv.rank(coded, some, out, batch_size=batch_size, **TINY)
        assert passes(some) == 0 and again.to_dict() == ranking.to_dict()


def test_only_changed_chunks_are_written(
    coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, 100)
    written: list[str] = []
    write = tokdiv.state.write_atomic
    monkeypatch.setattr(
        tokdiv.state,
        "write_atomic",
        lambda path, data: (written.append(path.name), write(path, data)),
    )
    tokdiv.rank(coded, teachers(), tmp_path / "RUN", certify="none", batch_size=20, **TINY)
    state = [name for name in written if name.startswith("scores-0")]
    state = [name[:12] for name in state]
    assert set(state) == {f"scores-{n:05d}" for n in range(6)}
    assert state == sorted(state)  # none again once a later one was begun
    assert written[-1] == "progress.safetensors"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_full_disk_loses_nothing(
    coded: Path, undisturbed: dict[str, dict[str, str]], small_disk: Path
) -> None:
    out = small_disk / "RUN"
    interrupt(out, coded, 300)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(400_000))
    with pytest.raises(RunError, match=r"the disk is full.*goes on") as error:
        tokdiv.rank(coded, teachers(), out, certify="none", batch_size=10, **TINY)
    assert "\n" not in str(error.value)
    filler.unlink()
    rest = teachers()
    tokdiv.rank(coded, rest, out, certify="none", batch_size=10, **TINY)
    assert passes(rest) <= COUNT - 3 - 290
    assert files(out) == undisturbed["none"]


class TestWhatMayGoOn:
    @pytest.fixture(scope="class")
    def run(self, coded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("run") / "RUN"
        tokdiv.rank(coded, teachers(), out, certify="none", max_images=80, batch_size=40, **TINY)
        return out

    def again(
        self, data: Path, run: Path, some: list[Teacher] | None = None, **other: object
    ) -> None:
        settings = {"certify": "none", "max_images": 80, "batch_size": 40, **TINY, **other}
        tokdiv.rank(data, some or teachers(), run, **settings)

    @pytest.mark.parametrize(
        ("other", "said"),
        [
            ({"seed": 1}, "seed 0, now 1"),
            ({"certify": "best"}, "certify none, now best"),
            ({"confidence": 0.95}, "confidence 0.99, now 0.95"),
            ({"tie": 0.01}, "tie 0.002, now 0.01"),
            ({"dtype": "bfloat16"}, "dtype float32, now bfloat16"),
            ({"image_size": 48}, "image_size None, now 48"),
            ({"allow_baselines": True}, "allow_baselines False, now True"),
            ({"max_images": 70}, "max_images 80, now 70"),
        ],
    )
    def test_other_settings_are_refused(
        self, coded: Path, run: Path, other: dict[str, object], said: str
    ) -> None:
        before = files(run)
        with pytest.raises(UsageError, match=re.escape(said) + ".*--no-resume"):
            self.again(coded, run, **other)
        assert files(run) == before

    def test_other_data_are_refused(self, run: Path, tmp_path: Path) -> None:
        other = coded_tar(tmp_path / "other.tar", COUNT - 1)
        with pytest.raises(UsageError, match=f"other data:.* {COUNT} images.* {COUNT - 1} images"):
            self.again(other, run)

    def test_other_weights_are_refused(self, coded: Path, run: Path) -> None:
        some = teachers()
        some[1] = coded_teacher("b", COLUMNS[2])
        with pytest.raises(UsageError, match="b: sha256"):
            self.again(coded, run, some)

    def test_a_missing_teacher_is_refused(self, coded: Path, run: Path) -> None:
        with pytest.raises(UsageError, match="the teacher c, now without it"):
            self.again(coded, run, teachers()[:2])

    def test_what_does_not_matter_may_change(self, coded: Path, run: Path) -> None:
        some = teachers()
        self.again(coded, run, some, batch_size=7, workers=1)
        assert passes(some) == 0

    def test_a_folder_that_holds_something_else_is_refused(
        self, coded: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "thesis.tex").write_text("precious")
        with pytest.raises(UsageError, match="not empty and holds no run"):
            self.again(coded, tmp_path)
        for content in ("{", "[]", '{"model": "vit"}', "[" * 100_000):
            (tmp_path / "config.json").write_text(content)
            with pytest.raises(
                UsageError, match=r"config\.json is (damaged|not that of a ranking)"
            ):
                self.again(coded, tmp_path)
        assert (tmp_path / "thesis.tex").read_text() == "precious"

    @pytest.mark.parametrize(
        "damage",
        [
            {"schema_version": 99},
            {"data": []},
            {"data": {"source": "photographs"}},
            {"settings": []},
            {"settings": {"seed": 0}},
            {"teachers": None},
            {"teachers": [{"name": "a"}]},
            {"teachers": ["a"]},
        ],
    )
    def test_a_damaged_config_is_refused(
        self, coded: Path, run: Path, tmp_path: Path, damage: dict[str, object]
    ) -> None:
        config = json.loads((run / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | damage))
        with pytest.raises(UsageError, match=r"config\.json is not that of a ranking, or damaged"):
            self.again(coded, tmp_path)

    def test_no_resume_moves_the_old_run_away(self, coded: Path, tmp_path: Path) -> None:
        out = tmp_path / "RUN"
        for seed in (0, 1, 2):
            some = teachers()
            self.again(coded, out, some, seed=seed, resume=False)
            assert passes(some) >= 79
        moved = [
            json.loads((tmp_path / f"RUN.bak-{n}" / "config.json").read_text()) for n in (1, 2)
        ]
        assert [config["settings"]["seed"] for config in moved] == [0, 1]
        assert json.loads((out / "config.json").read_text())["settings"]["seed"] == 2
        assert not (tmp_path / "RUN.bak-3").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/run"])
def test_a_place_that_cannot_be_written_is_a_mistake_in_the_call(
    coded: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match=r"give (a|another) folder"):
        tokdiv.rank(coded, teachers(), tmp_path / place, **TINY)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_read_only_folder_is_a_mistake_in_the_call(coded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        for out in (folder, folder / "RUN"):
            with pytest.raises(UsageError, match="cannot be written to"):
                tokdiv.rank(coded, teachers(), out, **TINY)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_slow_teacher_is_stored_within_half_a_minute() -> None:
    """The constants of the promise: a store at most every 20 s, a step of at most about 8."""
    assert tokdiv.judge.SAVE_SECONDS + tokdiv.judge.STEP_SECONDS <= 30


def test_slow_batches_are_cut_into_smaller_steps(
    coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that runs fast stands for a slow network."""
    now = time.monotonic
    monkeypatch.setattr(tokdiv.judge.time, "monotonic", lambda: now() * 1000)
    out = tmp_path / "RUN"
    tokdiv.rank(coded, teachers(), out, certify="none", max_images=100, batch_size=64, **TINY)
    order = numbers_in_order(coded)[:100]
    found = pd.read_parquet(out / "scores.parquet")
    usable = ~np.isin(order, (5, 77, 300))
    np.testing.assert_allclose(found["a"], COLUMNS[0][order[usable]], atol=1e-6)
