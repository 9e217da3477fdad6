"""The machine and versions of a benchmark, and the files that its results are written to."""

import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs without installing
RESULTS = Path(__file__).parent / "results"
PARTS = {  # what `make bench` measures, in the order of the page
    "ranking": "Ranking throughput",
    "decoding": "Decoding",
    "certified_order": "Time to a certified order",
    "scaling": "Scaling",
    "pretraining": "Pretraining throughput",
    "start_up": "Start-up",
}


def describe(device: str = "cpu") -> dict[str, Any]:
    """Machine and versions."""
    name = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), name
        )
    return {
        "device": name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def median(values: Sequence[float]) -> float:
    """The median of paired repeats."""
    return statistics.median(values)


def write(name: str, title: str, result: dict[str, Any], table: str) -> None:
    """Write NAME.json and NAME.md under results/, and print the table."""
    RESULTS.mkdir(exist_ok=True)
    text = f"# {title}\n\n{table}\n\nMeasured on: {_line(result['machine'])}.\n"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def record(part: str, result: dict[str, Any], table: str, device: str = "cpu") -> None:
    """Enter one benchmark into MACHINE.json and MACHINE.md under results/, and print its table.

    Results of other benchmarks stay; those that were not run on this machine are listed as not measured.
    """
    described = describe(device)
    name = re.sub(r"[^a-z0-9]+", "-", described["device"].lower()).strip("-")
    name += "" if device.startswith("cuda") else f"-{described['cores']}-cores"
    file = RESULTS / f"{name}.json"
    parts = json.loads(file.read_text())["parts"] if file.exists() else {}
    parts[part] = {"machine": described, "result": result, "table": table}
    ordered = {key: parts[key] for key in PARTS if key in parts}
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps({"device": described["device"], "parts": ordered}, indent=1) + "\n")
    text = [f"# Benchmarks on {described['device']}, {described['cores']} CPU cores", ""]
    for key, title in PARTS.items():
        text += [f"## {title}", ""]
        if key in parts:
            text += [parts[key]["table"], "", f"({_line(parts[key]['machine'])})", ""]
        else:
            text += ["Not measured.", ""]
    file.with_suffix(".md").write_text("\n".join(text))
    print(f"## {PARTS[part]}\n\n{table}\n", flush=True)


def _line(described: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in described.items())
