"""Does a student learn? k-NN accuracy of a small student before and after some minutes of pretraining.

    TOKDIV_DATA=DATA python benchmarks/pretrain_learns.py

On `caltech40` (40 classes of Caltech-101) with a ResNet-18's third stage as the teacher, for three seeds: the
student is exported untrained and pretrained, and both are measured by the same weighted k-NN, train against
val; labels are used for nothing else. The loss of the last epoch is compared with that of two predictions that
need no image: the mean of all target tokens, and their mean at each position.

Writes results/pretrain_learns.{json,md}.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import machine  # noqa: F401  (lets it run without installing)
import numpy as np
import torch
import torch.nn.functional as F

import img2vec
from img2vec.config import Config
from img2vec.data import View, plan_epoch, read_epoch
from img2vec.evaluate import knn
from img2vec.export import export_student
from img2vec.loss import BETA
from img2vec.masking import plan_layout
from img2vec.model import make_student
from img2vec.targets import make_targets
from tokdiv import load_teacher
from tokdiv.data.open import open_source

RESULTS = Path(__file__).parent / "results"
NEIGHBOURS = (10, 20)

# Images of 96 px: the teacher's third stage gives 6 x 6 tokens, one for each patch of 16 px.
CONFIG = Config(
    student="vit_tiny_patch16_224",
    student_args={"depth": 4},
    image_size=96,
    decoder_depth=1,
    decoder_dim=192,
    crop_scale=(0.35, 1.0),
    batch_size=16,
    epochs=16,
    lr=2e-3,
    clip_grad=3.0,
    knn_every=0,
    cache_ram=True,
    save_every=10**6,
)


def untrained(config: Config, folder: Path) -> Path:
    """The initial student of a pretraining with this seed, exported."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        student = make_student(config)
    return export_student(
        student.state_dict(),
        config.student,
        folder,
        model_args={"img_size": config.image_size, **config.student_args},
        mean=config.mean,
        std=config.std,
        input_size=config.image_size,
    )


def accuracy(student: Path, data: Path) -> dict[str, float]:
    """Top-1 accuracy in percent by k."""
    metrics = knn(str(student), str(data / "train"), str(data / "val"), k=NEIGHBOURS).metrics
    return {key: value for key, value in metrics.items() if "5" not in key.split("_")[0]}


def constant_losses(config: Config, data: Path, spec: str) -> dict[str, float]:
    """Smooth L1 of predicting the targets' mean, and their mean at each position, on an epoch of views."""
    teacher = load_teacher(spec, image_size=config.image_size)
    layout = plan_layout(config.image_size, 16, config.mask_unit, config.mask_ratio, teacher.grid)
    source = open_source(str(data / "train"))
    plan = plan_epoch(source.count or 0, config.batch_size, 1, 1)
    view = View(config.image_size, config.crop_scale, layout, config.seed)
    batches = read_epoch(source, plan, view, 0, workers=2)
    targets = torch.cat(
        [make_targets(teacher(b.images), teacher.grid, layout, config.target_norm) for b in batches]
    )
    constants = {
        "mean of all tokens": targets.mean(dim=(0, 1), keepdim=True),
        "mean at each place": targets.mean(dim=0, keepdim=True),
    }
    return {
        name: F.smooth_l1_loss(value.expand_as(targets), targets, beta=BETA).item()
        for name, value in constants.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("TOKDIV_DATA"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=CONFIG.epochs)
    arguments = parser.parse_args()
    if arguments.data is None:
        print("skipped: set TOKDIV_DATA to the folder with the real images and weights")
        return
    root = Path(arguments.data)
    data, weights = root / "caltech40", root / "weights"
    file = (weights / "resnet18_in1k_layers1-3_bnfolded.safetensors").resolve()
    spec = f"resnet18=timm:resnet18@{file}:blocks=3"
    seeds = []
    for seed in range(arguments.seeds):
        config = Config.from_dict(CONFIG.to_dict() | {"seed": seed, "epochs": arguments.epochs})
        with tempfile.TemporaryDirectory() as folder:
            before = accuracy(untrained(config, Path(folder) / "untrained"), data)
            begin = time.perf_counter()
            result = img2vec.pretrain(data / "train", spec, Path(folder) / "run", config=config)
            minutes = (time.perf_counter() - begin) / 60
            after = accuracy(result.student, data)
            lines = [
                json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()
            ]
        last = [line["patch_loss"] for line in lines if line["epoch"] == arguments.epochs - 1]
        seeds.append(
            {
                "seed": seed,
                "untrained": before,
                "pretrained": after,
                "patch_loss_first_step": lines[0]["patch_loss"],
                "patch_loss_last_epoch": float(np.mean(last)),
                "minutes": minutes,
                "steps": result.step,
            }
        )
        print(json.dumps(seeds[-1]), flush=True)
    constants = constant_losses(CONFIG, data, spec)
    summary = {"config": CONFIG.to_dict(), "teacher": spec.split("@")[0], "seeds": seeds}
    summary["constant_predictions"] = constants
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "pretrain_learns.json").write_text(json.dumps(summary, indent=1) + "\n")
    keys = list(seeds[0]["untrained"])
    text = [
        "# A small student learns",
        "",
        f"{CONFIG.student} of {CONFIG.student_args['depth']} blocks at {CONFIG.image_size} px, a "
        f"ResNet-18's third stage as the teacher, {arguments.epochs} epochs of caltech40/train; "
        "`python benchmarks/pretrain_learns.py`.",
        "",
        "| seed | k-NN | untrained | pretrained | patch loss, last epoch | minutes |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in seeds:
        for key in keys:
            text.append(
                f"| {row['seed']} | {key} | {row['untrained'][key]:.3f} | {row['pretrained'][key]:.3f} "
                f"| {row['patch_loss_last_epoch']:.4f} | {row['minutes']:.1f} |"
            )
    gains = [row["pretrained"][keys[0]] - row["untrained"][keys[0]] for row in seeds]
    text += [
        "",
        f"Gain in {keys[0]}: {statistics.mean(gains):.3f} on average, {min(gains):.3f} at least. Loss of "
        + ", ".join(f"the {name}: {value:.4f}" for name, value in constants.items())
        + ".",
    ]
    (RESULTS / "pretrain_learns.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
