"""Run the benchmarks of `make bench` one after the other; their results go to results/MACHINE.md.

    python benchmarks/bench.py

Each script also runs alone, on a GPU as well where it has --device. Scripts that take hours, or whose results do
not depend on the machine, are left out: certify, precision, report_size, correspondence, pretrain_learns, figure1.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

GPU = ["--device", "cuda"] if torch.cuda.is_available() else []
SCRIPTS = {
    "start_up": [],
    "decoding": [],
    "rank_throughput": [],  # finds the GPU itself
    "certified_order": [],
    "scaling": [],
    "pretrain_throughput": [
        *GPU,
        *(["--student", "vit_base", "--batch-size", "256"] if GPU else []),
    ],
}


def main() -> None:
    folder = Path(__file__).parent
    failed = []
    for name, options in SCRIPTS.items():
        begin = time.perf_counter()
        code = subprocess.run([sys.executable, folder / f"{name}.py", *options]).returncode
        print(f"{name}: {time.perf_counter() - begin:.0f} s\n", flush=True)
        if code:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
