"""How the cost of a ranking grows with processes, images, teachers, tokens and width; and its memory.

    python benchmarks/scaling.py

torchrun starts processes of one thread each, which rank a few images first, so that no figure includes the
start. Memory is the peak of a process that records and judges the scores of simulated images and teachers and
writes the ranking, as `tokdiv rank` does, without networks.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
import torch

import tokdiv
from tokdiv.config import Settings
from tokdiv.data.source import Source
from tokdiv.dist import processes
from tokdiv.hand_over import write_ranking
from tokdiv.judge import Judge, Plan, Share
from tokdiv.ranking import make_ranking
from tokdiv.scores import MEASURES, ScoreTable
from tokdiv.similarity import token_similarity
from tokdiv.state import State
from tokdiv.teachers.load import load_teachers

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "tokdiv" / "samples" / "images"
VIT = "timm:vit_small_patch16_224@random"
SIMULATED_TEACHERS = 10


def copies(count: int, folder: Path) -> Path:
    """A folder of `count` images: links to the photographs that ship with the package."""
    originals = sorted(SAMPLES.glob("*.jpg"))
    folder.mkdir(parents=True)
    for n in range(count):
        (folder / f"{n:06d}.jpg").symlink_to(originals[n % len(originals)])
    return folder


def process_rates(
    counts: list[int], images: Path, few: int, many: int, repeats: int
) -> dict[int, list[float]]:
    """Images/s of a number of processes of one thread each, with `many` images per process."""
    # On a CPU one thread each; torchrun itself sets that for processes on GPUs too.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(repeats):
        for count in counts:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
            command = [sys.executable, *launcher, __file__, "--timed", images]
            command += [few * count, many * count]
            done = subprocess.run(
                list(map(str, command)),
                cwd=ROOT,
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            rates[count].append(many * count / float(done.stdout.split()[-1]))
    return rates


def timed_process(images: Path, few: int, many: int) -> None:
    """One of the processes: ranks `few` images to warm up, then `many`; prints the seconds of these."""
    on_gpu = torch.cuda.is_available()
    batch_size = 256 if on_gpu else 16
    with processes() as group:
        teacher = tokdiv.load_teacher(VIT, device=group.device, dtype="bfloat16")
        settings = {"certify": "none", "compile": "off", "batch_size": batch_size}
        if not on_gpu:
            settings["workers"] = 1
        with tempfile.TemporaryDirectory() as folder:
            own = group.broadcast(folder)
            tokdiv.rank(images, [teacher], f"{own}/few", max_images=few, **settings)
            begin = time.perf_counter()
            tokdiv.rank(images, [teacher], f"{own}/many", max_images=many, **settings)
            seconds = time.perf_counter() - begin
            group.gather(None)  # the folder is rank 0's
        if group.rank == 0:
            print(seconds)


def rank_seconds(images: Path, teachers: list[tokdiv.Teacher], count: int) -> float:
    begin = time.perf_counter()
    tokdiv.rank(images, teachers, certify="none", max_images=count, batch_size=16, compile="off")
    return time.perf_counter() - begin


def similarity_seconds(K: int, C: int) -> float:  # noqa: N803
    tokens = torch.randn(16, K, C)
    passes = []
    for _ in range(7):
        begin = time.perf_counter()
        token_similarity(tokens)
        passes.append(time.perf_counter() - begin)
    return min(passes)


def peak_bytes(count: int) -> int:
    """Peak memory of a process that judges `count` simulated images."""
    command = [sys.executable, __file__, "--simulate", str(count)]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return int(run.stdout)


def simulate(count: int) -> None:
    """Record and judge simulated scores; prints the peak of the resident memory in bytes."""
    teachers = [
        tokdiv.Teacher(torch.nn.Identity(), lambda x: x.flatten(2)[:, :, :4], size=8, name=f"t{n}")
        for n in range(SIMULATED_TEACHERS)
    ]
    source = simulated_source(count)
    settings = Settings(certify="none", batch_size=64)
    with tempfile.TemporaryDirectory() as folder:
        table = ScoreTable([t.name for t in teachers], source.key)
        judge = Judge(table, State(Path(folder) / "state", {}), teachers, source, settings)
        generator = np.random.default_rng(0)
        while plan := judge.plan():
            start = plan.start
            while start < plan.stop:
                stop = min(start + 4096, plan.stop)
                verdict = judge.take([simulated_share(generator, plan, start, stop)], plan)
                start = stop
                if verdict.replan:
                    break
        ranking = make_ranking(
            table,
            judge.certifier.certificate(),
            [teacher.spec for teacher in teachers],
            source,
            settings,
            dict.fromkeys(table.teachers, "float32"),
            {},
        )
        table.write_results(Path(folder), [teacher.name for teacher in ranking.teachers])
        write_ranking(ranking, Path(folder))
    print(peak_memory())


def peak_memory() -> int:
    """Bytes. Of this process alone: the record of getrusage starts at the parent's peak on Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = status.read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def simulated_source(count: int) -> Source:
    """Images that have names only."""
    return Source("simulated", count, "simulated", key_of="{:08d}.jpg".format)


def simulated_share(generator: np.random.Generator, plan: Plan, start: int, stop: int) -> Share:
    """Scores as real networks give them: means 0.01 apart, sd 0.08."""
    shape = (stop - start, len(plan.columns), len(MEASURES))
    means = 0.3 + 0.01 * np.array(plan.columns)[None, :, None]
    scores = generator.normal(means, 0.08, shape).clip(-0.3, 1).astype(np.float32)
    tokens = (
        [np.zeros((stop - start, 4), np.float32) for _ in plan.columns] if not plan.means else []
    )
    positions = np.arange(start, stop)
    keys = [f"{n:08d}.jpg" for n in positions]
    return Share(start, stop, positions, keys, [None] * len(positions), scores, tokens, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulate", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--timed", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.simulate:
        simulate(arguments.simulate)
        return
    if arguments.timed:
        images, few, many = arguments.timed
        timed_process(Path(images), int(few), int(many))
        return
    gpus = torch.cuda.device_count()
    counts = [n for n in (1, 2, 4, 8) if n <= (gpus or os.cpu_count() or 1)]
    result: dict[str, object] = {}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        few, many = (2048, 8192) if gpus else (16, 64)  # images a process
        images = copies(many * max(counts), Path(name) / "images")
        rates = process_rates(counts, images, few, many, arguments.repeats)
        rows += ["| processes | images/s (median) | of the ideal |", "| ---: | ---: | ---: |"]
        for count, values in rates.items():
            efficiency = machine.median([v / (count * one) for v, one in zip(values, rates[1])])
            asked = " (target 0.9)" if count == 2 else ""
            rows.append(f"| {count} | {machine.median(values):.1f} | {efficiency:.2f}{asked} |")
        result["processes"] = rates
        unmeasured = [str(n) for n in (2, 4, 8) if n not in counts]
        if not gpus:
            rows.append("\nOne thread each, ViT-S. On 1, 2, 4 and 8 GPUs: not measured.")
        elif unmeasured:
            rows.append(f"\nViT-S. On {', '.join(unmeasured)} GPUs: not measured.")

        teachers = load_teachers([f"s{n}={VIT}:seed={n}" for n in range(4)])
        rank_seconds(images, teachers, 16)
        rows += [
            "",
            "| images (1 teacher) | ms per image | | teachers (48 images) | ms per image and teacher |",
        ]
        rows.append("| ---: | ---: | --- | ---: | ---: |")
        by_images, by_teachers = {}, {}
        for count, number in ((32, 1), (64, 2), (128, 4)):
            by_images[count] = rank_seconds(images, teachers[:1], count) / count * 1000
            by_teachers[number] = rank_seconds(images, teachers[:number], 48) / 48 / number * 1000
            rows.append(
                f"| {count} | {by_images[count]:.1f} | | {number} | {by_teachers[number]:.1f} |"
            )
        result |= {"ms_by_images": by_images, "ms_by_teachers": by_teachers}
    sizes = [(49, 2048), (196, 384), (196, 768), (196, 1024), (784, 768)]
    rows += ["", "| K x C | similarity, us per image | ns per number |", "| --- | ---: | ---: |"]
    result["similarity_seconds"] = {}
    for K, C in sizes:
        seconds = similarity_seconds(K, C) / 16
        result["similarity_seconds"][f"{K} x {C}"] = seconds
        rows.append(f"| {K} x {C} | {seconds * 1e6:.0f} | {seconds / (K * C) * 1e9:.2f} |")
    peaks = {count: peak_bytes(count) for count in (1_000, 1_000_000)}
    growth = (peaks[1_000_000] - peaks[1_000]) / 999_000
    result |= {"peak_bytes": peaks, "bytes_an_image": growth}
    rows += [
        "",
        f"Memory: {growth:.0f} bytes per image from 1,000 to 1,000,000 images with {SIMULATED_TEACHERS} teachers "
        f"(target: at most 300); {peaks[1_000] / 2**20:.0f} and {peaks[1_000_000] / 2**20:.0f} MiB.",
    ]
    device = "cuda" if gpus else "cpu"
    machine.record("scaling", json.loads(json.dumps(result)), "\n".join(rows), device)


if __name__ == "__main__":
    main()
