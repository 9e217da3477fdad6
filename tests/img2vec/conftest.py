"""Small images, and one thread for all tests here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """24 small pictures in two classes: stripes and discs on colored ground."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[:72, :80]
    for number in range(24):
        kind = ("disc", "stripes")[number % 2]
        if kind == "disc":
            center = draw.uniform(20, 50, 2)
            shape = np.hypot(rows - center[0], columns - center[1]) < draw.uniform(10, 25)
        else:
            shape = (rows * draw.uniform(0.2, 1) + columns) % 12 < 6
        ground, ink = draw.integers(0, 256, (2, 3))
        pixels = np.where(shape[..., None], ink, ground) + draw.integers(-9, 9, (72, 80, 3))
        (folder / kind).mkdir(exist_ok=True)
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(folder / kind / f"{number:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def _all_messages(caplog):
    caplog.set_level("INFO")
