"""Token similarity by block depth: where a network over-smooths, and which block is the most diverse teacher."""

import json
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import timm
import torch
from torch import nn

from tokdiv.autotune import choose_batch_size
from tokdiv.certify import confidence_sequence
from tokdiv.config import Settings
from tokdiv.data.loader import permutation, read_batches
from tokdiv.data.open import open_source
from tokdiv.data.source import Source
from tokdiv.dist import choose_device, choose_dtype, default_workers
from tokdiv.errors import RunError, UsageError
from tokdiv.figures.depth import depth_figure
from tokdiv.figures.style import save_figure
from tokdiv.measure import load_measurable
from tokdiv.progress import progress_bar
from tokdiv.run_dir import locked_folder, write_atomic
from tokdiv.scores import write_skipped
from tokdiv.similarity import token_similarity
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher

CONFIDENCE = 0.99  # of all points of a teacher's curve together


def measure_depth(
    data: str | os.PathLike[str],
    teachers: Sequence[str | TeacherSpec | Teacher],
    out: str | os.PathLike[str],
    *,
    max_images: int | None = 1000,
    batch_size: int | Literal["auto"] = 64,
    workers: int | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    seed: int = 0,
    image_size: int | Literal["native"] | None = None,
) -> pd.DataFrame:
    """Measure the token similarity of every block of each teacher, from one forward pass.

    Writes depth.csv, depth.json, depth.png, depth.svg and skipped.csv into `out`. A block's output is taken
    as it is; where the teacher has a final norm, a last row gives its last block after it, as `rank` takes it.

    Returns:
        One row per teacher and block: teacher, block (zero-based, as `:blocks=N` takes it), norm,
        num_tokens, dim, mean_similarity, ci_low, ci_high (a 99% interval, over the blocks of a teacher
        together), images.

    Raises:
        UsageError: a mistake in the call. RunError: no usable image, or a block that yields NaN.
    """
    settings = Settings(
        max_images=max_images,
        batch_size=batch_size,
        workers=workers,
        dtype=dtype,
        seed=seed,
        image_size=image_size,
    )
    chosen = choose_device(device)
    source = open_source(os.fspath(data))
    loaded = load_measurable(teachers, image_size, chosen, choose_dtype(dtype, chosen))
    count = min(max_images or source.count or 1000, source.count or max_images or 1000)
    if batch_size == "auto":
        batch_size = choose_batch_size(loaded, count)
    with locked_folder(out) as folder:
        scores, shapes, skipped = _measure(source, loaded, settings, count, batch_size, chosen)
        rows = []
        for teacher in loaded:
            rows += _rows(teacher, scores[teacher.name], shapes[teacher.name], source.count)
        table = pd.DataFrame(rows)
        write_skipped(folder, skipped)
        write_atomic(folder / "depth.csv", table.to_csv(index=False))
        found = {"source": source.name, "count": source.count, "fingerprint": source.fingerprint}
        content = {
            "schema_version": 1,
            "data": found,
            "confidence": CONFIDENCE,
            "teachers": [teacher.spec.to_dict() for teacher in loaded],
            "blocks": rows,
        }
        write_atomic(folder / "depth.json", json.dumps(content, indent=2) + "\n")
        columns = ["mean_similarity", "ci_low", "ci_high"]
        curves = table[~table["norm"]].groupby("teacher", sort=False)[columns]
        figure = depth_figure({str(name): tuple(curve.to_numpy().T) for name, curve in curves})  # type: ignore[misc]
        for suffix in ("png", "svg"):
            save_figure(figure, folder / f"depth.{suffix}")
    return table


def _measure(
    source: Source,
    teachers: Sequence[Teacher],
    settings: Settings,
    count: int,
    batch_size: int,
    device: torch.device,
) -> tuple[dict[str, np.ndarray], dict[str, list[tuple[int, int]]], list[tuple[str, str]]]:
    """Scores and (K, C) of each teacher's blocks, and the unusable images with their reasons.

    The scores are (n, blocks), a row per image in the order measured; NaN where it cannot be used.
    """
    permuted = source.permutable and source.count is not None
    batches = read_batches(
        source,
        permutation(source.count or 0, settings.seed) if permuted else None,
        np.split(np.arange(count), range(batch_size, count, batch_size)),
        {teacher.size for teacher in teachers},
        workers=settings.workers or default_workers(),
        seed=settings.seed,
    )
    scores: dict[str, list[np.ndarray]] = {teacher.name: [] for teacher in teachers}
    shapes: dict[str, list[tuple[int, int]]] = {}
    skipped: list[tuple[str, str]] = []
    with progress_bar(total=count, unit="image") as bar:
        for batch in batches:
            keys = [key for key, usable in zip(batch.keys, batch.usable) if usable]
            skipped += [(k, reason) for k, reason in zip(batch.keys, batch.reasons) if reason]
            for teacher in teachers if keys else ():
                views = batch.views[teacher.size].to(device)
                found, shapes[teacher.name] = _block_scores(teacher, views, keys)
                rows = np.full((len(batch), found.shape[1]), np.nan)
                rows[batch.usable] = found
                scores[teacher.name].append(rows)
            bar.update(len(batch))
    if not shapes:
        first = f" (the first: '{skipped[0][0]}': {skipped[0][1]})" if skipped else ""
        raise RunError(f"none of the {count:,} images of '{source.name}' could be used{first}")
    return {name: np.concatenate(rows) for name, rows in scores.items()}, shapes, skipped


def _block_scores(
    teacher: Teacher, views: torch.Tensor, keys: list[str]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """(B, blocks) scores, the last column after the final norm where there is one; (K, C) of each."""
    with torch.inference_mode():
        tokens = teacher.blocks(views)
        if teacher.spec.norm:
            norm = teacher.module.norm
            if type(norm) in (nn.LayerNorm, timm.layers.LayerNorm):
                tokens.append(norm(tokens[-1].float()))  # type: ignore[operator]
            else:  # a norm of feature maps: the network knows how it is applied
                tokens.append(teacher(views))
        single = [block.shape[1] < 2 for block in tokens]
        if any(single):
            raise UsageError(
                f"{teacher.name}: block {single.index(True)} has one token: similarity is undefined"
            )
        found = torch.stack([token_similarity(block) for block in tokens], dim=1).cpu().numpy()
    if np.isnan(found).any():
        row, block = (int(n) for n in np.argwhere(np.isnan(found))[0])
        raise RunError(
            f"{teacher.name} gives NaN tokens at block {block} for '{keys[row]}': its weights are damaged"
        )
    return found, [(block.shape[1], block.shape[2]) for block in tokens]


def _rows(
    teacher: Teacher, scores: np.ndarray, shapes: list[tuple[int, int]], population: int | None
) -> list[dict[str, Any]]:
    alpha = (1 - CONFIDENCE) / scores.shape[1]
    rows = []
    for n, (K, C) in enumerate(shapes):
        x = scores[:, n]
        bounds = confidence_sequence(
            x, population, alpha, lower=-1 / (K - 1), upper=1.0, times=np.array([len(x)])
        )
        normed = bool(teacher.spec.norm) and n == len(shapes) - 1
        rows.append(
            {
                "teacher": teacher.name,
                "block": n - normed,
                "norm": normed,
                "num_tokens": K,
                "dim": C,
                "mean_similarity": float(np.nanmean(x)),
                "ci_low": float(bounds.low[-1]),
                "ci_high": float(bounds.high[-1]),
                "images": int((~np.isnan(x)).sum()),
            }
        )
    return rows
