"""How many images a forward pass takes, and which teachers are compiled: measured on this machine, by stated rules.

Both cost time themselves, so both look at how long the run is. Neither changes what is measured, but for the
rounding of the forward passes.
"""

import sys
import time
from collections.abc import Sequence

import torch

from tokdiv.errors import RunError
from tokdiv.teacher import Teacher

FIRST = {
    "cpu": 16,
    "cuda": 64,
}  # images of the first trial, and of a run too short for a second one
LARGEST = {"cpu": 64, "cuda": 1024}
PAYS = 1.03  # doubling the batch must bring this much more images/s
SHARE = 0.02  # of the run's estimated time may go into trials
LONGEST_STEP = 10.0  # seconds; beyond it, interruptions and looks wait too long
# A gap of 0.01 is decided after about so many (benchmarks/results/certify.md): a run that stops when the order
# is known counts on no more.
CERTIFIED_IMAGES = 1_024
COMPILE_IMAGES = 1_600  # of a shorter run, the passes that would tell take more than 2%
# What torch.compile takes, and how many times as fast the result is at the least: measured for
# ViT-B and ResNet-50 on a CPU (benchmarks/results), timm's tables for a GPU.
COMPILE_SECONDS = {"cpu": 60.0, "cuda": 60.0}
COMPILE_GAIN = {
    ("cpu", "ViT"): 1.2,
    ("cpu", "ConvNet"): 1.5,
    ("cuda", "ViT"): 1.1,
    ("cuda", "ConvNet"): 1.6,
}


def expected_images(count: int | None, max_images: int | None, certify: str) -> int | None:
    """How many images a run is likely to measure; None where the source does not tell its length."""
    known = [n for n in (count, max_images) if n is not None]
    if certify != "none":
        known.append(CERTIFIED_IMAGES)
    return min(known, default=None)


def seconds_per_image(teachers: Sequence[Teacher], rows: int) -> dict[str, float]:
    """Seconds of each teacher's forward pass on a batch of `rows`, by image: the faster of two passes.

    Raises:
        torch.OutOfMemoryError: the batch does not fit on the GPU.
    """
    seconds = {}
    for teacher in teachers:
        device = teacher.mean.device
        views = torch.zeros(rows, 3, teacher.size, teacher.size, dtype=torch.uint8, device=device)
        passes = []
        for _ in range(2):
            begin = time.perf_counter()
            with torch.inference_mode():
                teacher(views)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            passes.append(time.perf_counter() - begin)
        seconds[teacher.name] = min(passes) / rows
    return seconds


def choose_batch_size(
    teachers: Sequence[Teacher], images: int | None
) -> tuple[int, dict[str, float]]:
    """The batch size of `--batch-size auto`, and each teacher's seconds per image with it.

    From 16 images (64 on a GPU) the size doubles while that brings at least 3% more images/s, a step of all
    teachers stays under 10 s, memory suffices, and the trials fit into 2% of the run's time. A run too short
    for two trials takes the first size unmeasured, and no seconds are returned.

    Args:
        images: how many this process will measure, None for a long run.
    """
    kind = teachers[0].mean.device.type
    size = FIRST.get(kind, 16)
    if images is not None and 2 * size + 4 * size > SHARE * images:
        return size, {}
    while True:
        try:
            seconds = seconds_per_image(teachers, size)
            break
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
    spent = 2 * size * sum(seconds.values())
    while size * 2 <= LARGEST.get(kind, 64):
        now = sum(seconds.values())
        trial = 4 * size * now  # two passes of twice the size
        if 2 * size * now > LONGEST_STEP:
            break
        if images is not None and spent + trial > SHARE * images * now:
            break
        try:
            larger = seconds_per_image(teachers, 2 * size)
        except torch.OutOfMemoryError:
            break
        spent += trial
        if sum(larger.values()) * PAYS > now:
            break
        size, seconds = 2 * size, larger
    return size, seconds


def pays_to_compile(teacher: Teacher, seconds: float, images: int | None) -> bool:
    """Whether compiling saves more of this run than it takes: the rule of `--compile auto`.

    Args:
        seconds: of its forward pass, by image, as it is. images: how many this process will measure.
    """
    kind = teacher.mean.device.type
    network = "ConvNet" if teacher.channels_last else "ViT"
    gain = COMPILE_GAIN.get((kind, network))
    if gain is None or teacher.spec.parameters == 0:  # pixels and hog are no networks
        return False
    if images is None:
        return True
    return images * seconds * (1 - 1 / gain) > COMPILE_SECONDS[kind]


def compile_teacher(teacher: Teacher, rows: int, must: bool) -> None:
    """Compile for batches of `rows`, and run one, so that a failure shows here.

    Raises:
        RunError: it cannot be compiled and `must` be; else it stays as it is, with a warning.
    """
    try:
        teacher.compile_for(rows)
    except Exception as error:  # inductor raises whatever its compiler, its cache or triton does
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"{teacher.name} cannot be compiled here ({reason})"
        if must:
            raise RunError(f"{message}: use --compile off") from None
        print(f"warning: {message}: it runs as it is", file=sys.stderr)
