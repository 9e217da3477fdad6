"""Images per second of a pretraining step, beside the implementations a user would pick instead.

    python benchmarks/pretrain_throughput.py                  # a CPU: ViT-S, batch 32
    python benchmarks/pretrain_throughput.py --device cuda --student vit_base --batch-size 256

All have the same student (depth, widths, 80 of 196 patches visible, the same decoder), batch and fused AdamW.
First `pixels` as the teacher against lightly's masked-autoencoder modules and Hugging Face's
ViTMAEForPreTraining; then a ResNet-50 teacher against the bound: the bare student's step and the bare teacher's
forward pass, added. Ours is `train_step`, which the training loop calls: from uint8 images, with the gradient's
norm and the metrics. The peers get normalized float images.

Each variant has its own process, which makes one step to warm up; then the processes take turns, one step each.
Figures are medians of the repeats' ratios. On a CPU ours runs as `img2vec pretrain` does, with freed memory
kept. Peak memory is the kernel's record of a process that builds the variant and makes two steps, minus what it
held after the imports.

A last table says where a step's time goes: decode and augmentation of the photographs that ship with the
package (in one thread; the loop does them beside the step), teacher, student and optimizer.

Needs lightly and transformers: `pip install -e '.[bench,dev]'`.
"""

import argparse
import ctypes
import dataclasses
import functools
import gc
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from torch import nn

from img2vec.config import Config, make_config
from img2vec.data import Batch, View, plan_epoch, random_view
from img2vec.masking import draw_mask, plan_layout
from img2vec.model import make_model, make_student
from img2vec.optim import make_optimizer
from img2vec.step import make_training, train_step
from tokdiv import load_teacher
from tokdiv.data.decode import decode_image
from tokdiv.dist import current_processes
from tokdiv.memory import M_MMAP_THRESHOLD, freed_memory_kept

Step = Callable[[], object]
SAMPLES = Path(__file__).parent.parent / "tokdiv" / "samples" / "images"
RESNET = "timm:resnet50@random"  # speed does not depend on the weights
HIDDEN = 116  # of 196 patches: what round(0.6 * 49) blocks of 32 px hide
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense, from NVIDIA's data sheets


def batch_of(count: int, mask_of: Callable[[int], np.ndarray], device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 224, 224), generator=generator).to(torch.uint8)
    masks = torch.from_numpy(np.stack([mask_of(i) for i in range(count)]))
    return Batch(np.arange(count), images, masks, torch.ones(count)).to(device)


def ours(arguments: argparse.Namespace, dtype: str, teacher_spec: str, part: str = "step") -> Step:
    """`train_step` as the loop calls it, or a part of it.

    Args:
        part: "step"; "fused", the same with torch's fused attention everywhere; "student", with a teacher that
            returns fixed tokens; "teacher" or "optimizer" alone.
    """
    group = current_processes(arguments.device)
    config = make_config(arguments.student, options={"dtype": dtype, "device": arguments.device})
    compile = config.compiles_on(group.device)
    teacher = load_teacher(teacher_spec, device=group.device, dtype=dtype)
    teacher.prepare(group.device, dtype, compile)
    model = make_model(make_student(config), teacher, config)
    plan = plan_epoch(arguments.batch_size, arguments.batch_size, 1, 1)
    training = make_training(config, plan, group, teacher, model)
    batch = batch_of(arguments.batch_size, lambda i: draw_mask(model.layout, 0, 0, i), group.device)
    if part == "teacher":
        return lambda: teacher(batch.images)
    if part == "optimizer":
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return training.optimizer.step
    if part == "student":
        fixed: Any = FixedTeacher(teacher(batch.images), teacher.grid, teacher.size)
        training = dataclasses.replace(training, teacher=fixed)
    if part == "fused":
        for block in [*model.encoder.blocks, *model.decoder_blocks]:
            block.attn.fused_attn = True
    return lambda: train_step(training, itertools.repeat(batch), lr=1e-4)


@dataclasses.dataclass
class FixedTeacher:
    """A teacher that costs nothing: it returns the tokens of one batch."""

    tokens: torch.Tensor
    grid: tuple[int, int]
    size: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.tokens


def hugging_face(arguments: argparse.Namespace, dtype: str) -> Step:
    """ViTMAEForPreTraining with the student's and the decoder's sizes, SDPA attention."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    encoder, config = sizes(arguments)
    settings = ViTMAEConfig(
        hidden_size=encoder.embed_dim,
        num_hidden_layers=len(encoder.blocks),
        num_attention_heads=encoder.blocks[0].attn.num_heads,
        intermediate_size=4 * encoder.embed_dim,
        decoder_hidden_size=config.decoder_dim,
        decoder_num_hidden_layers=config.decoder_depth,
        decoder_num_attention_heads=config.decoder_dim // 32,
        decoder_intermediate_size=4 * config.decoder_dim,
        mask_ratio=(HIDDEN - 0.5) / 196,
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    model = ViTMAEForPreTraining(settings).train().to(arguments.device)
    return peer_step(arguments, dtype, model, lambda images: model(images).loss)


def lightly(arguments: argparse.Namespace, dtype: str) -> Step:
    """lightly's MAE example: MaskedVisionTransformerTIMM and MAEDecoderTIMM."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    encoder, config = sizes(arguments)

    class Mae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = MaskedVisionTransformerTIMM(vit=encoder)
            self.decoder = MAEDecoderTIMM(
                num_patches=196,
                patch_size=16,
                embed_dim=encoder.embed_dim,
                decoder_embed_dim=config.decoder_dim,
                decoder_depth=config.decoder_depth,
                decoder_num_heads=config.decoder_dim // 32,
                mlp_ratio=4.0,
            )
            self.length = self.backbone.sequence_length

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            size = (len(images), self.length)
            keep, hidden = utils.random_token_mask(
                size=size, mask_ratio=HIDDEN / self.length, device=images.device
            )
            encoded = self.backbone.encode(images=images, idx_keep=keep)
            x = self.decoder.embed(encoded)
            masked = utils.repeat_token(self.decoder.mask_token, size)
            masked = utils.set_at_index(masked, keep, x.type_as(masked))
            decoded = self.decoder.decode(masked)
            predicted = self.decoder.predict(utils.get_at_index(decoded, hidden))
            target = utils.get_at_index(utils.patchify(images, 16), hidden - 1)
            target = utils.normalize_mean_var(target, dim=-1)
            return nn.functional.mse_loss(predicted, target)

    model = Mae().train().to(arguments.device)
    return peer_step(arguments, dtype, model, model)


def sizes(arguments: argparse.Namespace) -> tuple[nn.Module, Config]:
    config = make_config(arguments.student)
    return make_student(config), config


def peer_step(
    arguments: argparse.Namespace,
    dtype: str,
    model: nn.Module,
    loss: Callable[[torch.Tensor], torch.Tensor],
) -> Step:
    device = arguments.device
    if device == "cuda":
        model.compile()
    optimizer = make_optimizer(model, 0.05)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(arguments.batch_size, 3, 224, 224, generator=generator).to(device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def step() -> None:
        with autocast:
            value = loss(images)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


VARIANTS: dict[str, Callable[[argparse.Namespace], Step]] = {
    "lightly, float32": lambda a: lightly(a, "float32"),
    "Hugging Face, float32": lambda a: hugging_face(a, "float32"),
    "img2vec pixels, float32": lambda a: ours(a, "float32", "pixels"),
    "lightly, bfloat16": lambda a: lightly(a, "bfloat16"),
    "Hugging Face, bfloat16": lambda a: hugging_face(a, "bfloat16"),
    "img2vec pixels, bfloat16": lambda a: ours(a, "bfloat16", "pixels"),
    "img2vec pixels, bfloat16, fused attention": lambda a: ours(a, "bfloat16", "pixels", "fused"),
    "img2vec pixels, bfloat16, freed memory not kept": lambda a: ours(a, "bfloat16", "pixels"),
    "img2vec ResNet-50, float32": lambda a: ours(a, "float32", RESNET),
    "bare student, float32": lambda a: ours(a, "float32", RESNET, "student"),
    "bare ResNet-50, float32": lambda a: ours(a, "float32", RESNET, "teacher"),
    "img2vec ResNet-50, bfloat16": lambda a: ours(a, "bfloat16", RESNET),
    "bare student, bfloat16": lambda a: ours(a, "bfloat16", RESNET, "student"),
    "bare ResNet-50, bfloat16": lambda a: ours(a, "bfloat16", RESNET, "teacher"),
    "bare optimizer": lambda a: ours(a, "bfloat16", RESNET, "optimizer"),
}
GROUPS = [list(VARIANTS)[:8], list(VARIANTS)[8:11], list(VARIANTS)[11:]]
MEASURED_MEMORY = GROUPS[0][:6]
PEERS = ("lightly", "Hugging Face")


def seconds(step: Step, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a step by variant; within a group the variants take turns, each time from another on."""
    fork = multiprocessing.get_context("fork")
    times: dict[str, list[float]] = {}
    for group in GROUPS:
        served = {}
        for name in group:
            here, there = fork.Pipe()
            process = fork.Process(target=serve, args=(there, arguments, name), daemon=True)
            process.start()
            served[name] = (process, here)
            here.recv()  # it is warm: the next one is built when this one rests
        times |= {name: [] for name in group}
        for repeat in range(arguments.repeats):
            shift = repeat % len(group)
            for name in group[shift:] + group[:shift]:
                served[name][1].send(True)
                times[name].append(served[name][1].recv())
            print(f"repeat {repeat + 1} of {arguments.repeats}", file=sys.stderr)
        for process, here in served.values():
            here.send(False)
            process.join()
    return times


def serve(connection: Connection, arguments: argparse.Namespace, name: str) -> None:
    """Build a variant, then make and time a step whenever the other end asks for one."""
    torch.set_num_threads(arguments.threads)
    on_gpu = arguments.device == "cuda"
    kept = not (on_gpu or name.startswith(PEERS) or name.endswith("not kept"))
    with freed_memory_kept() if kept else nullcontext():
        step = VARIANTS[name](arguments)
        step()
        connection.send(None)
        while connection.recv():
            if on_gpu:
                step()  # it gave its cache to the others
            connection.send(seconds(step, arguments.device))
            if on_gpu:
                torch.cuda.empty_cache()


def peak_memory(arguments: argparse.Namespace, name: str) -> float:
    """MiB that building a variant and two of its steps add to this process (or take on the GPU)."""
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu":
        # Blocks of 128 KiB and more go back to the system when they are freed, for every variant: what glibc
        # keeps of them by chance differs from run to run by tens of MiB.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's record of the peak begins anew
        before = kibibytes("VmRSS")
    step = VARIANTS[name](arguments)
    for _ in range(2):
        step()
    if arguments.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (kibibytes("VmHWM") - before) / 1024


def kibibytes(field: str) -> int:
    """A size in this process's status: VmRSS is what it holds now, VmHWM the most it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def peak_memories(arguments: argparse.Namespace) -> dict[str, float]:
    """Of variants, in a process of its own each."""
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        measured = pool.map(functools.partial(peak_memory, arguments), MEASURED_MEMORY, chunksize=1)
    return dict(zip(MEASURED_MEMORY, measured))


def paired(
    times: dict[str, list[float]], ours_name: str, other: Callable[[int], float]
) -> list[float]:
    """other's seconds / ours, per repeat: above 1, ours is faster."""
    return [other(i) / value for i, value in enumerate(times[ours_name])]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--student", default="vit_small", help="a preset")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    # Imported before the processes are forked, so that imports are in nobody's figure; forked before this one
    # has threads or a GPU.
    import lightly.models.modules  # noqa: F401
    import transformers.models.vit_mae.modeling_vit_mae  # noqa: F401

    memory = peak_memories(arguments)
    times = measure(arguments)
    peers = [f"{peer}, float32" for peer in PEERS]
    fastest = lambda i: min(times[name][i] for name in peers)  # noqa: E731
    bound = lambda dtype: (  # noqa: E731
        lambda i: times[f"bare student, {dtype}"][i] + times[f"bare ResNet-50, {dtype}"][i]
    )
    ratios = {
        "float32, of the faster peer (at least 0.97)": paired(
            times, "img2vec pixels, float32", fastest
        ),
        "bfloat16, of the faster peer in float32 (at least 2.5)": paired(
            times, "img2vec pixels, bfloat16", fastest
        ),
        "bfloat16, of the faster peer in bfloat16": paired(
            times,
            "img2vec pixels, bfloat16",
            lambda i: min(times[name.replace("float32", "bfloat16")][i] for name in peers),
        ),
        "bfloat16, of the same with fused attention everywhere": paired(
            times,
            "img2vec pixels, bfloat16",
            lambda i: times["img2vec pixels, bfloat16, fused attention"][i],
        ),
        "bfloat16, of the same with freed memory given back": paired(
            times,
            "img2vec pixels, bfloat16",
            lambda i: times["img2vec pixels, bfloat16, freed memory not kept"][i],
        ),
        "ResNet-50 teacher, float32, of the bound (at least 0.93)": paired(
            times, "img2vec ResNet-50, float32", bound("float32")
        ),
        "ResNet-50 teacher, bfloat16, of the bound": paired(
            times, "img2vec ResNet-50, bfloat16", bound("bfloat16")
        ),
    }

    rates = {n: arguments.batch_size / statistics.median(t) for n, t in times.items()}
    result = {
        "threads": arguments.threads,
        "student": arguments.student,
        "batch_size": arguments.batch_size,
        "repeats": arguments.repeats,
        "images_per_second": rates,
        "seconds": times,
        "ratios": ratios,
        "peak_memory_mib": memory,
    }
    parts = step_parts(arguments, times)
    result["milliseconds_an_image"] = parts
    if arguments.device == "cuda":
        result["model_flops_utilisation"] = utilisation(arguments, rates)
    text = ["| a step of | images/s (median) | peak memory, MiB |", "| --- | ---: | ---: |"]
    text += [
        f"| {n} | {r:.2f} | {memory[n]:.0f} |" if n in memory else f"| {n} | {r:.2f} | |"
        for n, r in rates.items()
    ]
    text += ["", "| img2vec's speed | median (least to most) |", "| --- | ---: |"]
    text += [f"| {name} | {spread(values)} |" for name, values in ratios.items()]
    whole = sum(parts.values())
    text += ["", "| with a ResNet-50, bfloat16 | ms an image | share |", "| --- | ---: | ---: |"]
    text += [f"| {name} | {ms:.1f} | {ms / whole:.1%} |" for name, ms in parts.items()]
    text += [
        "",
        f"{arguments.student}, batch {arguments.batch_size}, {arguments.threads} threads, {arguments.repeats} "
        "interleaved repeats.",
    ]
    if "model_flops_utilisation" in result:
        text[-1] += (
            f" Model FLOPs utilisation (bf16, pixels): {result['model_flops_utilisation']:.1%}."
        )
    else:
        text[-1] += " On a GPU: not measured."
    machine.record("pretraining", result, "\n".join(text), arguments.device)


def step_parts(arguments: argparse.Namespace, times: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds an image of each part of a step with a ResNet-50 teacher in bfloat16."""
    layout = plan_layout(224, 16, 32, 0.6, (7, 7))
    view = View(224, (0.2, 1.0), layout, seed=0)
    files = [path.read_bytes() for path in sorted(SAMPLES.glob("*.jpg"))]
    torch.set_num_threads(1)
    begin = time.perf_counter()
    images = [decode_image(data) for data in files]
    decoded = time.perf_counter()
    for position, image in enumerate(images):
        random_view(image, view, 0, position)
    augmented = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    ms = {
        name: statistics.median(times[name]) / arguments.batch_size * 1000
        for name in ("bare ResNet-50, bfloat16", "bare student, bfloat16", "bare optimizer")
    }
    optimizer = ms["bare optimizer"]
    return {
        "decode": (decoded - begin) / len(files) * 1000,
        "augmentation": (augmented - decoded) / len(files) * 1000,
        "teacher": ms["bare ResNet-50, bfloat16"],
        "student, forward and backward": ms["bare student, bfloat16"] - optimizer,
        "optimizer": optimizer,
    }


def utilisation(arguments: argparse.Namespace, rates: dict[str, float]) -> float | None:
    """Model FLOPs utilisation in bf16: counted FLOPs of one step, of the device's dense peak."""
    from torch.utils.flop_counter import FlopCounterMode

    peak = next(
        (value for name, value in PEAK_BF16.items() if name in torch.cuda.get_device_name()), None
    )
    if peak is None:
        return None
    small = argparse.Namespace(**vars(arguments) | {"device": "cpu", "batch_size": 1})
    step = ours(small, "float32", "pixels")
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() * rates["img2vec pixels, bfloat16"] / peak


if __name__ == "__main__":
    main()
