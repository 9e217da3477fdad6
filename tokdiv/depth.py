"""Token similarity by block depth: where a network over-smooths, and which block is the most diverse teacher."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from torch import nn
from tqdm import tqdm

from tokdiv.certify import confidence_sequence
from tokdiv.data.loader import permutation, read_batches
from tokdiv.data.open import open_source
from tokdiv.dist import choose_device, choose_dtype
from tokdiv.errors import RunError, UsageError
from tokdiv.figures.depth import depth_figure
from tokdiv.figures.style import save_figure
from tokdiv.measure import Settings
from tokdiv.scores import write_skipped, write_whole
from tokdiv.similarity import token_similarity
from tokdiv.teachers.load import load_teachers
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher

CONFIDENCE = 0.99  # of each teacher's curve as a whole


def measure_depth(
    data: str,
    teachers: Sequence[str | TeacherSpec | Teacher],
    out: str | Path,
    *,
    max_images: int | None = 1000,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    image_size: Any = None,
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
    Settings(
        max_images=max_images,
        batch_size=batch_size,
        workers=workers,
        dtype=dtype,  # type: ignore[arg-type]
        seed=seed,
        image_size=image_size,
    )  # which refuses what `rank` refuses
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"-o {folder}: is a file; give a folder")
    place = choose_device(device)
    source = open_source(data)
    loaded = load_teachers(teachers, image_size=image_size)
    for teacher in loaded:
        teacher.prepare(place, choose_dtype(dtype, place))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"-o {folder}: cannot be written to ({error.strerror}); give another folder"
        ) from None
    count = min(max_images or source.count or 1000, source.count or max_images or 1000)
    order = permutation(source.count, seed) if source.permutable and source.count else None
    blocks = [
        np.arange(start, min(start + batch_size, count)) for start in range(0, count, batch_size)
    ]
    scores: dict[str, list[np.ndarray]] = {teacher.name: [] for teacher in loaded}
    shapes: dict[str, list[tuple[int, int]]] = {}
    batches = read_batches(
        source,
        order,
        blocks,
        {t.size for t in loaded},
        workers=workers or os.cpu_count() or 1,
        seed=seed,
    )
    usable: list[np.ndarray] = []
    skipped: list[tuple[str, str]] = []
    with tqdm(total=count, unit="image", disable=None) as bar:
        for batch in batches:
            usable.append(batch.usable)
            keys = [key for key, good in zip(batch.keys, batch.usable) if good]
            for teacher in loaded if keys else ():
                views = batch.views[teacher.size].to(place)
                found, shapes[teacher.name] = _block_scores(teacher, views, keys)
                scores[teacher.name].append(found)
            skipped += [(k, reason) for k, reason in zip(batch.keys, batch.reasons) if reason]
            bar.update(len(batch))
    if not shapes:
        first = f" (the first: '{skipped[0][0]}': {skipped[0][1]})" if skipped else ""
        raise RunError(f"none of the {count:,} images of '{source.name}' could be used{first}")
    rows = []
    for teacher in loaded:
        # A row per image in the order measured; NaN where it could not be used.
        whole = np.full((sum(map(len, usable)), len(shapes[teacher.name])), np.nan)
        whole[np.concatenate(usable)] = np.concatenate(scores[teacher.name])
        rows += _rows(teacher, whole, shapes[teacher.name], source.count)
    table = pd.DataFrame(rows)
    write_skipped(folder / "skipped.csv", skipped)
    write_whole(folder / "depth.csv", table.to_csv(index=False))
    content = {
        "schema_version": 1,
        "data": {"source": source.name, "count": source.count, "fingerprint": source.fingerprint},
        "confidence": CONFIDENCE,
        "teachers": [teacher.spec.to_dict() for teacher in loaded],
        "blocks": rows,
    }
    write_whole(folder / "depth.json", json.dumps(content, indent=2) + "\n")
    curves: dict[str, Any] = {}
    for name, curve in table[~table["norm"]].groupby("teacher", sort=False):
        curves[str(name)] = tuple(
            curve[c].to_numpy() for c in ("block", "mean_similarity", "ci_low", "ci_high")
        )
    figure = depth_figure(curves)
    for suffix in ("png", "svg"):
        save_figure(figure, folder / f"depth.{suffix}")
    if skipped:
        print(
            f"warning: unusable images skipped: {len(skipped):,} (see {folder / 'skipped.csv'})",
            file=sys.stderr,
        )
    return table


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
