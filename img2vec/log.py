"""What a run says while it goes: a bar, metrics.jsonl, TensorBoard, Weights & Biases, skipped images."""

import csv
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from tqdm import tqdm

from img2vec.checkpoint import truncate_metrics
from img2vec.plots import plot_loss
from tokdiv.errors import UsageError

METRICS, PICTURE, SKIPPED = "metrics.jsonl", "loss.png", "skipped.csv"
EVENTS_EVERY = 10  # steps between TensorBoard's points


class Log:
    """The writers of one run; on other processes than the first it stays silent.

    Args:
        out: the run's folder. step: steps done before; lines behind it are dropped.
        total: steps of the whole run. main: whether this is the process that writes.
        wandb: whether to report to Weights & Biases. settings: for it, the run's settings.

    Raises:
        UsageError: `wandb` is not installed.
    """

    def __init__(
        self, out: Path, step: int, total: int, main: bool, wandb: bool, settings: dict[str, Any]
    ) -> None:
        self.out, self.main = out, main
        self.bar = tqdm(
            total=total, initial=step, desc="pretrain", unit="step", disable=None if main else True
        )
        self._wandb: Any = None
        self._events: Any = None
        if not main:
            return
        truncate_metrics(out / METRICS, step)
        self._metrics = (out / METRICS).open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(out), purge_step=step + 1 if step else None)
        except ImportError:
            print("tensorboard is not installed: no events are written", file=sys.stderr)
        if wandb:
            try:
                import wandb as reporter
            except ImportError:
                raise UsageError(
                    "--wandb: wandb is not installed; pip install wandb, or leave the option out"
                ) from None
            self._wandb = reporter.init(dir=str(out), config=settings, resume="allow", id=out.name)

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

    def say(self, text: str) -> None:
        """A remark on stderr that does not tear the bar."""
        if self.main:
            self.bar.write(text, file=sys.stderr)

    def draw(self) -> None:
        """Bring loss.png up to date."""
        if self.main:
            plot_loss(self.out / METRICS, self.out / PICTURE)

    def close(self) -> None:
        """Write out what is left."""
        self.bar.close()
        if not self.main:
            return
        self._metrics.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, line: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def _report(self, line: dict[str, Any], group: str) -> None:
        values = {k: v for k, v in line.items() if k != "step" and v is not None}
        if self._events is not None:
            for key, value in values.items():
                self._events.add_scalar(f"{group}/{key}", value, line["step"])
        if self._wandb is not None:
            self._wandb.log({f"{group}/{k}": v for k, v in values.items()}, step=line["step"])


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
