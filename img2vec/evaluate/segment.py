"""Segmentation: how well each pixel's class is read from a model's patch tokens, or after fine-tuning. mIoU."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from img2vec.evaluate.confusion import class_table, mean_scores
from img2vec.evaluate.encoder import load_encoder
from img2vec.evaluate.frozen_tokens import choose_blocks
from img2vec.evaluate.history import write_metrics
from img2vec.evaluate.knn_head import fit_knn
from img2vec.evaluate.linear_head import fit_linear
from img2vec.evaluate.results import Results
from img2vec.evaluate.segment_finetune import fit_upernet
from img2vec.evaluate.segment_report import Example, write_report, write_skipped
from img2vec.evaluate.segment_settings import RECORDED, SegmentRecipe, SegmentSettings
from img2vec.evaluate.segmentation_data import SegmentationData, open_segmentation
from img2vec.evaluate.segmentation_views import Layout, Scores, evaluate, predict
from tokdiv.data.source import storable
from tokdiv.dist import Processes, choose_device, choose_dtype, current_processes, default_workers
from tokdiv.errors import UsageError
from tokdiv.run_dir import locked_folder
from tokdiv.teachers.teacher import Teacher

NUM_EXAMPLES = 6  # validation images in predictions.png
UPERNET_SIZE = 512  # as in MAE and BEiT
WARMUP_STEPS = 1500
DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"max_steps": 2000, "lr": 3e-3, "weight_decay": 1e-4},
    "knn": {"max_steps": 0, "lr": 0.0, "weight_decay": 0.0},
    "upernet": {"max_steps": 160_000, "lr": 1e-4, "weight_decay": 0.05},
}


def segment(
    model: str | Path | Teacher,
    train: str,
    val: str,
    out: str | Path | None = None,
    **options: Any,
) -> Results:
    """Mean IoU of a head on frozen tokens, or of the network fine-tuned with UPerNet's heads.

    Args:
        model: see `load_encoder`; for upernet a timm model.
        train, val: SEG, as `img2vec.evaluate.segmentation_sources` describes it.
        out: folder for results.json, results.csv, predictions.png, report.html, skipped.csv, TensorBoard events,
            and checkpoint.pt of upernet, from which the same call goes on; None writes nothing.
        options: fields of `SegmentSettings`.

    Returns:
        miou, pixel_accuracy and mean_class_accuracy, in [0, 1]; `by_class` has each class's IoU.

    Raises:
        UsageError, RunError: see `load_encoder` and `open_segmentation`; a loss that is not finite.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 came in the fine-tuning; only with `out`.
    """
    given = SegmentSettings(**options)
    blocks = parse_blocks(given.blocks)
    group = current_processes(choose_device(given.device))
    workers = default_workers() if given.workers is None else max(1, given.workers)
    encoder = open_model(model, given, blocks, group)
    with ExitStack() as stack:
        folder = None
        if out is not None:
            folder = group.on_first(lambda: stack.enter_context(locked_folder(out)))
        train_data, val_data, notes = open_segmentation(train, val, group, workers)
        recipe = decide(given, encoder, workers, group)
        layout = Layout(encoder.size, recipe.stride if recipe.mode == "slide" else None)
        history: list[dict[str, Any]] = []
        if recipe.head == "linear":
            scores, history = fit_linear(encoder, train_data, layout, recipe, group, folder)
        elif recipe.head == "knn":
            scores, num_tokens = fit_knn(encoder, train_data, layout, recipe, group)
            notes.append(f"neighbors among {num_tokens:,} training tokens")
        else:
            identity = describe_run(encoder, train_data, recipe, group)
            scores, history = fit_upernet(
                encoder, train_data, recipe, blocks, group, folder, identity
            )
        loading = {"batch_size": recipe.encode_batch_size, "workers": workers}
        confusion = evaluate(scores, val_data, layout, group, **loading)
        results = Results(
            task="segment",
            model=storable(encoder.name),
            metrics=mean_scores(confusion),
            settings={name: getattr(recipe, name) for name in RECORDED[recipe.head]},
            data={
                "train": describe_data(train_data),
                "val": describe_data(val_data),
                "classes": val_data.num_classes,
            },
            notes=notes,
            history=history,
            by_class=class_table(confusion, val_data.classes),
        )
        if folder is not None:

            def write() -> None:
                skipped = list(dict.fromkeys([*train_data.skipped, *val_data.skipped]))
                results.write(folder)
                write_skipped(folder, skipped)
                write_metrics(folder, results.metrics, history[-1]["step"] if history else 0)
                examples = predict_examples(scores, val_data, layout, group, **loading)
                write_report(folder, results, confusion, examples, skipped, group.world)

            group.on_first(write)
    return results


def open_model(
    model: str | Path | Teacher,
    given: SegmentSettings,
    blocks: list[int] | None,
    group: Processes,
) -> Teacher:
    """The model, ready on the device with frozen heads; for upernet, which builds its own from it, on the CPU."""
    if given.head == "upernet":
        size = given.image_size or UPERNET_SIZE
        return load_encoder(model, image_size=size, device="cpu", dtype="float32")
    if blocks is None:
        return load_encoder(
            model, image_size=given.image_size, device=given.device, dtype=given.dtype
        )
    # In float32 first: `Teacher` runs the network once, and `prepare` casts weights.
    encoder = load_encoder(model, image_size=given.image_size, device="cpu", dtype="float32")
    return choose_blocks(encoder, blocks).prepare(
        group.device, choose_dtype(given.dtype, group.device)
    )


def decide(
    given: SegmentSettings, encoder: Teacher, workers: int, group: Processes
) -> SegmentRecipe:
    """Decide what the settings leave open.

    Raises:
        UsageError: a batch that the processes cannot share.
    """
    size, defaults = encoder.size, DEFAULTS[given.head]
    max_steps = given.max_steps or defaults["max_steps"]
    batch_size = given.batch_size
    if given.head == "upernet":
        batch_size -= batch_size % group.world
        num_parts = -(-batch_size // group.world // (given.micro_batch_size or batch_size)) or 1
        if batch_size // group.world // num_parts < 2:
            raise UsageError(
                f"--batch-size {given.batch_size} on {group.world} processes leaves single images in a forward "
                f"pass: BatchNorm needs two or more; raise it or --micro-batch-size"
            )
    mode = given.mode
    if mode == "auto":
        mode = "slide" if given.head == "upernet" else "whole"
    if given.stride is not None and given.stride > size:
        raise UsageError(f"--stride {given.stride}: expected at most the view's side, {size} px")
    decided = {
        "image_size": size,
        "mode": mode,
        "stride": (given.stride or max(1, size * 2 // 3)) if mode == "slide" else None,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "lr": given.lr or defaults["lr"],
        "weight_decay": defaults["weight_decay"]
        if given.weight_decay is None
        else given.weight_decay,
        "warmup_steps": min(WARMUP_STEPS, max_steps // 10)
        if given.warmup_steps is None
        else given.warmup_steps,
        "dtype": str(encoder.dtype).removeprefix("torch.")
        if given.head != "upernet"
        else choose_dtype(given.dtype, group.device),
        "workers": workers,
    }
    return SegmentRecipe(**{**vars(given), **decided})


def parse_blocks(text: str | None) -> list[int] | None:
    """ "3,5,7,11" -> [3, 5, 7, 11]."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--blocks {text}: expected numbers of blocks from 0 joined with commas, as 3,5,7,11"
        ) from None


def predict_examples(
    scores: Scores, data: SegmentationData, layout: Layout, group: Processes, **loading: int
) -> list[Example]:
    """A few images from all over the data, with their predictions."""
    positions = np.linspace(0, len(data) - 1, min(NUM_EXAMPLES, len(data))).round().astype(int)
    predicted = predict(scores, data, positions.tolist(), layout, device=group.device, **loading)
    return [
        Example(
            data.key(position),
            data.image(position).permute(1, 2, 0).numpy(),
            labels.cpu().numpy(),
            prediction.cpu().numpy(),
        )
        for position, prediction, labels in predicted
    ]


def describe_run(
    teacher: Teacher,
    train_data: SegmentationData,
    recipe: SegmentRecipe,
    group: Processes,
) -> str:
    """What must be equal for a fine-tuning to be resumed, as JSON."""
    return json.dumps(
        {
            "model": teacher.spec.identity(),
            "train": train_data.pairs.fingerprint,
            "classes": train_data.classes,
            "settings": {name: getattr(recipe, name) for name in RECORDED["upernet"]},
            "processes": group.world,
        },
        sort_keys=True,
    )


def describe_data(data: SegmentationData) -> dict[str, Any]:
    return {
        "name": storable(data.pairs.name),
        "fingerprint": data.pairs.fingerprint,
        "images": len(data),
        "skipped": len(data.skipped),
    }
