"""Small images of colored squares with masks, and a tiny untrained ViT to segment them."""

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = np.array([[60, 60, 60], [220, 40, 40], [40, 60, 220]])
SEGMENTER = "timm:vit_tiny_patch16_224@random:depth=4:embed_dim=32:num_heads=2:patch_size=8"


def draw_shapes(root: Path, counts: dict[str, int], seed: int = 0, ignored: int = 255) -> Path:
    """FOLDER/images/SPLIT and FOLDER/annotations/SPLIT: squares of the classes 1 and 2 on 0, two sizes of image."""
    generator = np.random.default_rng(seed)
    for split, count in counts.items():
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for number in range(count):
            height, width = (40, 56) if number % 2 else (48, 40)
            mask = np.zeros((height, width), np.uint8)
            for label, side in ((1, 16), (2, 12)):
                top, left = generator.integers(0, (height - side, width - side))
                mask[top : top + side, left : left + side] = label
            pixels = COLORS[mask] + generator.normal(0, 10, (height, width, 3))
            mask[:2] = ignored
            save(root / "images" / split / f"{number}.png", pixels.clip(0, 255))
            save(root / "annotations" / split / f"{number}.png", mask)
    return root


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels).astype(np.uint8)).save(path)
    return path
