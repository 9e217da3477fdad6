"""Token similarity by block depth: where a network over-smooths, and which block is the most diverse teacher."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from tokdiv.certify import confidence_sequence
from tokdiv.data import open_source, permutation, read_batches
from tokdiv.dist import choose_device, choose_dtype
from tokdiv.errors import RunError, UsageError
from tokdiv.measure import Settings
from tokdiv.plots import depth_figure, save_figure
from tokdiv.scores import write_whole
from tokdiv.similarity import token_similarity
from tokdiv.spec import TeacherSpec
from tokdiv.teacher import Teacher, load_teachers

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

    Writes depth.csv, depth.json, depth.png and depth.svg into `out`. A block's output is taken as it is; where the
    teacher has a final norm, a last row gives its last block after it, as `rank` takes it.

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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"-o {folder}: cannot be written to ({error.strerror}); give another folder"
        ) from None
    place = choose_device(device)
    source = open_source(data)
    loaded = load_teachers(teachers, image_size=image_size)
    for teacher in loaded:
        teacher.prepare(place, choose_dtype(dtype, place))
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
    with tqdm(total=count, unit="image", disable=None) as bar:
        for batch in batches:
            for teacher in loaded:
                if batch.usable.any():
                    views = batch.views[teacher.size].to(place)
                    found, shapes[teacher.name] = _block_scores(teacher, views)
                    scores[teacher.name].append(found)
            bar.update(len(batch))
    if not shapes:
        raise RunError(f"none of the {count:,} images of '{source.name}' could be used")
    rows = []
    for teacher in loaded:
        rows += _rows(
            teacher, np.concatenate(scores[teacher.name]), shapes[teacher.name], source.count
        )
    table = pd.DataFrame(rows)
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
    return table


def _block_scores(
    teacher: Teacher, views: torch.Tensor
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """(B, blocks) scores, the last column after the final norm where there is one; (K, C) of each."""
    with torch.inference_mode():
        tokens = teacher.blocks(views)
        if teacher.spec.norm:
            norm = teacher.module.norm
            tokens.append(norm(tokens[-1].float()))  # type: ignore[operator]
        single = [block.shape[1] < 2 for block in tokens]
        if any(single):
            raise UsageError(
                f"{teacher.name}: block {single.index(True)} has one token: similarity is undefined"
            )
        found = torch.stack([token_similarity(block) for block in tokens], dim=1).cpu().numpy()
    if np.isnan(found).any():
        block = int(np.isnan(found).any(axis=0).argmax())
        raise RunError(f"{teacher.name} gives NaN tokens at block {block}: its weights are damaged")
    return found, [(block.shape[1], block.shape[2]) for block in tokens]


def _rows(
    teacher: Teacher, scores: np.ndarray, shapes: list[tuple[int, int]], population: int | None
) -> list[dict[str, Any]]:
    alpha = (1 - CONFIDENCE) / scores.shape[1]
    rows = []
    for n, (K, C) in enumerate(shapes):
        x = scores[:, n].astype(np.float64)
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
                "mean_similarity": float(x.mean()),
                "ci_low": float(bounds.low[-1]),
                "ci_high": float(bounds.high[-1]),
                "images": len(x),
            }
        )
    return rows
