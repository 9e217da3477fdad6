"""Images that carry a number, and teachers that give each number a known similarity.

An image is one color, the four base-16 digits of its number less the highest; a teacher reads the number
back and looks up two tokens with the wanted cosine, so S(x) is known for every image and every teacher, and
does not depend on the batch it comes in.
"""

import io
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tokdiv import Teacher
from tokdiv.data.loader import permutation
from tokdiv.data.open import open_source

SIZE = 32  # pixels of the views
ROOT = Path(__file__).parents[2]


def coded_image(number: int) -> bytes:
    """A PNG in one color, which survives any resize."""
    color = tuple(16 * (number // 16**place % 16) + 8 for place in (2, 1, 0))
    file = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(file, "PNG")
    return file.getvalue()


def coded_tar(path: Path, count: int, broken: Sequence[int] = ()) -> Path:
    """A .tar of coded images 0 to count - 1 (at most 4096); the broken ones are cut short."""
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            data = coded_image(number)
            data = data[: len(data) // 2] if number in broken else data
            member = tarfile.TarInfo(f"{number:04d}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def numbers_in_order(data: Path, seed: int = 0) -> np.ndarray:
    """The number of the image at each position of a run over a coded .tar."""
    source = open_source(str(data))
    assert source.count is not None
    order = permutation(source.count, seed)
    return np.array([int(Path(source.key(int(i))).stem[-4:]) for i in order])


class Lookup(nn.Module):
    """The tokens of a coded image: two in the plane, with the wanted cosine.

    Args:
        similarity: of each number, in [-1, 1].
        log: a file to which the numbers looked up are appended, a line each pass.
        kill_after: SIGKILL the own process after so many images; `stop_with` another signal once.
            With several processes, the one of the rank `of_process`.
        spoiled: numbers that get NaN tokens.
    """

    def __init__(
        self,
        similarity: np.ndarray,
        log: Path | None = None,
        kill_after: int | None = None,
        stop_with: int = signal.SIGKILL,
        spoiled: Sequence[int] = (),
        of_process: int = 0,
    ) -> None:
        super().__init__()
        cosine = torch.from_numpy(np.asarray(similarity, np.float64))
        first = torch.stack([torch.ones_like(cosine), torch.zeros_like(cosine)], dim=1)
        second = torch.stack([cosine, (1 - cosine.square()).sqrt()], dim=1)
        table = torch.stack([first, second], dim=1).float()
        table[list(spoiled)] = torch.nan
        self.register_buffer("table", table)  # (N, 2, 2)
        self.log, self.stop_with = log, stop_with
        self.kill_after = kill_after if int(os.environ.get("RANK", 0)) == of_process else None
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 2, 2)."""
        digits = ((images[:, :, 0, 0] * 255 - 8) / 16).round().long()
        numbers = (digits * torch.tensor([256, 16, 1])).sum(dim=1)
        if images.max() > 0:  # not the black image that a new Teacher is tried with
            self.seen.extend(numbers.tolist())
            if self.log is not None:
                with self.log.open("a") as file:
                    file.write(" ".join(map(str, numbers.tolist())) + "\n")
            if self.kill_after is not None and len(self.seen) >= self.kill_after:
                self.kill_after = None
                os.kill(os.getpid(), self.stop_with)
        return self.table[numbers]


def coded_teacher(name: str, similarity: np.ndarray, **options: object) -> Teacher:
    """A Teacher with these similarities."""
    module = Lookup(similarity, **options)  # type: ignore[arg-type]
    return Teacher(module, mean=(0, 0, 0), std=(1, 1, 1), size=SIZE, name=name, grid=(1, 2))


def similarities(count: int, *means: float, sd: float = 0.05, seed: int = 0) -> list[np.ndarray]:
    """Of each teacher, independent and normal, with exactly these means over all images."""
    generator = np.random.default_rng(seed)
    columns = []
    for mean in means:
        noise = generator.normal(0, sd, count)
        columns.append(np.clip(noise - noise.mean() + mean, -0.99, 0.99).astype(np.float32))
    return columns


def teacher_file(path: Path, similarity: np.ndarray, name: str = "own", **options: object) -> str:
    """A file for --teacher-module that makes a coded teacher; returns FILE.py:FUNCTION."""
    np.save(path.with_suffix(".npy"), similarity)
    given = ", ".join(f"{key}={value!r}" for key, value in options.items())
    path.write_text(
        f"import sys\n"
        f"from pathlib import Path, PosixPath, WindowsPath\n"
        f"import numpy as np\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from fakes import coded_teacher\n"
        f"def make():\n"
        f"    similarity = np.load({str(path.with_suffix('.npy'))!r})\n"
        f"    return coded_teacher({name!r}, similarity, {given})\n"
    )
    return f"{path}:make"


def command(*arguments: object, processes: int = 1) -> list[str]:
    """`python -m tokdiv ...`, through torchrun where there are to be several processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    start = launcher if processes > 1 else []
    if arguments[:1] == ("rank",):  # a crop of a coded image does not hold its number any more
        arguments = (*arguments, "--correspondence-images", 0)
    return [sys.executable, *start, "-m", "tokdiv", *map(str, arguments)]


def run_tokdiv(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the command line from the repository's root, on one thread a process."""
    return subprocess.run(
        command(*arguments, processes=processes),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


def environment() -> dict[str, str]:
    """That of a subprocess."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
