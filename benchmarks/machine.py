"""What a benchmark's figures hold for, and how they are written down."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs uninstalled too
RESULTS = Path(__file__).parent / "results"


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
    """The middle of paired repeats."""
    return statistics.median(values)


def write(name: str, title: str, result: dict[str, Any], table: str) -> None:
    """Write NAME.json and NAME.md under results/, and print the table."""
    RESULTS.mkdir(exist_ok=True)
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    text = f"# {title}\n\n{table}\n\nMeasured on: {machine}.\n"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
