"""Small pictures of six classes that differ in color, some damaged, and a tiny untrained ViT."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

CLASSES = ("apple", "bird", "cat", "dog", "egg", "fish")
COLORS = np.array(
    [[220, 40, 40], [40, 200, 60], [50, 60, 220], [210, 200, 40], [200, 50, 200], [60, 200, 200]]
)
TINY = "timm:vit_tiny_patch16_224@random:depth=2:embed_dim=32:num_heads=2:size=32"


def draw(folder: Path, counts: dict[str, int], seed: int, noise: float = 40.0) -> Path:
    generator = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            stripes = 40 * np.sign(np.sin(np.arange(40) / (2 + number % 3)))[:, None, None]
            pixels = COLORS[CLASSES.index(name)] + stripes + generator.normal(0, noise, (40, 44, 3))
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(train, val): 49 and 23 usable pictures, one damaged in each."""
    root = tmp_path_factory.mktemp("pictures")
    train = draw(root / "train", dict(zip(CLASSES, (8, 8, 8, 8, 8, 9))), seed=1)
    val = draw(root / "val", dict(zip(CLASSES, (4, 4, 4, 4, 4, 3))), seed=2)
    for folder in (train, val):
        (folder / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return str(train), str(val)


@pytest.fixture(scope="session")
def tiny() -> str:
    return TINY


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Networks this small only wait for their own threads, the more so where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
