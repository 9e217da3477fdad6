"""What a run writes while it goes: progress, metrics.jsonl, TensorBoard, Weights & Biases, skipped images."""

import csv
import importlib.util
import json
import logging
import math
import os
import threading
import time
import types
import uuid
from pathlib import Path
from typing import Any, Self

from img2vec.figures import plot_loss
from img2vec.resume import Progress
from img2vec.step import StepResult, Training
from tokdiv.data.source import Source
from tokdiv.dist import Processes
from tokdiv.errors import UsageError, first_line
from tokdiv.progress import progress_bar
from tokdiv.run_dir import write_atomic

log = logging.getLogger(__name__)

METRICS, PICTURE, SKIPPED = "metrics.jsonl", "loss.png", "skipped.csv"
EVENTS_EVERY = 10  # steps between the points of TensorBoard and Weights & Biases
# Seconds to wait for Weights & Biases: at the start, before the run is recorded offline, and at the end.
WANDB_START, WANDB_FINISH = 30, 120


class RunLog:
    """The writers of one run; only rank 0 writes.

    A context: leaving it draws loss.png and closes the writers, which are told of a failure.

    Args:
        out: the run's folder.
        step: steps made before; lines of later ones are dropped. end: the step to stop at.
        run: the content of config.json.
    """

    def __init__(
        self, out: Path, step: int, end: int, group: Processes, run: dict[str, Any]
    ) -> None:
        self.out, self.is_first = out, group.rank == 0
        self.evaluated: int | None = None  # the step of the last evaluation, on rank 0
        self._clock = time.perf_counter()
        self._bar = progress_bar(
            total=end, initial=step, desc="pretrain", unit="step", show=self.is_first
        )
        self._wandb: Any = None
        self._events: Any = None
        if not self.is_first:
            return
        self.evaluated = truncate_metrics(out / METRICS, step)
        self._metrics = (out / METRICS).open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(out), purge_step=step + 1 if step else None)
        except ImportError:
            log.warning("tensorboard is not installed: no events are written")
        if run["config"]["wandb"]:
            self._wandb = _start_wandb(out, run)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._bar.close()
        if not self.is_first:
            return
        self._metrics.close()
        try:
            plot_loss(self.out / METRICS, self.out / PICTURE)
        except (OSError, ValueError) as failure:  # the picture is not worth the run
            log.warning("%s was not drawn: %s", PICTURE, failure)
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def step(self, progress: Progress, epoch: int, lr: float, result: StepResult) -> None:
        """Log one optimizer step; `progress` is that after it."""
        before, self._clock = self._clock, time.perf_counter()
        self._bar.update()
        if not self.is_first:
            return
        line = {
            "step": progress.step,
            "epoch": epoch,
            "loss": finite(result.loss),
            "patch_loss": finite(result.patch_loss),
            "global_loss": finite(result.global_loss),
            "lr": lr,
            "images_per_second": round(progress.global_batch / (self._clock - before), 2),
            "images": result.num_images,
            "grad_norm": finite(result.grad_norm),
            "skipped_steps": progress.skipped,
        }
        if result.token_similarity is not None:
            line["token_similarity"] = finite(result.token_similarity)
        self._write(line)
        self._bar.set_postfix(
            loss="not finite" if line["loss"] is None else f"{result.loss:.4f}",
            lr=f"{lr:.2e}",
            imgs=f"{line['images_per_second']:.0f}/s",
            refresh=False,
        )
        if progress.step % EVENTS_EVERY == 0 or progress.step == 1:
            self._report(line, "train")

    def evaluation(self, line: dict[str, Any]) -> None:
        """Log a measurement between steps; it has no `loss`, and its time does not count as a step's."""
        self._clock = time.perf_counter()
        if self.is_first:
            self._write(line)
            self._report(line, "evaluation")
            self.evaluated = line["step"]

    def _write(self, line: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def _report(self, line: dict[str, Any], kind: str) -> None:
        values = {k: v for k, v in line.items() if k != "step" and v is not None}
        if self._events is not None:
            for key, value in values.items():
                self._events.add_scalar(f"{kind}/{key}", value, line["step"])
        if self._wandb is not None:
            # The step is a value among others, the x axis of `_start_wandb`: wandb's own counter never goes
            # back, so it would refuse the steps that are repeated after a kill.
            named = {f"{kind}/{k}": v for k, v in values.items()}
            self._wandb.log({"step": line["step"], **named})


def log_headline(source: Source, training: Training) -> None:
    """Say what the run is, in a few lines."""
    config, plan, group = training.config, training.plan, training.group
    teacher, layout = training.teacher, training.model.layout
    millions = sum(p.numel() for p in training.model.encoder.parameters()) / 1e6
    for line in (
        f"student: {config.student}, {millions:.1f} M parameters, {training.dtype} on {group.device}",
        f"teacher: {teacher.name}, {teacher.grid[0]} x {teacher.grid[1]} tokens of {teacher.dim}",
        f"data: {source.name}, {plan.images:,} images; {layout.num_masked} of {layout.num_units} units of "
        f"{config.mask_unit} px are masked",
        f"global batch: {plan.global_batch} = {plan.batch_size} images x {group.world} processes x "
        f"{plan.accumulate} accumulated; {plan.steps} steps an epoch",
        f"peak learning rate: {config.peak_lr(plan.global_batch):.3g}",
    ):
        log.info("%s", line)
    wanted = config.batch_size * config.accumulate * group.world
    if plan.images < wanted:
        text = "a batch of %d images is larger than the data: each step takes all %d images once"
        log.warning(text, wanted, plan.images)
    for warning in source.warnings:
        log.warning("%s", warning)


def finite(value: float) -> float | None:
    """NaN and infinity are not JSON."""
    return value if math.isfinite(value) else None


def truncate_metrics(path: Path, step: int) -> int | None:
    """Drop the lines of later steps than `step`, which will be repeated, and a last line that was cut.

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


# Weights & Biases --------------------------------------------------------------------------------


def check_wandb() -> None:
    """Raise UsageError where Weights & Biases is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise UsageError(
            "--wandb: wandb is not installed; pip install wandb, or leave the option out"
        )


def _start_wandb(out: Path, run: dict[str, Any]) -> Any:
    """The run at Weights & Biases: the one whose id OUT holds, else a new one; offline if it must be."""
    import wandb

    note = out / "wandb" / "id"
    if not note.is_file():
        note.parent.mkdir(exist_ok=True)
        write_atomic(note, uuid.uuid4().hex)
    options: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", "img2vec"),
        "name": out.resolve().name,
        "id": note.read_text().strip(),
        "dir": str(out),
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
        log.warning(
            "Weights & Biases: %s; the run is recorded offline: upload it with `wandb sync %s/offline-run-*`",
            first_line(error).rstrip(". "),
            out / "wandb",
        )
        wandb.teardown()  # its background service still holds the id
        started = wandb.init(**options, mode="offline", settings=wandb.Settings(**waits))
    started.define_metric("*", step_metric="step")
    return started


# Skipped images ----------------------------------------------------------------------------------


class Skipped:
    """Lists each image that could not be used once in skipped.csv."""

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
