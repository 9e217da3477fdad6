"""Small images with rectangles and discs, and the COCO JSON that describes them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = {"box": 3, "disc": 17}  # with a gap between the ids
COLORS = {"box": (220, 60, 40), "disc": (40, 90, 220)}


def disc(center: tuple[float, float], radius: float, size: tuple[int, int]) -> np.ndarray:
    """Bool (H, W): the pixels whose centers lie within."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    return np.hypot(columns - center[0], rows - center[1]) < radius


def run_lengths(mask: np.ndarray) -> list[int]:
    """The uncompressed RLE of a mask, column by column."""
    flat = mask.T.reshape(-1)
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends.tolist(), len(flat)]).tolist()
    return [0, *counts] if flat[0] else counts


def annotation(number: int, image_id: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": CATEGORIES[kind],
        "iscrowd": 0,
        **fields,
    }


def make_coco(
    root: Path,
    count: int = 4,
    *,
    size: tuple[int, int] = (48, 64),
    empty: Iterable[int] = (),
    crowd: Iterable[int] = (),
    seed: int = 0,
) -> str:
    """Draw images, each with a box and a disc; returns FOLDER:annotations=FILE.json.

    Args:
        size: height, width. empty: images without objects. crowd: images with a crowd of discs as well.
    """
    draw = np.random.default_rng(seed)
    images = root / "images"
    images.mkdir(parents=True)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for name, i in CATEGORIES.items()],
    }
    height, width = size
    for number in range(count):
        pixels = draw.integers(90, 130, (height, width, 3))
        name = f"{number:03d}.png"
        content["images"].append(
            {"id": 100 + number, "file_name": name, "height": height, "width": width}
        )
        objects = content["annotations"]
        if number not in empty:
            x, y = draw.integers(2, width // 3), draw.integers(2, height // 3)
            w, h = draw.integers(8, width // 3), draw.integers(8, height // 3)
            pixels[y : y + h, x : x + w] = COLORS["box"]
            x, y, w, h = map(int, (x, y, w, h))
            corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            objects.append(
                annotation(
                    len(objects) + 1, 100 + number, "box", bbox=[x, y, w, h], area=w * h,
                    segmentation=corners,
                )
            )  # fmt: skip
            radius = float(draw.uniform(5, height / 5))
            center = (width * 0.75, float(draw.uniform(radius + 1, height - radius - 1)))
            mask = disc(center, radius, size)
            pixels[mask] = COLORS["disc"]
            objects.append(
                annotation(
                    len(objects) + 1, 100 + number, "disc",
                    bbox=[center[0] - radius, center[1] - radius, 2 * radius, 2 * radius],
                    area=int(mask.sum()), segmentation={"size": [height, width], "counts": run_lengths(mask)},
                )
            )  # fmt: skip
        if number in crowd:
            mask = np.zeros(size, dtype=bool)
            mask[-6:, :20] = True
            objects.append(
                annotation(
                    len(objects) + 1, 100 + number, "disc", bbox=[0, height - 6, 20, 6], area=120,
                    segmentation={"size": [height, width], "counts": run_lengths(mask)}, iscrowd=1,
                )
            )  # fmt: skip
        Image.fromarray(pixels.astype(np.uint8)).save(images / name)
    path = root / "objects.json"
    path.write_text(json.dumps(content))
    return f"{images}:annotations={path}"


def change(notation: str, edit: Any) -> str:
    """Apply `edit(content)` to the JSON of a notation, in place."""
    path = Path(notation.partition(":annotations=")[2])
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return notation
