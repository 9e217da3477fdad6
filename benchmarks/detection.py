"""What `img2vec detect` learns, how fast its step is, and how much memory windows save.

    python benchmarks/detection.py --data coco_mini --model 'timm:vit_tiny_patch16_224@FILE:mean=0.5:std=0.5'
    python benchmarks/detection.py --data coco_mini --part throughput
    python benchmarks/detection.py --data coco_mini --part memory

overfit: the training images are learned by heart at 320 px with a narrow pyramid (64 channels) and without
augmentation. An average precision above 0.5 on the training images shows that labels, matching, boxes and masks
are right; the one on val shows what 80 images teach, which is next to nothing. It resumes in --out; the seconds of
all its parts are added up.

throughput: `train_step` on a ResNet-50 against a plain training step of torchvision's own
maskrcnn_resnet50_fpn_v2, on the same images and with the same optimizer, one step each in turns; the ratio is the
median over the turns.

memory: one training step of a backbone at 1024 px with attention within windows and without, with torch's fused
attention and with the plain one; the peak of a process of its own, over what it held before the step (on a GPU: of
the allocator).

DATA is a folder as COCO's: train2017/, val2017/ and annotations/instances_{train,val}2017.json.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import machine
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import img2vec
from img2vec.evaluate import load_detector, load_encoder
from img2vec.evaluate.coco import open_coco
from img2vec.evaluate.detection_data import training_batches
from img2vec.evaluate.detection_eval import as_input, evaluate_detector
from img2vec.evaluate.detection_train import train_step
from img2vec.evaluate.detector import build_detector
from img2vec.evaluate.pyramid import build_backbone
from img2vec.evaluate.settings import DetectRecipe
from tokdiv.dist import current_processes
from tokdiv.errors import Interrupted

OVERFIT: dict[str, Any] = {
    "image_size": 320, "channels": 64, "proposals": 128, "batch_size": 8, "micro_batch_size": 4, "lr": 1e-3,
    "warmup_steps": 50, "layer_decay": 0.8, "weight_decay": 0.05, "drop_path": 0.0, "scale_min": 1.0,
    "scale_max": 1.0, "flip": 0.0, "clip_grad": 1.0,
}  # fmt: skip
RESNET = "timm:resnet50@random"  # speed and memory do not depend on the weights


def coco(data: Path, side: str) -> str:
    return f"{data}/{side}2017:annotations={data}/annotations/instances_{side}2017.json"


# Learning by heart -------------------------------------------------------------------------------


def overfit(arguments: argparse.Namespace) -> dict[str, Any]:
    """Average precision on the training images, and on val, after --steps steps."""
    train, val = coco(arguments.data, "train"), coco(arguments.data, "val")
    clock = arguments.out.with_name(arguments.out.name + "-seconds.json")
    spent = json.loads(clock.read_text()) if clock.exists() else {"wall": 0.0, "cpu": 0.0}
    started = time.monotonic(), _cpu_seconds()
    try:
        results = img2vec.detect(
            arguments.model, train, train, arguments.out,
            **OVERFIT, max_steps=arguments.steps, save_every=50, workers=arguments.workers,
            device=arguments.device,
        )  # fmt: skip
    finally:
        spent["wall"] += time.monotonic() - started[0]
        spent["cpu"] += _cpu_seconds() - started[1]
        clock.write_text(json.dumps(spent))
    detector, classes = load_detector(arguments.out / "model", arguments.device)
    on_val, *_ = evaluate_detector(
        detector,
        open_coco(val, classes),
        batch_size=4,
        dtype="float32",
        workers=arguments.workers,
        group=current_processes(arguments.device),
    )
    return {
        "model": arguments.model.replace(
            str(Path(arguments.model.partition("@")[2]).parent) + "/", ""
        ),
        "settings": OVERFIT | {"max_steps": arguments.steps},
        "seconds": spent,
        "train": dict(results.metrics),
        "val": on_val,
    }


def _cpu_seconds() -> float:
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


# Throughput --------------------------------------------------------------------------------------


def throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step, ours and torchvision's, in turns."""
    size, batch = arguments.size, arguments.batch_size
    group = current_processes(arguments.device)
    recipe = DetectRecipe(
        image_size=size, batch_size=batch, micro_batch_size=batch, max_steps=1000, lr=1e-4, drop_path=0.0,
        dtype="float32",
    )  # fmt: skip
    data = open_coco(coco(arguments.data, "train"))
    batches = list(
        training_batches(
            data, size=size, scales=(1.0, 1.0), flip=0.0, batch_size=batch, first_step=0,
            num_steps=arguments.turns + 1, seed=0, workers=0, group=group,
        )
    )  # fmt: skip
    teacher = load_encoder(RESNET, image_size="native", device="cpu", dtype="float32")
    ours = build_detector(teacher, len(data.classes), recipe)[0].to(group.device)
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=len(data.classes) + 1, min_size=size, max_size=size,
        size_divisible=size,
    ).to(group.device)  # fmt: skip
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4) for model in (ours, theirs)]

    def step_of_torchvision(samples: list[Any]) -> None:
        theirs.train()
        images = [as_input(sample, group.device) for sample in samples]
        targets = [{k: v.to(group.device) for k, v in sample.target.items()} for sample in samples]
        loss = sum(theirs(images, targets).values())
        loss.item()  # as a loop that watches for losses that are not finite
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad(set_to_none=True)

    seconds: dict[str, list[float]] = {"ours": [], "torchvision": []}
    for number, samples in enumerate(batches):
        steps = {
            "ours": lambda: train_step(ours, optimizers[0], samples, number, recipe, group),  # noqa: B023
            "torchvision": lambda: step_of_torchvision(samples),  # noqa: B023
        }
        order = list(steps) if number % 2 else list(steps)[::-1]
        for name in order:
            started = _now(group.device)
            steps[name]()
            if number:  # the first is a warm-up
                seconds[name].append(_now(group.device) - started)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["torchvision"])]
    return {
        "image_size": size,
        "batch_size": batch,
        "turns": arguments.turns,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "images_per_second": {k: batch / statistics.median(v) for k, v in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    # On a machine that others share, seconds of this process say more than those on the wall.
    return time.monotonic() if device.type == "cuda" else time.process_time()


# Memory ------------------------------------------------------------------------------------------


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of a step with windows and without."""
    rows = []
    cases = [
        (name, fused, window) for name, fused in arguments.networks for window in ("auto", "off")
    ]
    for name, fused, window in cases:
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_peak,
            args=(sender, name, fused, window, arguments.memory_size, arguments.device),
        )
        process.start()
        sender.close()
        try:
            row = receiver.recv()
        except EOFError:
            row = {"peak_gib": None, "seconds": None}
        process.join()
        rows.append({"network": name, "fused": fused, "windows": window == "auto", **row})
        print(rows[-1], flush=True)
    return rows


def _peak(sender: Any, name: str, fused: bool, window: str, size: int, device: str) -> None:
    import timm

    timm.layers.set_fused_attn(fused)
    torch.set_num_threads(os.cpu_count() or 1)
    teacher = load_encoder(f"timm:{name}@random", device="cpu", dtype="float32")
    backbone, _ = build_backbone(teacher, size, window=window)
    backbone.to(device).train()
    images = torch.randn(1, 3, size, size, device=device)
    before = _held(device)
    started = time.process_time()
    loss = sum(level.square().mean() for level in backbone(images).values())
    loss.backward()
    seconds = time.process_time() - started
    if device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = torch.cuda.max_memory_allocated()
    sender.send({"peak_gib": (peak - before) / 2**30, "seconds": seconds})


def _held(device: str) -> float:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# GPU time of the paper's schedule ------------------------------------------------------------------


def schedule(arguments: argparse.Namespace) -> dict[str, Any]:
    """Operations of one training image of ViTDet's ViT-B at 1024 px, counted without computing them.

    The counter takes a multiplication and an addition as two. A backward pass has twice those of the forward pass.
    """
    recipe = DetectRecipe(image_size=arguments.memory_size, batch_size=1, dtype="float32")
    teacher = load_encoder("timm:vit_base_patch16_224@random", device="cpu", dtype="float32")
    detector, _ = build_detector(teacher, 80, recipe)
    detector = detector.to("meta")
    counts = {}
    size, channels = recipe.image_size, recipe.channels
    pieces = {
        "backbone": (detector.backbone, torch.empty(1, 3, size, size, device="meta")),
        "box head": (
            detector.roi_heads.box_head,
            torch.empty(recipe.proposals, channels, 7, 7, device="meta"),
        ),
        "mask head": (
            torch.nn.Sequential(detector.roi_heads.mask_head, detector.roi_heads.mask_predictor),
            torch.empty(recipe.proposals // 4, channels, 14, 14, device="meta"),
        ),
    }
    for name, (module, given) in pieces.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(given)
        counts[name] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        detector.rpn.head(
            [
                torch.empty(1, channels, size // stride, size // stride, device="meta")
                for stride in (4, 8, 16, 32, 64)
            ]
        )
    counts["region proposals"] = counter.get_total_flops()
    images = 118_287 * 100
    return {"forward": counts, "step": 3 * sum(counts.values()), "images": images}


# The page ----------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """All that was measured, as markdown."""
    parts = {
        "overfit": _overfit_text,
        "throughput": _throughput_text,
        "memory": _memory_text,
        "schedule": _schedule_text,
    }
    return "\n\n".join(text(result[name]) for name, text in parts.items() if name in result)


def _overfit_text(found: dict[str, Any]) -> str:
    spent, settings = found["seconds"], found["settings"]
    keys = ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50")
    rows = [
        f"| {name} | " + " | ".join(f"{metrics[key]:.3f}" for key in keys) + " |"
        for name, metrics in (
            ("the 80 training images", found["train"]),
            ("the 79 of val", found["val"]),
        )
    ]
    return f"""## 80 images learned by heart

`{found["model"]}`, {settings["max_steps"]} steps of {settings["batch_size"]} images at {settings["image_size"]} px:
{spent["cpu"] / 60:.0f} minutes of CPU time, which is {spent["cpu"] / 120:.0f} minutes of two cores; on the clock
{spent["wall"] / 60:.0f} minutes, on a machine that others used as well.

| images | box AP | box AP50 | box AP75 | mask AP | mask AP50 |
| --- | --- | --- | --- | --- | --- |
{rows[0]}
{rows[1]}

The first row shows that labels, matching, boxes and masks are right; the second what 80 images teach of 80
classes."""


def _throughput_text(found: dict[str, Any]) -> str:
    rows = [
        f"| {label} | {found['seconds'][name]:.2f} | {found['images_per_second'][name]:.3f} |"
        for name, label in (
            ("ours", "`train_step`"),
            ("torchvision", "`maskrcnn_resnet50_fpn_v2`"),
        )
    ]
    return f"""## A step against torchvision's

ResNet-50, {found["batch_size"]} images of {found["image_size"]} px, {found["turns"]} turns, the median:

| | s a step | images/s |
| --- | --- | --- |
{rows[0]}
{rows[1]}

Ours is {found["ratio"]:.2f} times as fast."""


def _memory_text(found: list[dict[str, Any]]) -> str:
    rows = [
        f"| {first['network']} | {'fused' if first['fused'] else 'plain'} | {_memory_cell(first)} | "
        f"{_memory_cell(second)} |"
        for first, second in zip(found[::2], found[1::2])
    ]
    table = "\n".join(rows)
    return f"""## Peak memory of a step of the backbone at 1024 px, one image

| network | attention | windows of 16 x 16, 4 global blocks | all blocks global |
| --- | --- | --- | --- |
{table}

Fused attention never holds the matrix of all pairs: there windows save time more than memory. Plain attention does,
and its memory grows with the square of the number of tokens."""


def _schedule_text(found: dict[str, Any]) -> str:
    forward, total = sum(found["forward"].values()), found["step"] * found["images"]
    parts = ", ".join(f"{name} {count / 1e12:.2f}" for name, count in found["forward"].items())
    return f"""## The paper's schedule

ViT-B at 1024 px: {forward / 1e12:.2f} TFLOP forward an image ({parts}), three times that with the backward pass;
100 epochs of COCO: {total / 1e18:.0f} EFLOP. At 100 TFLOP/s, a third of an A100's bfloat16 peak:
{total / 1e14 / 3600:.0f} GPU hours."""


def _memory_cell(row: dict[str, Any]) -> str:
    if row["peak_gib"] is None:
        return "out of memory"
    return f"{row['peak_gib']:.2f} GiB, {row['seconds']:.0f} s"


def main() -> None:
    """Measure the parts that were asked for; what others measured before stays."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DATA")
    parser.add_argument(
        "--part", choices=["overfit", "throughput", "memory", "schedule", "all"], default="all"
    )
    parser.add_argument("--model", default="timm:vit_tiny_patch16_224@random", metavar="SPEC")
    parser.add_argument("--out", type=Path, default=Path("runs/detection"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--size", type=int, default=320, help="Image size of the throughput.")
    parser.add_argument("--batch-size", type=int, default=1, help="Of the throughput.")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--memory-size", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    arguments.networks = [
        ("vit_tiny_patch16_224", True),
        ("vit_tiny_patch16_224", False),
        ("vit_base_patch16_224", True),
    ]
    file = machine.RESULTS / "detection.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    for name, measure in (
        ("schedule", schedule),
        ("throughput", throughput),
        ("memory", memory),
        ("overfit", overfit),
    ):
        if arguments.part in (name, "all"):
            try:
                result[name] = measure(arguments)
            except Interrupted as interruption:
                raise SystemExit(f"{interruption}") from None
    result["machine"] = machine.describe(arguments.device)
    machine.write("detection", "Detection", result, table(result))


if __name__ == "__main__":
    main()
