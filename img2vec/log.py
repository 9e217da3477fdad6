"""What a run says while it goes: a bar, metrics.jsonl, TensorBoard, Weights & Biases, skipped images."""

import csv
import importlib.util
import json
import os
import sys
import threading
import types
import uuid
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from img2vec.figures import plot_loss
from tokdiv.errors import UsageError
from tokdiv.run_dir import write_atomic

METRICS, PICTURE, SKIPPED = "metrics.jsonl", "loss.png", "skipped.csv"
EVENTS_EVERY = 10  # steps between the points of TensorBoard and Weights & Biases
# Seconds to wait for Weights & Biases: at the start, before the run is recorded offline, and at the end.
WANDB_START, WANDB_FINISH = 30, 120


class Log:
    """The writers of one run; on other processes than the first it stays silent.

    A context: leaving it draws loss.png and ends what was begun, marked as failed after an exception.

    Args:
        out: the run's folder. step: steps done before; lines behind it are dropped.
        total: steps of the whole run. main: whether this is the process that writes.
        wandb: whether to report to Weights & Biases. run: what config.json holds.
    """

    def __init__(
        self, out: Path, step: int, total: int, main: bool, wandb: bool, run: dict[str, Any]
    ) -> None:
        self.out, self.main = out, main
        self.evaluated: int | None = None  # the step of the last evaluation, on the main process
        self.bar = tqdm(
            total=total, initial=step, desc="pretrain", unit="step", disable=None if main else True
        )
        self._wandb: Any = None
        self._events: Any = None
        if not main:
            return
        self.evaluated = truncate_metrics(out / METRICS, step)
        self._metrics = (out / METRICS).open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(out), purge_step=step + 1 if step else None)
        except ImportError:
            self.say("tensorboard is not installed: no events are written")
        if wandb:
            self._wandb = self._start_wandb(run)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.bar.close()
        if not self.main:
            return
        self._metrics.close()
        self.draw()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def step(self, line: dict[str, Any]) -> None:
        """One optimizer step."""
        self.bar.update()
        if not self.main:
            return
        self._write(line)
        self.bar.set_postfix(
            loss=f"{line['loss']:.4f}" if line["loss"] is not None else "not finite",
            lr=f"{line['lr']:.2e}",
            imgs=f"{line['images_per_second']:.0f}/s",
            refresh=False,
        )
        if line["step"] % EVENTS_EVERY == 0 or line["step"] == 1:
            self._report(line, "train")

    def evaluation(self, line: dict[str, Any]) -> None:
        """A measurement between steps; it has no `loss`."""
        if self.main:
            self._write(line)
            self._report(line, "evaluation")
            self.evaluated = line["step"]

    def say(self, text: str) -> None:
        """A remark on stderr that does not tear the bar."""
        if self.main:
            self.bar.write(text, file=sys.stderr)

    def draw(self) -> None:
        """Bring loss.png up to date; a picture that cannot be drawn costs no run."""
        try:
            plot_loss(self.out / METRICS, self.out / PICTURE)
        except (OSError, ValueError) as error:
            self.say(f"remark: {PICTURE} was not drawn: {error}")

    def _write(self, line: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def _report(self, line: dict[str, Any], group: str) -> None:
        values = {k: v for k, v in line.items() if k != "step" and v is not None}
        if self._events is not None:
            for key, value in values.items():
                self._events.add_scalar(f"{group}/{key}", value, line["step"])
        if self._wandb is not None:
            # The step is a value among others, the x axis of `_start_wandb`: wandb's own counter never
            # goes back, so that it would refuse the steps repeated after a kill.
            named = {f"{group}/{k}": v for k, v in values.items()}
            self._wandb.log({"step": line["step"], **named})

    def _start_wandb(self, run: dict[str, Any]) -> Any:
        """The run at Weights & Biases: the one that OUT names, else a new one, offline where need be."""
        import wandb

        name = self.out.resolve().name
        note = self.out / "wandb" / "id"
        if not note.is_file():
            note.parent.mkdir(exist_ok=True)
            write_atomic(note, uuid.uuid4().hex)
        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "img2vec"),
            "name": name,
            "id": note.read_text().strip(),
            "dir": str(self.out),
            "config": {**run["config"], **{k: v for k, v in run.items() if k != "config"}},
            "resume": "allow",
            "allow_val_change": True,  # some settings may change when a run is resumed
        }
        waits: dict[str, Any] = {"init_timeout": WANDB_START}
        if "finish_timeout" in getattr(wandb.Settings, "model_fields", ()):
            waits["finish_timeout"] = WANDB_FINISH
        try:
            started = wandb.init(**options, settings=wandb.Settings(**waits))
        except wandb.errors.Error as error:
            reason = str(error).split("\n")[0].rstrip(". ")
            self.say(
                f"remark: Weights & Biases: {reason}; the run is recorded offline: upload it with "
                f"`wandb sync {self.out / 'wandb'}/offline-run-*`"
            )
            wandb.teardown()  # its background service still holds the id
            started = wandb.init(**options, mode="offline", settings=wandb.Settings(**waits))
        started.define_metric("*", step_metric="step")
        return started


def check_wandb() -> None:
    """Raise UsageError where Weights & Biases is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise UsageError(
            "--wandb: wandb is not installed; pip install wandb, or leave the option out"
        )


class Skipped:
    """Images that could not be used: counted, and listed once each in skipped.csv."""

    def __init__(self, out: Path) -> None:
        self.path = out / SKIPPED
        self._lock = threading.Lock()
        self._keys: set[str] = set()
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                self._keys = {row[0] for row in csv.reader(file) if row}

    def __call__(self, key: str, reason: str) -> None:
        """Take note of an image; called from decoding threads."""
        with self._lock:
            if key in self._keys:
                return
            self._keys.add(key)
            # One short write at the end of the file, so that processes do not tear each other's lines.
            with self.path.open("a", newline="", encoding="utf-8") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    csv.writer(file).writerow(["key", "reason"])
                csv.writer(file).writerow([key, reason])


def truncate_metrics(path: Path, step: int) -> int | None:
    """Drop the lines of steps after `step`, and a last line that was cut, so that none repeats.

    Returns:
        The step of the last evaluation that is left, a line without `loss`; None where there is none.
    """
    if not path.is_file():
        return None
    kept, evaluated = [], None
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            values = json.loads(line)
            if line.endswith(b"\n") and values["step"] <= step:
                kept.append(line)
                evaluated = evaluated if "loss" in values else values["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    write_atomic(path, b"".join(kept))
    return evaluated
