"""A run's folder: one writer, also where the file system is odd, and nothing written through planted links."""

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Any

import pytest

import tokdiv.run_dir
from tokdiv.errors import RunError, UsageError
from tokdiv.run_dir import open_run_dir, read_config, read_json, write_atomic


def begin(folder: Path, text: str = "{}") -> Path:
    """A run that has begun."""
    with open_run_dir(folder, lambda config: None, resume=True) as run:
        (run / "config.json").write_text(text)
    return folder


def fail_with(code: int) -> Any:
    def call(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gets_a_warning(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", fail_with(code))
    with open_run_dir(tmp_path / "RUN", lambda config: None, resume=True) as run:
        assert run.is_dir()
    assert "this file system has no locks" in caplog.text


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO, errno.EBADF])
def test_a_folder_that_cannot_be_synced_does_not_matter(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"


def test_a_file_that_cannot_be_synced_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fail_with(errno.EIO))
    with pytest.raises(RunError, match=r"cannot write .*file': Input/output error"):
        write_atomic(tmp_path / "file", "content")
    assert list(tmp_path.iterdir()) == []


def test_no_resume_moves_what_a_link_points_to_and_the_link_stays(tmp_path: Path) -> None:
    disk = begin(tmp_path / "disk" / "RUN", '{"old": 1}')
    (tmp_path / "link").symlink_to(disk)
    with open_run_dir(tmp_path / "link", lambda config: None, resume=False) as run:
        (run / "config.json").write_text("{}")
    assert (tmp_path / "link").readlink() == disk
    assert read_config(disk.with_name("RUN.bak-1")) == {"old": 1}
    assert read_config(tmp_path / "link") == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_another_command_keeps_its_folder(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "RUN", lambda config: None, resume=True) as run:
        (run / "config.json").write_text("{}")
        for resume in (True, False):
            with (
                pytest.raises(UsageError, match="another process is writing to it"),
                open_run_dir(tmp_path / "RUN", lambda config: None, resume=resume),
            ):
                pass
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]


def test_what_a_kill_left_unfinished_is_removed_and_nothing_else(tmp_path: Path) -> None:
    run = begin(tmp_path / "RUN")
    (run / "state").mkdir()
    for name in ("x.json", "state/y.safetensors"):
        part = tokdiv.run_dir.part_of(run / name)
        part.write_text("half")
    part = tokdiv.run_dir.part_of(run / "student")
    part.mkdir()
    (part / "model.safetensors").write_text("half")
    (run / ".notes.part").write_text("the user's own")
    begin(run)
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    assert left == [".lock", ".notes.part", "config.json", "state"]


def test_a_run_that_was_killed_at_its_very_start_is_begun_again(tmp_path: Path) -> None:
    folder = tmp_path / "RUN"
    folder.mkdir()
    (folder / ".lock").touch()
    tokdiv.run_dir.part_of(folder / "config.json").write_text("{")
    begin(folder)


def test_no_file_is_written_through_a_planted_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for kind in ("link", "file"):
        planted = tmp_path / f".{kind}.0123456789abcdef.part"
        planted.symlink_to(victim) if kind == "link" else planted.hardlink_to(victim)
        monkeypatch.setattr(tokdiv.run_dir, "part_of", lambda path, planted=planted: planted)
        with pytest.raises(RunError, match="cannot write"):
            write_atomic(tmp_path / kind, "other")
        assert victim.read_text() == "precious"
    monkeypatch.undo()
    (tmp_path / "target").symlink_to(victim)
    write_atomic(tmp_path / "target", "other")  # the link itself is replaced
    assert victim.read_text() == "precious" and not (tmp_path / "target").is_symlink()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    run = tmp_path / "RUN"
    run.mkdir()
    (run / ".lock").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(UsageError, match="cannot be written to"),
        open_run_dir(run, lambda config: None, resume=True),
    ):
        pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "null", '{"a": ', "\udcff"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError):
        read_json(tmp_path / "config.json")
    with pytest.raises(UsageError, match=r"its config\.json is damaged"):
        begin(tmp_path)
