"""The score array: what is stored is what was recorded, in few writes, completely or not at all."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

import tokdiv.scores
from tokdiv.errors import RunError
from tokdiv.run_dir import write_atomic
from tokdiv.scores import MEASURES, ScoreTable

NAMES = ["a", "b"]


def key_of(position: int) -> str:
    return f"{position}.png"


def fill(table: ScoreTable, start: int, stop: int, step: int = 1) -> np.ndarray:
    """Record every `step`th position; returns the scores (n, T, 3)."""
    positions = np.arange(start, stop, step)
    scores = np.random.default_rng(start).random((len(positions), 2, 3)).astype(np.float32)
    reasons: list[str | None] = [None] * len(positions)
    scores[0], reasons[0] = np.nan, "it is cut short"
    table.record(positions, [key_of(p) for p in positions], reasons, [0, 1], scores)
    for name in NAMES:
        table.progress.measured[name] = stop
    return scores


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokdiv.scores, "CHUNK", 10)


@pytest.mark.parametrize("keys_known", [True, False])
def test_a_stored_table_comes_back_equal(tmp_path: Path, keys_known: bool) -> None:
    known = key_of if keys_known else None
    table = ScoreTable(NAMES, known, tmp_path)
    scores = fill(table, 0, 37)
    table.progress.num_averaged = {"a": 7, "b": 7}
    table.progress.token_sums = {"a": np.arange(3.0), "b": np.arange(5.0) / 3}
    table.progress.dropped = {"b": 37}
    table.save()
    again = ScoreTable(NAMES, known, tmp_path)
    again.load()
    for index, measure in enumerate(MEASURES):
        np.testing.assert_array_equal(again.rows(0, 37, measure), scores[:, :, index])
        np.testing.assert_array_equal(again.rows(8, 21, measure), scores[8:21, :, index])
    assert again.reasons == {0: "it is cut short"}
    assert again.num_seen == 37 and again.unusable(37) == 1
    assert [again.key(p) for p in (0, 9, 10, 36)] == ["0.png", "9.png", "10.png", "36.png"]
    assert again.progress.measured == {"a": 37, "b": 37}
    assert again.progress.dropped == {"b": 37}
    np.testing.assert_array_equal(again.progress.token_sums["b"], np.arange(5.0) / 3)


def test_an_empty_table_has_no_rows(tmp_path: Path) -> None:
    table = ScoreTable(NAMES, key_of, tmp_path)
    table.load()
    assert table.num_seen == 0 and table.rows(0, 0).shape == (0, 2)


def test_a_teacher_that_joins_finds_its_column_empty_and_the_others_as_they_were(
    tmp_path: Path,
) -> None:
    table = ScoreTable(NAMES, key_of, tmp_path)
    scores = fill(table, 0, 25)
    table.save()
    again = ScoreTable(["b", "new", "a"], key_of, tmp_path)
    again.load()
    assert again.progress.measured == {"b": 25, "new": 0, "a": 25}
    rows = again.rows(0, 25)
    np.testing.assert_array_equal(rows[:, [2, 0]], scores[:, :, 0])
    assert np.isnan(rows[:, 1]).all()


def test_what_lies_beyond_the_progress_does_not_count(tmp_path: Path) -> None:
    """As when a run is killed after a chunk was stored, and before the progress was."""
    table = ScoreTable(NAMES, key_of, tmp_path)
    fill(table, 0, 15)
    table.save()
    before = (tmp_path / "state" / "progress.safetensors").read_bytes()
    fill(table, 15, 28)
    table.save()
    (tmp_path / "state" / "progress.safetensors").write_bytes(before)
    again = ScoreTable(NAMES, key_of, tmp_path)
    again.load()
    assert again.num_seen == 15
    assert again.reasons == {0: "it is cut short"}


def test_rows_that_are_missing_end_the_measured_stretch(tmp_path: Path) -> None:
    short = ScoreTable(NAMES, None, tmp_path)
    fill(short, 0, 14)
    short.save()
    chunk = (tmp_path / "state" / "scores-00001.parquet").read_bytes()  # positions 10 to 13
    table = ScoreTable(NAMES, None, tmp_path)
    fill(table, 0, 28)
    table.save()
    (tmp_path / "state" / "scores-00001.parquet").write_bytes(chunk)
    again = ScoreTable(NAMES, None, tmp_path)
    again.load()
    assert again.num_seen == 14
    assert again.key(13) == "13.png"


def test_dropping_and_ending_clear_what_comes_after() -> None:
    table = ScoreTable(NAMES, key_of)
    fill(table, 0, 35)
    table.drop(1, 12)
    assert table.progress.dropped == {"b": 12} and table.progress.measured == {"a": 35, "b": 12}
    assert np.isnan(table.rows(12, 35)[:, 1]).all()
    assert not np.isnan(table.rows(1, 35)[:, 0]).any()
    assert not np.isnan(table.rows(1, 12)[:, 1]).any()
    fill(table, 30, 35)
    assert set(table.reasons) == {0, 30}
    table.finish("order certified", 20)
    assert table.progress.finished == "order certified"
    assert table.progress.measured == {"a": 20, "b": 20}
    assert np.isnan(table.rows(20, 35)).all()
    assert set(table.reasons) == {0}


def test_rows_of_several_processes_interleave() -> None:
    table, empty = ScoreTable(NAMES, key_of), ScoreTable(NAMES, key_of)
    parts = [fill(table, start, 33, 3) for start in range(3)]
    scores = np.empty((33, 2, 3), np.float32)
    for start, part in enumerate(parts):
        scores[start::3] = part
    np.testing.assert_array_equal(table.rows(0, 33), scores[:, :, 0])
    empty.record(np.arange(0), [], [], [0, 1], np.empty((0, 2, 3), np.float32))
    assert empty.num_seen == 0


def test_a_store_rewrites_a_few_megabytes_at_most() -> None:
    """10 teachers and a full chunk: the most that one store of a long run writes, besides the progress."""
    tokdiv.scores.CHUNK = 16_384  # the real one; the fixture puts its own back
    names = [f"teacher{n}" for n in range(10)]
    table = ScoreTable(names, lambda position: f"train/n01440764/n01440764_{position:08d}.JPEG")
    scores = np.random.default_rng(0).random((16_384, 10, 3)).astype(np.float32)
    positions = np.arange(16_384)
    table.record(positions, [""] * 16_384, [None] * 16_384, list(range(10)), scores)
    table.progress.measured = dict.fromkeys(names, 16_384)
    assert len(table._chunk_bytes(0)) < 4_000_000


def test_a_file_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_atomic(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            RunError, match=r"cannot write .*file': the disk is full.*free some space"
        ):
            write_atomic(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]  # and no temporary file is left
    write_atomic(file, b"new")
    assert file.read_text() == "new"


def test_a_place_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*gone/file': No such file or directory"):
        write_atomic(tmp_path / "gone" / "file", "new")
