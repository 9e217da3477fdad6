"""Images/s of the ranking loop, compared with the bare forward passes and with the obvious script.

    python benchmarks/rank_throughput.py [IMAGES]

The architectures are those of the paper's four teachers, with untrained weights, which cost the same. IMAGES is a
folder; by default the photographs that ship with the package. All three ways take turns in one process, so
that a noisy machine is noisy for all of them; the results are medians of the repeats' ratios.

The matrix peak is measured in the same run, with the largest product of ViT-B at this batch size: it tells how
close to the machine's limit each teacher runs, and how much faster than the script any loop could be.
"""

import argparse
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import machine
import timm
import torch
from obvious_script import mean_similarities
from torch.utils.flop_counter import FlopCounterMode

import tokdiv
import tokdiv.judge
from tokdiv.data.decode import center_view, decode_image
from tokdiv.dist import choose_device, choose_dtype
from tokdiv.memory import freed_memory_kept
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
    parser.add_argument("--num-images", type=int, help="[default: 32 on a CPU, 4096 on a GPU]")
    parser.add_argument("--batch-size", type=int, help="[default: 16 on a CPU, 256 on a GPU]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--script-images", type=int, help="for the obvious script [default: a quarter of them]"
    )
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    gpu = device.type == "cuda"
    batch_size = arguments.batch_size or (256 if gpu else 16)
    num_images = arguments.num_images or (4096 if gpu else 32)
    script_images = arguments.script_images or num_images // 4
    dtype = choose_dtype("auto", device)
    tokdiv.judge.MEAN_IMAGES = 2  # so that the centred similarity is computed, as in a long run

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
        _bound(teachers, views, batch_size, device)  # warm up: threads, caches, kernels
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(arguments.repeats):
            for way, measure in ways.items():
                rates[way].append(measure())
        with freed_memory_kept():
            steps = _milliseconds(paths, teachers, views, device)
            similarities = _similarity_milliseconds(teachers, views, device)
        kept = _gain_of_kept_memory(teachers[-1], views, device)
        forward = sum(ms for name, ms in steps.items() if name.startswith("forward"))
        parts = {name: ms / forward for name, ms in similarities.items()}
        share = sum(parts.values())
        steps["similarities"] = share * forward
        peaks = {t: _matrix_peak(t, batch_size, device) for t in (torch.float32, torch.bfloat16)}
    ratios = {
        way: [r / other for r, other in zip(rates["rank"], rates[way])]
        for way in ("bound", "script")
    }
    rows = [
        "| | images/s (median) | `tokdiv rank` over it | target |",
        "| --- | ---: | ---: | ---: |",
        f"| `tokdiv rank`, {dtype} | {machine.median(rates['rank']):.2f} | | |",
        f"| bare forward passes, {dtype} | {machine.median(rates['bound']):.2f} "
        f"| {machine.median(ratios['bound']):.3f} | {TARGETS['bound'][gpu]} |",
        f"| the obvious script, {'bfloat16' if gpu else 'float32'} | {machine.median(rates['script']):.2f} "
        f"| {machine.median(ratios['script']):.2f} | {TARGETS['script'][gpu]} |",
        "",
        f"The three similarities (raw, centred, 7x7) take {share:.2%} of the forward passes' time; the raw one "
        f"alone, which decides the order, {parts['raw']:.2%}.",
        f"{num_images} images ({script_images} for the script) in batches of {batch_size}, "
        f"{arguments.repeats} paired repeats.",
    ]
    flops = {teacher.name: _flops(teacher) for teacher in teachers}
    whole = sum(steps.values())
    rows += ["", "| per image | ms | share |", "| --- | ---: | ---: |"]
    rows += [f"| {name} | {ms:.2f} | {ms / whole:.1%} |" for name, ms in steps.items()]
    rows += ["", "| teacher | GFLOP per image | of the matrix peak |", "| --- | ---: | ---: |"]
    shares = {}
    for teacher in teachers:
        speed = flops[teacher.name] / (steps[f"forward, {teacher.name}"] / 1000)
        shares[teacher.name] = speed / peaks[teacher.dtype]
        rows.append(
            f"| {teacher.name} | {flops[teacher.name] / 1e9:.1f} | {shares[teacher.name]:.0%} |"
        )
    script_speed = sum(flops.values()) * machine.median(rates["script"])
    ceiling = peaks[teachers[0].dtype] / script_speed
    rows += [
        "",
        f"Matrix peak: {peaks[torch.bfloat16] / 1e9:.0f} GFLOP/s in bfloat16, {peaks[torch.float32] / 1e9:.0f} in "
        f"float32. The script runs at {script_speed / 1e9:.0f} GFLOP/s: a loop of matrix products alone, at the "
        f"peak and with everything else free, would be {ceiling:.2f} times as fast.",
        "Decoding runs in threads during the forward passes.",
    ]
    if kept:
        rows.append(
            f"With freed memory given back to the system, {teachers[-1].name} takes {kept:.2f} times as long."
        )
    if not gpu:
        rows.append("On a GPU: not measured.")
    result = {
        "dtype": dtype,
        "batch_size": batch_size,
        "num_images": num_images,
        "images_per_second": rates,
        "ratios": {way: machine.median(values) for way, values in ratios.items()},
        "similarity_share": share,
        "similarity_parts": parts,
        "milliseconds_an_image": steps,
        "share_of_matrix_peak": shares,
        "matrix_peak": {str(t): peak for t, peak in peaks.items()},
        "ceiling_over_script": ceiling,
        "gain_of_kept_memory": kept,
    }
    machine.record("ranking", result, "\n".join(rows), str(device))


def _milliseconds(
    paths: list[Path], teachers: list[tokdiv.Teacher], views: torch.Tensor, device: torch.device
) -> dict[str, float]:
    """Milliseconds per image: reading, decoding and the view in one thread, the copy, each forward pass."""
    torch.set_num_threads(1)
    paths, spent = paths[:64], {}

    def each(name: str, function, items: list) -> list:
        begun = time.perf_counter()
        results = [function(item) for item in items]
        spent[name] = (time.perf_counter() - begun) / len(items) * 1000
        return results

    images = each("decode", decode_image, each("read", Path.read_bytes, paths))
    each("resize and crop", lambda image: center_view(image, 224), images)
    torch.set_num_threads(os.cpu_count() or 1)
    if device.type == "cuda":
        pinned = views.cpu().pin_memory()
        spent["copy"] = _timed(lambda: pinned.to(device), device)[1] / len(views) * 1000
    with torch.inference_mode():
        for teacher in teachers:
            seconds = _timed(lambda t=teacher: t(views), device)[1]
            spent[f"forward, {teacher.name}"] = seconds / len(views) * 1000
    return spent


def _flops(teacher: tokdiv.Teacher) -> int:
    """Floating-point operations of the forward pass of one image."""
    view = torch.zeros(1, 3, 224, 224, dtype=torch.uint8, device=teacher.mean.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        teacher(view)
    return counter.get_total_flops()


def _matrix_peak(dtype: torch.dtype, batch_size: int, device: torch.device) -> float:
    """FLOP/s of ViT-B's largest matrix product."""
    rows, inner, columns = batch_size * 197, 768, 3072
    tokens = torch.randn(rows, inner, device=device, dtype=dtype)
    weight = torch.randn(columns, inner, device=device, dtype=dtype)
    seconds = []
    for _ in range(8):
        _wait(device)
        begun = time.perf_counter()
        torch.nn.functional.linear(tokens, weight)
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * rows * inner * columns / min(seconds)


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
    """The networks alone, on a normalized batch in memory."""
    images = [teacher._normalized(views) for teacher in teachers]
    _wait(device)
    begun, done = time.perf_counter(), 0
    with torch.inference_mode(), freed_memory_kept():
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


def _gain_of_kept_memory(
    teacher: tokdiv.Teacher, views: torch.Tensor, device: torch.device
) -> float | None:
    """Time of the forward pass with freed memory given back, over that with it kept; None on a GPU."""
    if device.type != "cpu":
        return None
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with torch.inference_mode():
        for _ in range(3):
            for keep in seconds:
                with freed_memory_kept() if keep else nullcontext():
                    teacher(views)
                    seconds[keep].append(_timed(lambda: teacher(views), device)[1])
    return machine.median([a / b for a, b in zip(seconds[False], seconds[True])])


def _similarity_milliseconds(
    teachers: list[tokdiv.Teacher], views: torch.Tensor, device: torch.device
) -> dict[str, float]:
    """Milliseconds per image of each similarity, for all teachers together."""
    spent = {"raw": 0.0, "centred": 0.0, "7x7": 0.0}
    with torch.inference_mode():
        for teacher in teachers:
            tokens = teacher(views)
            mean = tokens.float().mean(dim=(0, 1))
            ways = {
                "raw": lambda x=tokens: token_similarity(x),
                "centred": lambda x=tokens, m=mean: token_similarity(x.float() - m),
                "7x7": lambda x=tokens, g=teacher.grid: pooled_similarity(x, g),
            }
            for name, way in ways.items():
                spent[name] += _timed(way, device)[1] / len(views) * 1000
    return spent


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
