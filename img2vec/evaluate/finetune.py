"""Fine-tuning of the whole network with a classifier: MAE's recipe (arXiv 2111.06377, app. A.1, table 9)."""

import dataclasses
import json
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from img2vec.checkpoint import (
    load_training_state,
    read_checkpoint,
    training_state,
    write_checkpoint,
)
from img2vec.evaluate.augment import randaugment, training_steps
from img2vec.evaluate.classifier import build_classifier, mean_and_std, parameter_groups
from img2vec.evaluate.encoder import load_encoder
from img2vec.evaluate.labeled import LabeledData, open_labeled
from img2vec.evaluate.results import Results, describe_data
from img2vec.evaluate.settings import FinetuneSettings, Recipe, peak_lr, warmup_note
from img2vec.evaluate.supervised import make_mixing, measure_accuracy, rate_at, train_step
from img2vec.export import save_model
from tokdiv.data.source import storable
from tokdiv.dist import (
    Interruption,
    Processes,
    caught_signals,
    choose_device,
    choose_dtype,
    current_processes,
    default_workers,
    lost_peers,
)
from tokdiv.errors import Interrupted, RunError, UsageError
from tokdiv.progress import progress_bar
from tokdiv.run_dir import locked_folder
from tokdiv.teachers.teacher import Teacher

CHECKPOINT, KIND = "checkpoint.pt", "img2vec finetune"
FREE = ("micro_batch_size", "workers", "device")  # settings that may change when a run is resumed


@dataclass(frozen=True)
class Progress:
    """The epochs done.

    history: one entry per epoch: epoch, loss, lr, and val_ with each metric.
    unusable: positions of the training images found unusable. num_val: number of usable val images.
    """

    history: list[dict[str, float]]
    unusable: list[int]
    num_val: int

    def is_of(self, recipe: Recipe, train_data: LabeledData, val_data: LabeledData) -> bool:
        """Whether a run with this recipe and data can be here; a checkpoint may hold anything."""
        epochs = [entry["epoch"] for entry in self.history]
        return (
            epochs == list(range(len(epochs)))
            and len(epochs) <= recipe.epochs
            and all({"loss", "lr", "val_top1", "val_loss"} <= set(entry) for entry in self.history)
            and all(type(v) in (int, float) for entry in self.history for v in entry.values())
            and set(self.unusable) <= set(range(len(train_data)))
            and 0 <= self.num_val <= len(val_data)
        )


def finetune(
    model: str | Path | Teacher,
    train: str,
    val: str,
    out: str | Path | None = None,
    **options: Any,
) -> Results:
    """Accuracy of the network fine-tuned for the classes of `train`.

    A ViT classifies the average of its patch tokens after a new norm (timm's `fc_norm`). The state is saved
    after each epoch; the same call goes on from there.

    Args:
        model: see `load_encoder`; a whole timm model.
        train, val: DATA with classes.
        out: folder for results.json, results.csv, model/ (the classifier, in timm's format) and, until it is
            done, checkpoint.pt; None writes nothing.
        options: fields of `FinetuneSettings`. With bfloat16 the forward pass is autocast; weights are float32.

    Returns:
        top1, top5 (from five classes on) and loss on `val` after the last epoch. No epoch is selected by
        its accuracy on `val`.

    Raises:
        UsageError, RunError: see `load_encoder` and `open_labeled`; a model that is no whole timm model;
            a loss that is not finite.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 came; only with `out`.
    """
    given = FinetuneSettings(**options)
    train_data, val_data = open_labeled(train, val)
    device = choose_device(given.device)
    group = current_processes(device)
    teacher = load_encoder(model, image_size=given.image_size, device="cpu", dtype="float32")
    recipe = _decide(given, teacher, len(train_data), group)
    notes = warmup_note(recipe.warmup_epochs, recipe.epochs)
    if recipe.batch_size < given.batch_size:
        notes.append(
            f"batch of {recipe.batch_size}: there are {len(train_data)} training images, "
            f"{group.world} processes"
        )
    with ExitStack() as stack:
        folder = None
        if out is not None:
            folder = group.on_first(lambda: stack.enter_context(locked_folder(out)))
        cuda = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        torch.manual_seed(recipe.seed)
        network, arguments, untrained = build_classifier(
            teacher, train_data.num_classes, recipe.drop_path
        )
        notes.append(f"starts untrained: {', '.join(untrained)}")
        network.to(device)
        progress = _train(network, teacher, train_data, val_data, recipe, group, folder)
        last = progress.history[-1]
        recorded = {k: v for k, v in vars(recipe).items() if k not in FREE}
        skipped = len(progress.unusable), len(val_data) - progress.num_val
        results = Results(
            task="finetune",
            model=storable(teacher.name),
            metrics={k[4:]: v for k, v in last.items() if k.startswith("val_")},
            settings=recorded,
            data=describe_data(train_data, val_data, *skipped),
            notes=notes,
            history=progress.history,
        )
        if folder is not None:
            classes = train_data.classes
            group.on_first(partial(_write, folder, results, network, arguments, teacher, classes))
    return results


def _write(
    folder: Path,
    results: Results,
    network: nn.Module,
    arguments: dict[str, Any],
    teacher: Teacher,
    classes: list[str],
) -> None:
    """Write the classifier and the results; only then the checkpoint is no longer needed."""
    mean, std = mean_and_std(teacher)
    save_model(
        network,
        teacher.spec.architecture,
        folder / "model",
        model_args=arguments,
        mean=mean,
        std=std,
        input_size=teacher.size,
        description={"task": "finetune", "top1": results.metrics["top1"]},
        label_names=[storable(name) for name in classes],
    )
    results.write(folder)
    (folder / CHECKPOINT).unlink(missing_ok=True)


def _decide(given: FinetuneSettings, teacher: Teacher, num_train: int, group: Processes) -> Recipe:
    """Decide the batch, learning rate, size, dtype and workers that were left open."""
    batch_size = min(given.batch_size, num_train)
    batch_size -= batch_size % (2 * group.world)  # equal parts per process, of pairs to mix
    if not batch_size:
        raise UsageError(
            f"a batch of {min(given.batch_size, num_train)} images for {group.world} processes: each needs "
            f"two or more"
        )
    decided = {
        "batch_size": batch_size,
        "micro_batch_size": given.micro_batch_size or batch_size // group.world,
        "lr": peak_lr(given, batch_size),
        "image_size": teacher.size,
        "dtype": choose_dtype(given.dtype, group.device),
        "workers": default_workers() if given.workers is None else given.workers,
    }
    return Recipe(**{**vars(given), **decided})


# Training ----------------------------------------------------------------------------------------


def _train(
    network: nn.Module,
    teacher: Teacher,
    train_data: LabeledData,
    val_data: LabeledData,
    recipe: Recipe,
    group: Processes,
    folder: Path | None,
) -> Progress:
    """Train to the last epoch, and measure the accuracy on `val_data` after each."""
    device = group.device
    optimizer = torch.optim.AdamW(
        parameter_groups(network, recipe.weight_decay, recipe.layer_decay),
        lr=recipe.lr,
        fused=device.type == "cuda",
    )
    identity = _identity(teacher, train_data, val_data, recipe, group)
    progress = _resume(
        folder, identity, network, optimizer, lambda p: p.is_of(recipe, train_data, val_data)
    )
    if group.max(len(progress.history)) != -group.max(-len(progress.history)):
        raise UsageError(
            f"'{folder}' is not seen by all processes: -o must lie on a file system that they share"
        )
    model = _data_parallel(network, group)
    mixing = make_mixing(recipe, train_data.num_classes)
    mean, std = mean_and_std(teacher)
    augmentation = randaugment(
        teacher.size,
        auto_augment=recipe.auto_augment,
        reprob=recipe.reprob,
        mean=mean,
        std=std,
    )
    num_steps = len(train_data) // recipe.batch_size
    with (
        caught_signals() if folder is not None else nullcontext(Interruption()) as interruption,
        progress_bar(
            total=recipe.epochs * num_steps,
            initial=len(progress.history) * num_steps,
            desc="finetune",
            unit="step",
            show=group.rank == 0,
        ) as bar,
    ):
        for epoch in range(len(progress.history), recipe.epochs):
            # Drop path draws from the device's generator; a resumed run must draw the same.
            entropy = np.random.SeedSequence([recipe.seed, epoch, group.rank])
            torch.manual_seed(int(entropy.generate_state(1)[0]))
            losses: list[Tensor] = []
            unusable = set(progress.unusable)
            for step in training_steps(
                train_data,
                augmentation,
                batch_size=recipe.batch_size,
                micro_batch_size=recipe.micro_batch_size,
                first_epoch=epoch,
                epochs=epoch + 1,
                seed=recipe.seed,
                workers=recipe.workers,
                pin_memory=device.type == "cuda",
            ):
                loss, skipped = train_step(model, optimizer, step, recipe, mixing, group)
                losses.append(loss)
                unusable.update(skipped)
                bar.update()
                if signal := group.max(interruption.signal):
                    raise Interrupted(signal, f"{epoch} epochs")
            mean_loss = float(group.sum(torch.stack(losses).mean())) / group.world
            if not np.isfinite(mean_loss):
                raise RunError(
                    f"the loss of epoch {epoch} is {mean_loss}: use a lower --blr, or --dtype float32"
                )
            accuracy, num_val = measure_accuracy(
                network, val_data, teacher.mean.to(device), teacher.std.to(device), recipe, group
            )
            last_rate = rate_at(step.epoch + step.step / step.num_steps, recipe)
            entry = {"epoch": epoch, "loss": mean_loss, "lr": last_rate}
            entry |= {f"val_{name}": value for name, value in accuracy.items()}
            found = group.gather_rows(torch.tensor(sorted(unusable), dtype=torch.int64))
            progress = Progress([*progress.history, entry], sorted(set(found.tolist())), num_val)
            if folder is not None:
                state = training_state(network, optimizer)  # on every process
                state |= {"identity": identity, "progress": dataclasses.asdict(progress)}
                group.on_first(partial(write_checkpoint, folder / CHECKPOINT, KIND, state))
            bar.set_postfix(loss=f"{mean_loss:.3f}", top1=f"{accuracy['top1']:.3f}")
    return progress


def _data_parallel(network: nn.Module, group: Processes) -> nn.Module:
    """The network in DDP where there are several processes."""
    if group.world == 1:
        return network
    cuda = [group.device] if group.device.type == "cuda" else None
    with lost_peers():
        return DistributedDataParallel(network, device_ids=cuda)


# Resuming ----------------------------------------------------------------------------------------


def _identity(
    teacher: Teacher,
    train_data: LabeledData,
    val_data: LabeledData,
    recipe: Recipe,
    group: Processes,
) -> str:
    """What must be equal for a run to be resumed, as JSON."""
    identity = {
        "model": teacher.spec.identity(),
        "train": train_data.source.fingerprint,
        "val": val_data.source.fingerprint,
        "settings": {k: v for k, v in vars(recipe).items() if k not in FREE},
        "world": group.world,
    }
    return json.dumps(identity, sort_keys=True)


def _resume(
    folder: Path | None,
    identity: str,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    is_possible: Callable[[Progress], bool],
) -> Progress:
    """Load the checkpoint of the same run, where there is one. Another run's is an error, never overwritten."""
    path = None if folder is None else folder / CHECKPOINT
    if path is None or not path.is_file():
        return Progress([], [], 0)
    remedy = "delete it to start anew, or give another folder with -o"
    try:
        state = read_checkpoint(path, KIND)
        if state.get("identity") != identity:
            raise UsageError(f"'{path}' is of a fine-tuning with other settings")
        progress = Progress(**state["progress"])
        if not is_possible(progress):
            raise ValueError
        load_training_state(network, optimizer, state, path)
    except UsageError as error:
        raise UsageError(f"{error}; {remedy}") from None
    except (TypeError, ValueError, KeyError):
        raise UsageError(
            f"'{path}' is damaged: its progress is not that of a run; {remedy}"
        ) from None
    return progress
