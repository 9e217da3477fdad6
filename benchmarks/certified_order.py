"""Time and images of a certified order, compared with measuring everything and with the obvious script.

    TOKDIV_DATA=DATA python benchmarks/certified_order.py

On the real images and networks of TOKDIV_DATA: `tokdiv rank --certify order` and `--certify none`, and the
obvious script on a part of the images, scaled up. Then the same is simulated for ImageNet's 1,281,167 images:
as many scores are drawn with replacement from those measured here, and judged by the same certifier at the same
looks; the time follows from the rates measured here.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
import pandas as pd
import timm
import torch
from obvious_script import mean_similarities
from precision import real_teachers
from safetensors.torch import load_file

import tokdiv
from tokdiv.certify import OrderCertifier, look_schedule
from tokdiv.teachers.load import load_teachers

IMAGENET = 1_281_167
LIMIT = 200_000  # images of a simulated run


def timed(function) -> tuple[object, float]:
    begin = time.perf_counter()
    return function(), time.perf_counter() - begin


def obvious_models(loaded: list[tokdiv.Teacher]) -> dict[str, torch.nn.Module]:
    """The same networks, created by timm; the ResNet-18's missing last stage stays untrained."""
    models = {}
    for spec in loaded:
        arguments = dict(spec.spec.arguments)
        model = timm.create_model(spec.spec.architecture, num_classes=0, **arguments)
        state = {k: v.float() for k, v in load_file(spec.spec.weights).items()}
        model.load_state_dict(state, strict=False)
        models[spec.name] = model.eval()
    return models


def images_to_certify(
    scores: np.ndarray, lower: float, count: int, seed: int, limit: int
) -> int | None:
    """Images after which an order over `count` images, drawn from `scores` (n, T), is certified; None if open."""
    generator = np.random.default_rng(seed)
    certifier = OrderCertifier(
        scores.shape[1], count, delta=0.01, tie=0.002, lower=lower, upper=1.0
    )
    done = 0
    for look in look_schedule(limit):
        certifier.update(scores[generator.integers(0, len(scores), look - done)])
        done = look
        if certifier.certificate().certified:
            return int(done)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script-images", type=int, default=48)
    parser.add_argument("--simulations", type=int, default=15)
    arguments = parser.parse_args()
    if "TOKDIV_DATA" not in os.environ:
        print("certified_order: skipped: set TOKDIV_DATA to the folder with the real images")
        return
    data = Path(os.environ["TOKDIV_DATA"])
    images = data / "imagenet_1000"
    teachers = real_teachers(data)
    paths = sorted(images.rglob("*.jpg"))
    tokdiv.rank(images, teachers, certify="none", max_images=64)  # warm up
    rows = ["| | images | seconds | over `--certify order` |", "| --- | ---: | ---: | ---: |"]
    seconds, used, finals = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for certify in ("order", "none"):
            run = Path(folder) / certify
            ranking, seconds[certify] = timed(
                lambda c=certify, r=run: tokdiv.rank(images, teachers, r, certify=c)
            )
            used[certify] = int(ranking.data["images"])
            finals[certify] = [teacher.name for teacher in ranking.teachers]
        table = pd.read_parquet(Path(folder) / "none" / "scores.parquet")
    measured = table.drop(columns=["position", "key"]).dropna().to_numpy(np.float32)
    loaded = load_teachers(teachers)
    models = obvious_models(loaded)
    _, part = timed(lambda: mean_similarities(paths[: arguments.script_images], models))
    seconds["script"] = part * len(paths) / arguments.script_images
    names = {
        "order": "`--certify order`",
        "none": "`--certify none`: everything",
        "script": f"the obvious script ({arguments.script_images} images, scaled)",
    }
    for key, name in names.items():
        rows.append(
            f"| {name} | {used.get(key, len(paths)):,} | {seconds[key]:.1f} "
            f"| {seconds[key] / seconds['order']:.2f} |"
        )
    lower = -1 / (min(teacher.num_tokens for teacher in loaded) - 1)  # as in `tokdiv rank`
    found = [
        images_to_certify(measured, lower, IMAGENET, seed, limit=LIMIT)
        for seed in range(arguments.simulations)
    ]
    counts = sorted(n or LIMIT for n in found)  # an open one counts as the limit: a lower bound
    needed = int(np.median(counts))
    rate = used["none"] / seconds["none"]
    script_rate = len(paths) / seconds["script"]
    minutes, hours = needed / rate / 60, IMAGENET / rate / 3600
    rows += [
        "",
        f"The same six networks on N = {IMAGENET:,} images: {sum(n is not None for n in found)} of {len(found)} "
        f"simulated orders were certified within {LIMIT:,} images; the median one took {needed:,} "
        f"({needed / IMAGENET:.2%} of ImageNet), the last {counts[-1]:,}. At the rates measured here that is "
        f"{minutes:.1f} minutes, against {hours:.1f} hours for everything and "
        f"{IMAGENET / script_rate / 3600:.1f} hours for the obvious script.",
    ]
    result = {
        "seconds": seconds,
        "images": used,
        "orders": finals,
        "simulated_images": found,
        "images_per_second": rate,
        "script_images_per_second": script_rate,
    }
    machine.record("certified_order", result, "\n".join(rows))


if __name__ == "__main__":
    main()
