"""A run among others: its folder, its processes, and the signals that end it."""

import contextlib
import dataclasses
import json
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

from img2vec.checkpoint import Progress
from img2vec.config import FREE, option
from img2vec.data import Plan
from tokdiv.dist import Processes
from tokdiv.errors import UsageError

# SIGUSR1 is SLURM's warning before the end of a job: the run is unfinished, as after SIGTERM.
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
if hasattr(signal, "SIGUSR1"):
    EXIT_CODES[signal.SIGUSR1] = 143


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """The numbers of the signals that came in meanwhile; the loop acts on them between steps.

    A second SIGINT interrupts at once. Outside the main thread, where Python allows no handlers, signals
    keep their effect.
    """
    caught: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in caught:
            raise KeyboardInterrupt
        caught.append(number)

    with contextlib.suppress(ValueError):
        for name in EXIT_CODES:
            before[name] = signal.signal(name, note)
    try:
        yield caught
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def open_out(out: Path, run: dict[str, Any], resume: bool, team: Processes) -> filelock.FileLock:
    """Make or take up the run's folder, on the first process; a mistake is raised on all of them."""
    lock = filelock.FileLock(out / ".lock", timeout=0)
    message = None
    if team.rank == 0:
        try:
            if not resume and out.exists():
                number = 1
                while (backup := out.with_name(f"{out.name}.bak-{number}")).exists():
                    number += 1
                out.rename(backup)
                print(f"moved the old run to {backup}", file=sys.stderr)
            elif out.exists() and not out.is_dir():
                raise UsageError(f"-o '{out}' is a file: expected a folder")
            elif (out / "config.json").is_file():
                try:
                    old = json.loads((out / "config.json").read_text())
                except ValueError:
                    old = {}
                check_same_run(out, old, run)
            elif out.is_dir() and any(entry.name != ".lock" for entry in out.iterdir()):
                raise UsageError(
                    f"-o '{out}' holds other files and no run: give a new folder, or --no-resume to move it "
                    f"aside"
                )
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except UsageError as error:
            message = str(error)
        except filelock.Timeout:
            message = (
                f"-o '{out}': another process is writing to it; wait for it or give another folder"
            )
        except OSError as error:
            message = f"-o '{out}' cannot be written: {error.strerror or error}"
    message = team.broadcast(message)
    if message is not None:
        raise UsageError(message)
    return lock


def check_same_run(out: Path, old: Any, new: dict[str, Any]) -> None:
    """Raise UsageError, naming the difference, where `old` is another run than `new`."""
    remedy = "give the same settings, another -o, or --no-resume to begin anew"
    parts = ("config", "teacher", "data")
    if not isinstance(old, dict) or not all(isinstance(old.get(part), dict) for part in parts):
        raise UsageError(f"'{out}' holds no run of img2vec pretrain that can be read: {remedy}")
    free = set(FREE)
    if old.get("world") != new["world"]:
        free |= {"batch_size", "accumulate"}  # another number of processes splits the batch anew
    # Through JSON, so that tuples and lists are equal.
    before, after = (json.loads(json.dumps(r["config"])) for r in (old, new))
    for key in after:
        if key not in free and before.get(key) != after[key]:
            raise UsageError(
                f"'{out}' was begun with {option(key)} {before.get(key)}, now it is {after[key]}: {remedy}"
            )
    if old["data"].get("fingerprint") != new["data"]["fingerprint"]:
        raise UsageError(
            f"'{out}' was begun on other data ({old['data'].get('source')}, {old['data'].get('count')} "
            f"images): {remedy}"
        )
    teachers = [json.loads(json.dumps(r["teacher"])) for r in (old, new)]
    keys = [
        "architecture",
        "weights",
        "sha256",
        "block",
        "norm",
        "size",
        "mean",
        "std",
        "arguments",
    ]
    keys += ["seed", "num_tokens", "dim", "parameters"]
    for key in keys:
        if key == "weights" and teachers[0].get("sha256"):
            continue  # a file may move; its hash tells
        if teachers[0].get(key) != teachers[1].get(key):
            raise UsageError(
                f"'{out}' was begun with the teacher {teachers[0].get('name')} ({key} "
                f"{teachers[0].get(key)}), now it is {teachers[1].get('name')} ({teachers[1].get(key)}): {remedy}"
            )


def resumed(
    progress: Progress, plan: Plan, team: Processes, say: Callable[[str], None]
) -> Progress:
    """Where a run goes on: at the very step, or at the next epoch with another number of processes."""
    where = f"resuming at step {progress.step}, epoch {progress.epoch}"
    if progress.world != team.world and progress.step_in_epoch:
        where += f": begun on {progress.world} processes, now {team.world}, so on to the next epoch"
        progress = dataclasses.replace(progress, epoch=progress.epoch + 1, step_in_epoch=0)
    say(where)
    return dataclasses.replace(progress, world=team.world, global_batch=plan.global_batch)
