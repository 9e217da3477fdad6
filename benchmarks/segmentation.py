"""Does segmentation tell a trained network from an untrained one, and what does a fine-tuning cost?

    TOKDIV_DATA=DATA python benchmarks/segmentation.py

On CamVid (367 training and 101 validation images, 11 classes) with a ViT-Ti/16 at 224 px, trained on ImageNet and
untrained: mIoU of a linear layer, of nearest neighbors on frozen tokens, and of a short fine-tuning with UPerNet.
Then the cost of MAE's fine-tuning on ADE20K (UPerNet, 512 px, 16 images a step, 160,000 steps): its operations are
counted, and one step of a ViT-B is timed here.

Every run is kept in --runs: interrupted, the same command goes on. Writes results/segmentation.{json,md}.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import machine
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import img2vec
from img2vec.evaluate.segment_finetune import upernet_step
from img2vec.evaluate.segment_settings import SegmentRecipe
from img2vec.evaluate.upernet import UPerNet, choose_levels, upernet_groups
from tokdiv.dist import choose_dtype, current_processes

HEADS = ("linear", "knn", "upernet")
# Learning rates for a schedule as short as this; all else is the default.
SHORT: dict[str, Any] = {"lr": 5e-4, "image_size": 224}
ADE20K = {"size": 512, "batch": 16, "steps": 160_000, "classes": 150}
BACKBONES = {
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
}
GPUS = {"A100": 312, "H100": 989}  # TFLOP/s of dense bfloat16, by the maker
SUSTAINED = 0.35  # the share of them that a training is taken to reach


def measure(
    model: str, head: str, data: Path, out: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Metrics of one run, from its folder where it is finished; with the seconds of its process."""
    timing = out / "timing.json"
    if not (out / "results.json").exists():
        splits = [f"{data}:split={split}:ignore=11" for split in ("train", "val")]
        spent = json.loads(timing.read_text()) if timing.exists() else {"wall": 0.0, "cpu": 0.0}
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            img2vec.segment(model, *splits, out, head=head, **options)
        finally:
            spent["wall"] += time.perf_counter() - wall
            spent["cpu"] += time.process_time() - cpu
            out.mkdir(parents=True, exist_ok=True)
            timing.write_text(json.dumps(spent))
    results = json.loads((out / "results.json").read_text())
    return {
        "head": head,
        **results["metrics"],
        "by_class": results["by_class"],
        **json.loads(timing.read_text()),
    }


def ade20k_network(architecture: str) -> UPerNet:
    """The network of MAE's fine-tuning, untrained."""
    backbone = timm.create_model(
        architecture, img_size=ADE20K["size"], num_classes=0, drop_path_rate=0.1
    )
    strides = [entry["reduction"] for entry in backbone.feature_info]
    width = backbone.embed_dim
    blocks = choose_levels(architecture, strides, None)
    backbone.prune_intermediate_layers(blocks, prune_norm=True)
    return UPerNet(backbone, blocks, [width] * 4, [16] * 4, width, ADE20K["classes"])


def operations(network: nn.Module, images: Tensor) -> int:
    """FLOPs of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        sum(output.float().sum() for output in network(images)).backward()
    return counter.get_total_flops()


def time_step(architecture: str, batch: int) -> dict[str, float]:
    """Seconds of an optimizer step on this machine, and the TFLOP of it."""
    group = current_processes()
    dtype = choose_dtype("auto", group.device)
    network = ade20k_network(architecture)
    optimizer = torch.optim.AdamW(upernet_groups(network, 0.05, 0.65), lr=1e-4)
    size = ADE20K["size"]
    images = torch.randn(batch, 3, size, size)
    labels = torch.randint(0, ADE20K["classes"], (batch, size, size))
    spent = []
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        upernet_step(network, optimizer, images, labels, SegmentRecipe(dtype=dtype), group)
        spent.append((time.perf_counter() - wall, time.process_time() - cpu))
    return {"batch": batch, "wall": spent[1][0], "cpu": spent[1][1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("TOKDIV_DATA"))
    parser.add_argument("--runs", type=Path, default=Path("runs/segmentation"))
    parser.add_argument("--steps", type=int, default=300, help="of upernet")
    parser.add_argument("--batch-size", type=int, default=8, help="of upernet")
    arguments = parser.parse_args()
    if arguments.data is None:
        print("skipped: set TOKDIV_DATA to the folder with the real images and weights")
        return
    root = Path(arguments.data)
    weights = root / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    models = {
        "trained": f"timm:vit_tiny_patch16_224@{weights.resolve()}:mean=0.5:std=0.5",
        "untrained": "timm:vit_tiny_patch16_224@random:mean=0.5:std=0.5",
    }
    upernet = SHORT | {"max_steps": arguments.steps, "batch_size": arguments.batch_size}
    rows = []
    for head in HEADS:
        for name, model in models.items():
            options = upernet if head == "upernet" else {}
            out = arguments.runs / f"{head}-{name}"
            rows.append({"model": name, **measure(model, head, root / "camvid", out, options)})
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "by_class"}), flush=True)
    cost_file = arguments.runs / "cost.json"
    if not cost_file.exists():
        cost_file.write_text(json.dumps({"step": time_step(BACKBONES["ViT-B/16"], batch=2)}))
    cost = json.loads(cost_file.read_text())
    for name, architecture in BACKBONES.items():
        with torch.device("meta"):
            network = ade20k_network(architecture)
            images = torch.randn(2, 3, ADE20K["size"], ADE20K["size"])
        cost[name] = operations(network, images) / 2 / 1e12  # TFLOP an image
    write(rows, cost, arguments)


def write(rows: list[dict[str, Any]], cost: dict[str, Any], arguments: argparse.Namespace) -> None:
    machine.RESULTS.mkdir(exist_ok=True)
    summary = {"camvid": rows, "ade20k": cost, "machine": machine.describe()}
    path = machine.RESULTS / "segmentation.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    step = cost["step"]
    rate = step["batch"] * cost["ViT-B/16"] / step["cpu"]
    text = [
        "# Segmentation",
        "",
        "CamVid, 367 training and 101 validation images, 11 classes, ViT-Ti/16 at 224 px, trained on ImageNet and "
        f"untrained; `python benchmarks/segmentation.py`. UPerNet: {arguments.steps} steps of "
        f"{arguments.batch_size} images, learning rate {SHORT['lr']:g}.",
        "",
        "| head | mIoU, trained | mIoU, untrained | pixel accuracy, trained | untrained | CPU seconds, trained |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for head in HEADS:
        trained, untrained = (row for row in rows if row["head"] == head)
        text.append(
            f"| {head} | {trained['miou']:.3f} | {untrained['miou']:.3f} | {trained['pixel_accuracy']:.3f} "
            f"| {untrained['pixel_accuracy']:.3f} | {trained['cpu']:.0f} |"
        )
    text += [
        "",
        "CPU seconds are those of all threads together, reading included.",
        "",
        "IoU of each class, trained:",
        "",
        f"| head | {' | '.join(entry['name'] for entry in rows[0]['by_class'])} |",
        f"| --- |{' ---: |' * len(rows[0]['by_class'])}",
    ]
    for row in rows:
        if row["model"] == "trained":
            ious = (entry["iou"] for entry in row["by_class"])
            text.append(f"| {row['head']} | " + " | ".join(f"{iou:.2f}" for iou in ious) + " |")
    text += [
        "",
        "## MAE's fine-tuning on ADE20K",
        "",
        f"UPerNet, {ADE20K['size']} px, {ADE20K['batch']} images a step, {ADE20K['steps']:,} steps. Estimated GPU "
        f"hours: counted operations at {SUSTAINED:.0%} of the GPU's bfloat16 peak, reading and validation aside. A "
        f"step of {step['batch']} images with the ViT-B took {step['cpu']:.1f} CPU seconds here, at {rate:.2f} "
        f"TFLOP/s of a core.",
        "",
        f"| backbone | TFLOP an image | {' | '.join(f'hours of one {gpu}' for gpu in GPUS)} |",
        f"| --- | ---: |{' ---: |' * len(GPUS)}",
    ]
    for name in BACKBONES:
        total = cost[name] * ADE20K["batch"] * ADE20K["steps"]
        hours = (total / (SUSTAINED * peak) / 3600 for peak in GPUS.values())
        text.append(
            f"| {name} | {cost[name]:.2f} | " + " | ".join(f"{h:.0f}" for h in hours) + " |"
        )
    described = ", ".join(f"{key} {value}" for key, value in machine.describe().items())
    text += ["", f"Measured on: {described}."]
    (machine.RESULTS / "segmentation.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
