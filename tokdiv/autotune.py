"""Stated rules: how many images a forward pass takes, by measurement, and whether the networks are compiled.

Neither changes what is measured, but for the rounding of the forward passes.
"""

import os
import shutil
import time
from collections.abc import Sequence

import torch

from tokdiv.errors import UsageError
from tokdiv.teachers.teacher import Teacher

FIRST = {"cpu": 16, "cuda": 64}  # images of the first trial, and of a run too short for trials
LARGEST = {"cpu": 64, "cuda": 1024}
PAYS = 1.03  # doubling the batch must bring this much more images/s
LONGEST_STEP = 10.0  # seconds; beyond it, interruptions and looks wait too long
TRIAL_SECONDS, TRIAL_SHARE = 2.0, 0.02  # trials may take so long, or so much of the run's time
TRIAL_IMAGES = 256  # a shorter run is over before a trial could pay
# A gap of 0.01 is decided after about so many (benchmarks/results/certify.md): a run that stops when the order
# is known counts on no more.
CERTIFIED_IMAGES = 1_024
# A minute or two of compilation pays from about here: on a CPU it takes 10 to 20 s a network and saves a tenth
# of its time and more.
COMPILE_IMAGES = 50_000


def expected_images(count: int | None, max_images: int | None, certify: str) -> int | None:
    """How many images a run is likely to measure; None where the source does not tell its length."""
    known = [n for n in (count, max_images) if n is not None]
    if certify != "none":
        known.append(CERTIFIED_IMAGES)
    return min(known, default=None)


def compiles(how: str, device: torch.device, images: int | None) -> bool:
    """Whether the networks are compiled.

    Args:
        how: "on", "off", or "auto": with 50,000 images or more for this process, on a GPU, or on a CPU with
            a C++ compiler.
        images: that this process is likely to measure; None where nobody knows, which counts as many on a
            GPU alone.

    Raises:
        UsageError: "on" for a CPU without one.
    """
    check_compiler(how, device)
    able = device.type == "cuda" or (device.type == "cpu" and shutil.which(_compiler()) is not None)
    long = device.type == "cuda" if images is None else images >= COMPILE_IMAGES
    return how == "on" or (how == "auto" and able and long)


def check_compiler(how: str, device: torch.device) -> None:
    """torch.compile needs a C++ compiler on a CPU.

    Raises:
        UsageError: `how` is "on" and there is none.
    """
    if how == "on" and device.type == "cpu" and shutil.which(_compiler()) is None:
        raise UsageError(
            f"--compile on: there is no C++ compiler {_compiler()} here; install one, or leave --compile out"
        )


def _compiler() -> str:
    """As torch looks for it."""
    return os.environ.get("CXX", "g++")


def choose_batch_size(teachers: Sequence[Teacher], images: int | None) -> int:
    """The batch size of `--batch-size auto`.

    From 16 images (64 on a GPU) the size doubles, up to 64 (1,024), while that brings at least 3% more images/s
    and a step of all teachers stays under 10 s. Trials may take 2 s, or 2% of the run where that is more; a run
    of less than 256 images takes the first size unmeasured.

    Args:
        images: how many this process will measure, None for a long run.

    Raises:
        torch.OutOfMemoryError: not even one image fits on the GPU.
    """
    kind = teachers[0].mean.device.type
    size = FIRST.get(kind, FIRST["cpu"])
    if images is not None and images < TRIAL_IMAGES:
        return size
    spent, seconds = 0.0, None  # of a step of `size`
    while seconds is None:
        try:
            seconds = step_seconds(teachers, size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
    budget = TRIAL_SECONDS
    if images is not None:
        budget = max(budget, TRIAL_SHARE * images / size * seconds)
    while size * 2 <= LARGEST.get(kind, LARGEST["cpu"]) and 2 * seconds < LONGEST_STEP:
        # Again, now that caches and kernels are warm, and twice that for the larger size.
        if images is not None and spent + 5 * seconds > budget:
            break
        try:
            seconds = min(seconds, step_seconds(teachers, size))
            step_seconds(teachers, 2 * size)
            doubled = step_seconds(teachers, 2 * size)
        except torch.OutOfMemoryError:
            break
        spent += seconds + 2 * doubled
        if 2 * seconds < PAYS * doubled:
            break
        size, seconds = 2 * size, doubled
    return size


def step_seconds(teachers: Sequence[Teacher], rows: int) -> float:
    """Seconds of one forward pass of each teacher on a batch of `rows` images.

    Raises:
        torch.OutOfMemoryError: the batch does not fit on the GPU.
    """
    device = teachers[0].mean.device
    begin = time.perf_counter()
    for teacher in teachers:
        views = torch.zeros(rows, 3, teacher.size, teacher.size, dtype=torch.uint8, device=device)
        with torch.inference_mode():
            teacher(views)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
