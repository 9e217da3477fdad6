"""Fine-tuning of the whole network with a classifier: MAE's recipe (arXiv 2111.06377, app. A.1, table 9)."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from img2vec.evaluate.augment import randaugment, training_steps
from img2vec.evaluate.classifier import build_classifier, mean_and_std, parameter_groups
from img2vec.evaluate.encoder import load_encoder, precision
from img2vec.evaluate.features import (
    check_positive,
    default_workers,
    enough_memory,
    gather_rows,
    process,
    sum_over_processes,
)
from img2vec.evaluate.labeled import LabeledData, open_labeled
from img2vec.evaluate.optimization import learning_rate, warmup_remark
from img2vec.evaluate.results import Results, describe_data
from img2vec.evaluate.supervised import Recipe, accumulate_gradient, measure_accuracy, mixing_of
from img2vec.export import save_model
from tokdiv.dist import choose_device
from tokdiv.errors import RunError, UsageError
from tokdiv.teachers.teacher import Teacher

CHECKPOINT = "checkpoint.pt"


def finetune(
    model: str | Path | Teacher,
    train: str,
    val: str,
    out: str | Path | None = None,
    *,
    epochs: int = 100,
    batch_size: int = 1024,
    micro_batch_size: int | None = None,
    blr: float = 5e-4,
    lr: float | None = None,
    min_lr: float = 1e-6,
    warmup_epochs: float = 5,
    weight_decay: float = 0.05,
    layer_decay: float = 0.65,
    drop_path: float = 0.1,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    smoothing: float = 0.1,
    auto_augment: str = "rand-m9-mstd0.5-inc1",
    reprob: float = 0.25,
    image_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
) -> Results:
    """Accuracy of the network fine-tuned for the classes of `train`.

    A ViT classifies the average of its patch tokens behind a new norm (timm's `fc_norm`). Goes on from
    OUT/checkpoint.pt, written after each epoch, where that is of the same call.

    Args:
        model: see `load_encoder`; a whole network of timm's.
        train, val: DATA with classes.
        out: folder for results.json, results.csv and model/ (the classifier, in timm's format); None
            writes nothing.
        batch_size: of all processes together; at most the number of training images.
        micro_batch_size: images of one process in a forward pass; None for all of its batch. Smaller ones
            take less memory and more time; the gradient is that of the whole batch.
        blr: base learning rate: lr = blr * batch_size / 256. lr: instead of it.
        layer_decay: the learning rate of a layer is that of the next one times this.
        mixup, cutmix, reprob: 0 turns it off. auto_augment: in timm's notation; "" turns it off.
        image_size, device, dtype: see `load_encoder`; bfloat16 is autocast, the weights are float32.
        workers: decoding threads of one process; None for one per core.

    Returns:
        top1, top5 (from five classes on) and loss on `val` after the last epoch: none is chosen by its
        accuracy there.

    Raises:
        UsageError, RunError: see `load_encoder` and `open_labeled`; a model that is no whole network of
            timm's; a loss that is not finite.
    """
    check_positive(epochs=epochs, batch_size=batch_size, layer_decay=layer_decay)
    if micro_batch_size is not None:
        check_positive(micro_batch_size=micro_batch_size)
    learn, measure = open_labeled(train, val)
    place = choose_device(device)
    teacher = load_encoder(model, image_size=image_size, device="cpu", dtype="float32")
    rank, world = process()
    used = min(batch_size, len(learn))
    used -= used % (2 * world)  # each process has a part of one size, of pairs to mix
    if not used:
        raise UsageError(
            f"a batch of {min(batch_size, len(learn))} images for {world} processes: each needs two or more"
        )
    recipe = Recipe(
        epochs=epochs,
        batch_size=used,
        lr=blr * used / 256 if lr is None else lr,
        min_lr=min_lr,
        warmup_epochs=warmup_epochs,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        drop_path=drop_path,
        mixup=mixup,
        cutmix=cutmix,
        smoothing=smoothing,
        auto_augment=auto_augment,
        reprob=reprob,
        image_size=teacher.size,
        dtype=precision(dtype, place),
        seed=seed,
    )
    notes = warmup_remark(warmup_epochs, epochs)
    if used < batch_size:
        notes.append(f"batch of {used}: there are {len(learn)} training images, {world} processes")
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        network, arguments, fresh = build_classifier(teacher, learn.num_classes, drop_path)
        notes += [f"starts untrained: {', '.join(fresh)}"]
        network.to(place)
        history, skipped, counts = _train(
            network,
            teacher,
            learn,
            measure,
            recipe,
            micro_batch_size=micro_batch_size or used // world,
            workers=default_workers() if workers is None else workers,
            folder=None if out is None else Path(out),
            identity={
                "model": _identity(teacher),
                "train": learn.source.fingerprint,
                "val": measure.source.fingerprint,
            },
        )
    num_classified = counts.pop("images")
    results = Results(
        task="finetune",
        model=teacher.name,
        metrics=counts,
        settings={**recipe.__dict__, "blr": blr},
        data=describe_data(learn, measure, skipped, len(measure) - int(num_classified)),
        notes=notes,
        history=history,
    )
    if out is not None and rank == 0:
        mean, std = mean_and_std(teacher)
        save_model(
            network,
            teacher.spec.architecture,
            Path(out) / "model",
            model_args=arguments,
            mean=mean,
            std=std,
            input_size=teacher.size,
            description={"task": "finetune", "top1": counts["top1"]},
            label_names=learn.classes,
        )
        results.write(out)
        (Path(out) / CHECKPOINT).unlink(missing_ok=True)
    return results


# Training ----------------------------------------------------------------------------------------


def _train(
    network: nn.Module,
    teacher: Teacher,
    learn: LabeledData,
    measure: LabeledData,
    recipe: Recipe,
    *,
    micro_batch_size: int,
    workers: int,
    folder: Path | None,
    identity: dict[str, Any],
) -> tuple[list[dict[str, Any]], int, dict[str, float]]:
    """Train and measure each epoch: the history, unusable training images, the last measurement."""
    rank, world = process()
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(
        parameter_groups(network, recipe.weight_decay, recipe.layer_decay),
        lr=recipe.lr,
        fused=device.type == "cuda",
    )
    trained: nn.Module = network
    if world > 1:
        trained = DistributedDataParallel(
            network, device_ids=[device] if device.type == "cuda" else None
        )
    identity = json.loads(json.dumps({**identity, **recipe.__dict__, "world": world}))
    history: list[dict[str, Any]] = []
    unusable: set[int] = set()
    first = _resume(folder, identity, network, optimizer, history, unusable)
    # This gather is also the barrier that keeps the first process from writing while another reads.
    if len(set(gather_rows(torch.tensor([first]), device).tolist())) > 1:
        raise UsageError(
            f"'{folder}' is not seen by all processes: OUT must lie on a file system that they share"
        )
    mixing = mixing_of(recipe, learn.num_classes)
    mean, std = teacher.mean.to(device), teacher.std.to(device)
    transform_mean, transform_std = mean_and_std(teacher)
    augmentation = randaugment(
        recipe.image_size,
        auto_augment=recipe.auto_augment,
        reprob=recipe.reprob,
        mean=transform_mean,
        std=transform_std,
    )
    steps = training_steps(
        learn,
        augmentation,
        batch_size=recipe.batch_size,
        micro_batch_size=micro_batch_size,
        first_epoch=first,
        epochs=recipe.epochs,
        seed=recipe.seed,
        workers=workers,
        pin_memory=device.type == "cuda",
    )
    measured: dict[str, float] = dict(history[-1]["val"]) if history else {}
    losses: list[Tensor] = []
    num_steps = len(learn) // recipe.batch_size
    silent = None if rank == 0 else True
    with tqdm(
        total=recipe.epochs * num_steps,
        initial=first * num_steps,
        desc="finetune",
        unit="step",
        disable=silent,
    ) as bar:
        for step in steps:
            if step.step == 0:
                # Drop path draws from the device's generator; a resumed run must draw the same.
                entropy = np.random.SeedSequence([recipe.seed, step.epoch, rank])
                torch.manual_seed(int(entropy.generate_state(1)[0]))
            progress = step.epoch + step.step / step.num_steps
            rate = learning_rate(
                progress,
                peak=recipe.lr,
                epochs=recipe.epochs,
                warmup_epochs=recipe.warmup_epochs,
                lowest=recipe.min_lr,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            trained.train()
            with enough_memory("--micro-batch-size", micro_batch_size):
                loss, skipped = accumulate_gradient(trained, step, recipe, mixing, device)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            unusable.update(skipped)
            bar.update()
            if step.step + 1 < step.num_steps:
                continue
            mean_loss = float(sum_over_processes(torch.stack(losses).mean(), device)) / world
            losses.clear()
            everywhere = gather_rows(torch.tensor(sorted(unusable), dtype=torch.int64), device)
            unusable.update(everywhere.tolist())
            if not np.isfinite(mean_loss):
                raise RunError(
                    f"the loss of epoch {step.epoch} is {mean_loss}: use a lower --blr, or --dtype float32"
                )
            measured = measure_accuracy(
                network, measure, mean, std, recipe, workers=workers, batch_size=micro_batch_size
            )
            history.append(
                {"epoch": step.epoch, "loss": mean_loss, "lr": rate, "val": dict(measured)}
            )
            bar.set_postfix(loss=f"{mean_loss:.3f}", top1=f"{measured['top1']:.3f}")
            _save(folder, identity, network, optimizer, history, unusable)
    flat = [
        {**{k: v for k, v in entry.items() if k != "val"}, **_prefixed(entry["val"])}
        for entry in history
    ]
    return flat, len(unusable), measured


def _prefixed(metrics: dict[str, float]) -> dict[str, float]:
    return {f"val_{name}": value for name, value in metrics.items() if name != "images"}


# Going on ----------------------------------------------------------------------------------------


def _identity(teacher: Teacher) -> dict[str, Any]:
    """What makes a model that model: its weights by their hash, wherever they lie."""
    spec = teacher.spec.to_dict()
    keys = ("architecture", "sha256", "mean", "std", "size", "arguments", "seed")
    return {key: spec[key] for key in keys}


def _save(
    folder: Path | None,
    identity: dict[str, Any],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    unusable: set[int],
) -> None:
    """After an epoch, on the first process: atomic, so that a cut leaves the epoch before."""
    if folder is None or process()[0] != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{CHECKPOINT}.{os.getpid()}"
        state = {
            "identity": json.dumps(identity, sort_keys=True),
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": json.dumps(history),
            "unusable": sorted(unusable),
        }
        torch.save(state, part)
        part.replace(folder / CHECKPOINT)
    except OSError as error:
        raise RunError(f"cannot write to '{folder}': {error.strerror or error}") from None


def _resume(
    folder: Path | None,
    identity: dict[str, Any],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    unusable: set[int],
) -> int:
    """Load what `_save` wrote, where there is something; the epoch to go on with.

    Raises:
        UsageError: it is of another call.
    """
    if folder is None or not (folder / CHECKPOINT).is_file():
        return 0
    try:
        state = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
        same = state["identity"] == json.dumps(identity, sort_keys=True)
    except Exception:
        raise UsageError(
            f"'{folder / CHECKPOINT}' is damaged: delete it to start anew, or give another folder with -o"
        ) from None
    if not same:
        raise UsageError(
            f"'{folder / CHECKPOINT}' is of a fine-tuning with other settings: delete it to start anew, or "
            f"give another folder with -o"
        )
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    history.extend(json.loads(state["history"]))
    unusable.update(state["unusable"])
    return len(history)
