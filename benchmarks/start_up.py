"""Time until the command line answers, and until the first scored image of a cached ResNet-50.

    python benchmarks/start_up.py

The bare script imports torch and timm, makes the network, loads the same file and runs one image once. Ways
take turns; figures are medians. Targets: `--help` under 1 s, `teachers` under 1.5 s, 1.3 times the bare script.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
FIRST_SCORE = """
import os, sys
import tokdiv.cli
import tokdiv.judge
def first(judge, shares, plan):
    print(shares[0].scores)
    sys.stdout.flush()
    os._exit(0)
tokdiv.judge.Judge.take = first
tokdiv.cli.main()
"""
BARE = """
import sys
import numpy as np, timm, torch
from PIL import Image
from safetensors.torch import load_file
model = timm.create_model("resnet50", num_classes=0)
model.load_state_dict(load_file(sys.argv[1]))
model.eval()
pixels = np.asarray(Image.open(sys.argv[2]).resize((224, 224)), np.float32) / 255
with torch.inference_mode():
    print(model.forward_features(torch.from_numpy(pixels).permute(2, 0, 1)[None]).mean())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights, images = folder / "resnet50.safetensors", folder / "images"
        state = timm.create_model("resnet50", num_classes=0).state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, weights)
        images.mkdir()
        Image.effect_noise((256, 256), 60).convert("RGB").save(images / "noise.png")
        spec = f"timm:resnet50@{weights}"
        rank = ["rank", images, "-t", spec, "--device", "cpu", "--dtype", "float32"]
        tokdiv = [sys.executable, "-m", "tokdiv"]
        commands = {
            "`tokdiv --help`": [*tokdiv, "--help"],
            "`tokdiv teachers`": [*tokdiv, "teachers"],
            "bare script": [sys.executable, "-c", BARE, weights, images / "noise.png"],
            "`tokdiv rank` up to the first score": [
                sys.executable,
                "-c",
                FIRST_SCORE,
                *rank,
                "-o",
                "RUN",
            ],
        }
        seconds: dict[str, list[float]] = {key: [] for key in commands}
        for repeat in range(arguments.repeats + 1):  # the first fills the disk's cache
            for key, command in commands.items():
                filled = [
                    folder / f"{c}-{repeat}" if str(c).startswith("RUN") else c for c in command
                ]
                begin = time.perf_counter()
                subprocess.run(list(map(str, filled)), cwd=ROOT, check=True, capture_output=True)
                seconds[key].append(time.perf_counter() - begin)
        medians = {key: machine.median(values[1:]) for key, values in seconds.items()}
    ranked, bare = seconds["`tokdiv rank` up to the first score"], seconds["bare script"]
    ratio = machine.median([a / b for a, b in zip(ranked[1:], bare[1:])])
    targets = {"`tokdiv --help`": "under 1 s", "`tokdiv teachers`": "under 1.5 s"}
    rows = ["| command | seconds (median) | target |", "| --- | ---: | ---: |"]
    for key, value in medians.items():
        rows.append(f"| {key} | {value:.2f} | {targets.get(key, '')} |")
    rows.append(f"| first score over the bare script | {ratio:.2f} times | 1.3 times |")
    rows += [
        "",
        f"{arguments.repeats} interleaved repeats.",
    ]
    result = {"seconds": seconds, "ratio": ratio, "threads": torch.get_num_threads()}
    machine.record("start_up", result, "\n".join(rows))


if __name__ == "__main__":
    main()
