"""Progress: lines in a log file, a bar in a terminal, nothing from the other processes."""

import io
import logging
import sys

import pytest

import tokdiv.progress
from tokdiv.progress import progress_bar


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which every update is 20 s after the one before."""
    now = iter(range(0, 10**6, 20))
    monkeypatch.setattr(tokdiv.progress.time, "monotonic", lambda: next(now))


def test_a_log_file_gets_a_line_every_30_seconds(
    hurried: None, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "tokdiv")
    with progress_bar(total=50, initial=10, desc="rank", unit="image") as bar:
        for _ in range(8):
            bar.update(5)
            bar.set_postfix(loss=1.5)
    assert 3 <= len(caplog.messages) <= 10
    assert caplog.messages[0].startswith("rank: ") and "/50 [" in caplog.messages[0]
    assert "loss=1.5" in caplog.messages[-1]
    assert capsys.readouterr() == ("", "")


def test_a_short_run_says_nothing(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "tokdiv")
    assert list(progress_bar(range(5))) == [0, 1, 2, 3, 4]
    assert caplog.messages == [] and capsys.readouterr() == ("", "")


def test_work_of_unknown_length_has_no_percentage(
    hurried: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tokdiv")
    with progress_bar(unit="step") as bar:
        for _ in range(5):
            bar.update()
            bar.refresh()
    assert caplog.messages and not any("%" in line or "?" in line for line in caplog.messages)


def test_a_terminal_gets_a_bar_and_only_on_the_first_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    list(progress_bar(range(3), desc="hidden", show=False))
    assert terminal.getvalue() == ""
    list(progress_bar(range(3), desc="shown"))
    assert "shown: 100%" in terminal.getvalue()
