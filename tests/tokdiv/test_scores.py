"""The score array: what is stored is what was recorded, in few writes, completely or not at all."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import tokdiv.scores
import tokdiv.state
from tokdiv.errors import RunError, UsageError
from tokdiv.run_dir import write_atomic
from tokdiv.scores import MEASURES, ScoreTable, check_labels
from tokdiv.state import State

NAMES = ["a", "b"]
IDENTITY = {"data": "0" * 64, "seed": 0, "teachers": {"a": {"sha256": "1"}, "b": {"sha256": "2"}}}


def key_of(position: int) -> str:
    return f"{position}.png"


def fill(table: ScoreTable, start: int, stop: int, step: int = 1) -> np.ndarray:
    """Record every `step`th position; returns the scores (n, T, 4)."""
    positions = np.arange(start, stop, step)
    scores = np.random.default_rng(start).random((len(positions), 2, 4)).astype(np.float32)
    reasons: list[str | None] = [None] * len(positions)
    scores[0], reasons[0] = np.nan, "it is cut short"
    table.record(positions, [key_of(p) for p in positions], reasons, [0, 1], scores)
    for name in NAMES:
        table.progress.measured[name] = stop
    return scores


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tokdiv.scores, tokdiv.state):
        monkeypatch.setattr(module, "CHUNK", 10)


@pytest.mark.parametrize("keys_known", [True, False])
def test_a_stored_table_comes_back_equal(tmp_path: Path, keys_known: bool) -> None:
    known = key_of if keys_known else None
    table = ScoreTable(NAMES, known)
    scores = fill(table, 0, 37)
    table.progress.num_averaged = {"a": 7, "b": 7}
    table.progress.token_sums = {"a": np.arange(3.0), "b": np.arange(5.0) / 3}
    table.progress.dropped = {"b": 37}
    State(tmp_path, IDENTITY).save(table)
    again = ScoreTable(NAMES, known)
    State(tmp_path, IDENTITY).load(again)
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
    table = ScoreTable(NAMES, key_of)
    State(tmp_path, IDENTITY).load(table)
    assert table.num_seen == 0 and table.rows(0, 0).shape == (0, 2)


def test_a_teacher_that_joins_finds_its_column_empty_and_the_others_as_they_were(
    tmp_path: Path,
) -> None:
    table = ScoreTable(NAMES, key_of)
    scores = fill(table, 0, 25)
    State(tmp_path, IDENTITY).save(table)
    again = ScoreTable(["b", "new", "a"], key_of)
    State(tmp_path, IDENTITY).load(again)
    assert again.progress.measured == {"b": 25, "new": 0, "a": 25}
    rows = again.rows(0, 25)
    np.testing.assert_array_equal(rows[:, [2, 0]], scores[:, :, 0])
    assert np.isnan(rows[:, 1]).all()


def test_killed_before_the_progress_was_stored_the_state_is_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, state = ScoreTable(NAMES, key_of), State(tmp_path, IDENTITY)
    scores = fill(table, 0, 15)
    state.save(table)
    write = tokdiv.state.write_atomic

    def killed(path: Path, data: bytes) -> None:
        if path.name == "progress.safetensors":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(tokdiv.state, "write_atomic", killed)
    fill(table, 15, 28)
    with pytest.raises(KeyboardInterrupt):
        state.save(table)
    monkeypatch.undo()
    again = ScoreTable(NAMES, key_of)
    State(tmp_path, IDENTITY).load(again)
    np.testing.assert_array_equal(again.rows(0, 10), scores[:10, :, 0])


def test_a_missing_or_changed_chunk_ends_the_measured_stretch(tmp_path: Path) -> None:
    table = ScoreTable(NAMES, None)
    fill(table, 0, 35)
    State(tmp_path, IDENTITY).save(table)
    files = sorted(tmp_path.glob("scores-*.parquet"))
    assert [file.name[:12] for file in files] == [f"scores-{n:05d}" for n in range(4)]
    content = files[2].read_bytes()
    for damage in (
        None,
        b"",
        content[:-1],
        content[:-9] + b"x" + content[-8:],
        files[1].read_bytes(),
    ):
        files[2].unlink() if damage is None else files[2].write_bytes(damage)
        again = ScoreTable(NAMES, None)
        State(tmp_path, IDENTITY).load(again)
        assert again.num_seen == 20
        assert again.key(19) == "19.png"
    files[2].write_bytes(content)
    again = ScoreTable(NAMES, None)
    State(tmp_path, IDENTITY).load(again)
    assert again.num_seen == 35


@pytest.mark.parametrize(
    "other",
    [
        {"data": "1" * 64},
        {"seed": 1},
        {"teachers": {"a": {"sha256": "1"}, "b": {"sha256": "3"}}},
        {"teachers": {"a": {"sha256": "1"}}},
    ],
)
def test_the_state_of_another_run_is_measured_again(
    tmp_path: Path, other: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    table = ScoreTable(NAMES, key_of)
    fill(table, 0, 25)
    State(tmp_path, IDENTITY).save(table)
    again = ScoreTable(NAMES, key_of)
    State(tmp_path, {**IDENTITY, **other}).load(again)
    assert again.num_seen == 0 and not again.reasons
    assert "everything is measured again" in caplog.text


def edited(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Callable[[Path], None]:
    """Rewrite the progress after a change of its fields and its tensors, with the old digest."""

    def edit(file: Path) -> None:
        with safetensors.safe_open(file, framework="numpy") as opened:
            sums = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = dict(opened.metadata())
        fields = json.loads(metadata["progress"])
        change(fields, sums)
        metadata["progress"] = json.dumps(fields)
        safetensors.numpy.save_file(sums, file, metadata)

    return edit


def with_metadata(metadata: dict[str, str] | None) -> Callable[[Path], None]:
    return lambda file: safetensors.numpy.save_file({"sum of a": np.zeros(3)}, file, metadata)


@pytest.mark.parametrize(
    "damage",
    [
        edited(lambda fields, sums: fields["measured"].update(a=20)),
        edited(lambda fields, sums: fields["measured"].update(a="25")),
        edited(lambda fields, sums: fields["measured"].update(a=2.5)),
        edited(lambda fields, sums: fields.update(measured=[25])),
        edited(lambda fields, sums: fields.clear()),
        edited(lambda fields, sums: fields.update(finished="best certified")),
        edited(lambda fields, sums: fields["chunks"].reverse()),
        edited(lambda fields, sums: sums.update({"sum of a": np.ones(3)})),
        edited(lambda fields, sums: sums.clear()),
        with_metadata(None),
        with_metadata({"progress": "[]", "digest": "0"}),
        with_metadata({"progress": "{}", "digest": "0"}),
        with_metadata({"progress": "[" * 100_000, "digest": "0"}),
        with_metadata({"progress": "null"}),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\xff" * 100),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_a_progress_that_was_edited_or_damaged_is_measured_again(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    table = ScoreTable(NAMES, key_of)
    fill(table, 0, 25)
    table.progress.token_sums = {"a": np.arange(3.0), "b": np.arange(5.0)}
    State(tmp_path, IDENTITY).save(table)
    damage(tmp_path / "progress.safetensors")
    again = ScoreTable(NAMES, key_of)
    State(tmp_path, IDENTITY).load(again)
    assert again.num_seen == 0 and not again.progress.token_sums


def test_a_label_may_be_a_reserved_word_of_the_format(tmp_path: Path) -> None:
    names = ["__metadata__", "b"]
    table = ScoreTable(names, key_of)
    table.progress.measured = dict.fromkeys(names, 0)
    table.progress.token_sums = {"__metadata__": np.arange(3.0), "b": np.arange(5.0)}
    State(tmp_path, IDENTITY).save(table)
    again = ScoreTable(names, key_of)
    State(tmp_path, IDENTITY).load(again)
    np.testing.assert_array_equal(again.progress.token_sums["__metadata__"], np.arange(3.0))


@pytest.mark.parametrize(
    ("labels", "wrong"),
    [
        (["position"], "position"),
        (["key", "a"], "key"),
        (["reason"], "reason"),
        (["a", "centred:a"], "centred:a"),
        (["caf\udce9"], r"'caf\\udce9' is no Unicode"),
    ],
)
def test_a_label_that_is_no_name_of_a_column_is_refused(labels: list[str], wrong: str) -> None:
    with pytest.raises(UsageError, match=f"{wrong}.*write LABEL=SPEC"):
        check_labels(labels)
    check_labels(["a", "b", "centred", "caf\u00e9"])


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
    scores = np.empty((33, 2, 4), np.float32)
    for start, part in enumerate(parts):
        scores[start::3] = part
    np.testing.assert_array_equal(table.rows(0, 33), scores[:, :, 0])
    empty.record(np.arange(0), [], [], [0, 1], np.empty((0, 2, 4), np.float32))
    assert empty.num_seen == 0


def test_a_store_rewrites_a_few_megabytes_at_most(tmp_path: Path) -> None:
    """10 teachers and a full chunk: the most that one store of a long run writes, besides the progress."""
    for module in (tokdiv.scores, tokdiv.state):
        module.CHUNK = 16_384  # the real one; the fixture puts its own back
    names = [f"teacher{n}" for n in range(10)]
    table = ScoreTable(names, lambda position: f"train/n01440764/n01440764_{position:08d}.JPEG")
    scores = np.random.default_rng(0).random((16_384, 10, 4)).astype(np.float32)
    positions = np.arange(16_384)
    table.record(positions, [""] * 16_384, [None] * 16_384, list(range(10)), scores)
    table.progress.measured = dict.fromkeys(names, 16_384)
    State(tmp_path, {}).save(table)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 4_500_000


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
