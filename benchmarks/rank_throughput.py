"""Images per second of the ranking loop, over the bare forward passes and over the obvious script.

    python benchmarks/rank_throughput.py [IMAGES]

The architectures are those of the paper's four teachers, with untrained weights, which cost the same. IMAGES is a
folder; by default the photographs that ship with the package. All three ways take turns in one process, so
that a noisy machine is noisy for all of them; what is reported are ratios of the medians.
"""

import argparse
import tempfile
import time
from pathlib import Path

import machine
import timm
import torch
from obvious_script import mean_similarities

import tokdiv
import tokdiv.measure
from tokdiv.dist import choose_device, choose_dtype
from tokdiv.similarity import pooled_similarity, token_similarity

SAMPLES = Path(tokdiv.__file__).parent / "samples" / "images"
TEACHERS = {
    "mae_vit_base": "vit_base_patch16_224",
    "mae_vit_large": "vit_large_patch16_224",
    "dino_vit_base": "vit_base_patch16_224",
    "dino_resnet50": "resnet50",
}
TARGETS = {"bound": (0.95, 0.90), "script": (3.5, 1.5)}  # on a CPU, on a GPU


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("images", nargs="?", type=Path, default=SAMPLES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-images", type=int, help="[default: 64 on a CPU, 4096 on a GPU]")
    parser.add_argument("--batch-size", type=int, help="[default: 32 on a CPU, 256 on a GPU]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--script-images", type=int, help="for the obvious script [default: half of them]"
    )
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    gpu = device.type == "cuda"
    batch_size = arguments.batch_size or (256 if gpu else 32)
    num_images = arguments.num_images or (4096 if gpu else 64)
    script_images = arguments.script_images or num_images // 2
    dtype = choose_dtype("auto", device)
    tokdiv.measure.MEAN_IMAGES = 2  # so that the centred similarity is computed, as in a long run

    teachers = [
        tokdiv.load_teacher(f"{name}=timm:{arch}@random:seed={n}", device=device, dtype=dtype)
        for n, (name, arch) in enumerate(TEACHERS.items())
    ]
    models = {n: timm.create_model(a).eval().to(device) for n, a in TEACHERS.items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = _repeat(arguments.images, Path(folder), num_images)
        views = torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8, device=device)
        ways = {
            "rank": lambda: _rank(folder, teachers, batch_size, str(device)),
            "bound": lambda: _bound(teachers, views, num_images, device),
            "script": lambda: _script(paths[:script_images], models, batch_size, device, dtype),
        }
        for way in ("rank", "bound"):  # warm up: threads, caches, kernels
            ways[way]()
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(arguments.repeats):
            for way, measure in ways.items():
                rates[way].append(measure())
        share, parts = _similarity_share(teachers, views, device)
    ratios = {
        way: [r / other for r, other in zip(rates["rank"], rates[way])]
        for way in ("bound", "script")
    }
    rows = [
        "| | images/s (median) | `tokdiv rank` over it | asked for |",
        "| --- | ---: | ---: | ---: |",
        f"| `tokdiv rank`, {dtype} | {machine.median(rates['rank']):.2f} | | |",
        f"| bare forward passes, {dtype} | {machine.median(rates['bound']):.2f} "
        f"| {machine.median(ratios['bound']):.3f} | {TARGETS['bound'][gpu]} |",
        f"| the obvious script, {'bfloat16' if gpu else 'float32'} | {machine.median(rates['script']):.2f} "
        f"| {machine.median(ratios['script']):.2f} | {TARGETS['script'][gpu]} |",
        "",
        f"The three similarities (raw, centred, 7x7) take {share:.2%} of the forward passes' time; the raw one "
        f"alone, which the order is made of, {parts['raw']:.2%}.",
        f"{num_images} images ({script_images} for the script) in batches of {batch_size}, "
        f"{arguments.repeats} paired repeats.",
    ]
    if not gpu:
        rows.append("On a GPU: not measured here.")
    result = {
        "machine": machine.describe(str(device)),
        "dtype": dtype,
        "batch_size": batch_size,
        "num_images": num_images,
        "images_per_second": rates,
        "ratios": {way: machine.median(values) for way, values in ratios.items()},
        "similarity_share": share,
        "similarity_parts": parts,
    }
    name = "rank_throughput_gpu" if gpu else "rank_throughput"
    machine.write(
        name, "Ranking throughput: the paper's four architectures", result, "\n".join(rows)
    )


def _repeat(source: Path, folder: Path, count: int) -> list[Path]:
    """`count` image files, the same ones over and over."""
    originals = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    paths = [folder / f"{n:06d}.jpg" for n in range(count)]
    for n, path in enumerate(paths):
        path.write_bytes(originals[n % len(originals)].read_bytes())
    return paths


def _rank(folder: str, teachers: list[tokdiv.Teacher], batch_size: int, device: str) -> float:
    begun = time.perf_counter()
    ranking = tokdiv.rank(folder, teachers, certify="none", batch_size=batch_size, device=device)
    return ranking.data["images"] / (time.perf_counter() - begun)


def _bound(
    teachers: list[tokdiv.Teacher], views: torch.Tensor, num_images: int, device: torch.device
) -> float:
    """The networks alone, on a normalised batch that lies in memory."""
    images = [teacher._normalised(views) for teacher in teachers]
    _wait(device)
    begun, done = time.perf_counter(), 0
    with torch.inference_mode():
        while done < num_images:
            for teacher, batch in zip(teachers, images):
                with torch.autocast(
                    device.type, teacher.dtype, enabled=teacher.dtype != torch.float32
                ):
                    teacher._features(batch)
            done += len(views)
    _wait(device)
    return done / (time.perf_counter() - begun)


def _script(
    paths: list[Path], models: dict, batch_size: int, device: torch.device, dtype: str
) -> float:
    begun = time.perf_counter()
    precision = torch.bfloat16 if device.type == "cuda" and dtype == "bfloat16" else torch.float32
    mean_similarities(paths, models, batch_size, device=device.type, dtype=precision)
    _wait(device)
    return len(paths) / (time.perf_counter() - begun)


def _similarity_share(
    teachers: list[tokdiv.Teacher], views: torch.Tensor, device: torch.device
) -> tuple[float, dict[str, float]]:
    """Time of the similarities over that of the forward passes, in all and one by one."""
    forward, parts = 0.0, {"raw": 0.0, "centred": 0.0, "7x7": 0.0}
    with torch.inference_mode():
        for teacher in teachers:
            tokens, seconds = _timed(lambda t=teacher: t(views), device)
            forward += seconds
            mean = tokens.float().mean(dim=(0, 1))
            parts["raw"] += _timed(lambda x=tokens: token_similarity(x), device)[1]
            parts["centred"] += _timed(
                lambda x=tokens, m=mean: token_similarity(x.float() - m), device
            )[1]
            parts["7x7"] += _timed(
                lambda x=tokens, g=teacher.grid: pooled_similarity(x, g), device
            )[1]
    return sum(parts.values()) / forward, {name: value / forward for name, value in parts.items()}


def _timed(function, device: torch.device):
    """The result, and the median seconds of three calls."""
    seconds = []
    for _ in range(3):
        _wait(device)
        begun = time.perf_counter()
        result = function()
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    return result, machine.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
