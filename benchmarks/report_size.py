"""Time and size of the report of a large ranking.

    python benchmarks/report_size.py [--num-images 1280000] [--num-teachers 10]

A RUN of simulated scores, without images: `tokdiv report RUN` is timed without the similarity maps, which show
three images whatever the size of the ranking. CPU seconds are given as well, as other work on the machine does not
count in them.
"""

import argparse
import tempfile
import time
from pathlib import Path

import machine
import numpy as np

from tokdiv.certify import OrderCertifier
from tokdiv.config import Settings
from tokdiv.data.source import Source
from tokdiv.hand_over import REPORT_FILES, write_ranking
from tokdiv.ranking import make_ranking
from tokdiv.report.build import write_report
from tokdiv.scores import CHUNK, MEASURES, ScoreTable
from tokdiv.teachers.spec import TeacherSpec

LIMITS = {"seconds": 30, "megabytes": 5}  # targets, at 1.28 million scores by 10 teachers


def make_run(folder: Path, num_images: int, num_teachers: int) -> None:
    """Write RUN as `tokdiv rank --certify none` does, from normal scores of means 0.3 to 0.39."""
    names = [f"teacher_{n}" for n in range(num_teachers)]
    specs = [
        TeacherSpec(name, "vit_base_patch16_224", f"{name}.pth", num_tokens=196, dim=768)
        for name in names
    ]
    generator = np.random.default_rng(0)
    shared = generator.normal(0, 0.06, num_images).astype(np.float32)[:, None]
    means = np.linspace(0.3, 0.39, num_teachers, dtype=np.float32)
    own = generator.normal(0, 0.05, (num_images, num_teachers)).astype(np.float32)
    scores = np.clip(means + shared + own, 0, 1)
    table = ScoreTable(names, lambda position: f"n01440764/n01440764_{position}.JPEG")
    for start in range(0, num_images, CHUNK):
        positions = np.arange(start, min(start + CHUNK, num_images))
        block = np.repeat(scores[positions][:, :, None], len(MEASURES), axis=2)
        nothing: list[str | None] = [None] * len(positions)
        table.record(positions, [""] * len(positions), nothing, list(range(num_teachers)), block)
    for name in names:
        table.progress.measured[name] = num_images
    certifier = OrderCertifier(num_teachers, num_images, lower=-1 / 195, upper=1.0)
    certifier.update(table.rows(0, num_images))
    ranking = make_ranking(
        table,
        certifier.certificate(),
        specs,
        Source("images that are not here", num_images, "0" * 64),
        Settings(certify="none", dtype="float32"),
        dict.fromkeys(names, "float32"),
        {},
    )
    table.write_results(folder, names)
    write_ranking(ranking, folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=1_280_000)
    parser.add_argument("--num-teachers", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run(folder, arguments.num_images, arguments.num_teachers)
        begun, used = time.perf_counter(), time.process_time()
        write_report(folder)
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - used
        megabytes = {file: (folder / file).stat().st_size / 1e6 for file in REPORT_FILES}
    result = {
        "machine": machine.describe(),
        "num_images": arguments.num_images,
        "num_teachers": arguments.num_teachers,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "megabytes": megabytes,
        "limits": LIMITS,
    }
    rows = [
        "| images | teachers | seconds | CPU seconds | report.html |",
        "| ---: | ---: | ---: | ---: | ---: |",
        f"| {arguments.num_images:,} | {arguments.num_teachers} | {seconds:.1f} | {cpu_seconds:.1f} | "
        f"{megabytes[REPORT_FILES[0]]:.2f} MB |",
        "",
        f"Targets: at most {LIMITS['seconds']} s and {LIMITS['megabytes']} MB at 1,280,000 images and 10 "
        f"teachers. Where the two times differ much, the machine was busy with other work.",
    ]
    machine.write("report_size", "Time and size of a large report", result, "\n".join(rows))


if __name__ == "__main__":
    main()
