"""What the commands of the documentation meet in a test: small images, narrow networks, weights made on the spot.

As a script it runs one command with them in a process of its own, as torchrun starts it:

    torchrun --nproc-per-node 2 tests/stand_ins.py tokdiv rank photos -t paper -o runs/paper
"""

import dataclasses
import importlib
import json
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

import tokdiv.teachers.teacher
from img2vec.config import PRESETS
from tokdiv.teachers.cache import cached_path, in_hub_cache

IMAGES = 12
FOLDERS = (  # the names by which the documentation calls a user's images
    "photos",
    "tiles",
    *(
        f"{data}/{part}"
        for data in ("DATA", "imagenet", "path/to/imagenet")
        for part in ("train", "val")
    ),
)
REMOTE = ("http://", "https://", "hf-hub:")

Patch = Callable[[Any, str, Any], None]  # as monkeypatch.setattr


def apply(patch: Patch = setattr) -> None:
    """Make timm's networks narrow, their weights random, and figures coarse."""
    patch(timm, "create_model", _narrow(timm.create_model))
    patch(tokdiv.teachers.teacher, "_from_timm", _with_weights(tokdiv.teachers.teacher._from_timm))
    patch(Figure, "savefig", _coarse(Figure.savefig))


def short_presets() -> dict[str, Any]:
    """The presets, each ended after a step and with a narrow decoder."""
    short: dict[str, Any] = {"max_steps": 1, "decoder_dim": 64, "decoder_depth": 1, "workers": 1}
    return {name: dataclasses.replace(preset, **short) for name, preset in PRESETS.items()}


def _narrow(create_model: Callable[..., Any]) -> Callable[..., Any]:
    """timm's create_model, with the width of large networks cut down; small ones stay as they are."""

    def create(name: str, *arguments: Any, **options: Any) -> Any:
        architecture = name
        if name.startswith("local-dir:"):
            folder = Path(name.partition(":")[2])
            architecture = json.loads((folder / "config.json").read_text())["architecture"]
        narrow: dict[str, Any] = {}
        if re.match(r"(vit|deit)_(small|base|large|huge)", architecture):
            narrow = {"embed_dim": 32, "depth": 9, "num_heads": 2}
        elif architecture.partition(".")[0] in ("resnet50", "resnet101"):
            narrow = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64)}
        if "depth" in options:
            narrow.pop("depth", None)
        return create_model(name, *arguments, **(narrow | options))

    return create


def _coarse(savefig: Callable[..., Any]) -> Callable[..., Any]:
    """Figures at a tenth of their resolution: how they look is for other tests."""

    def save(self: Figure, *arguments: Any, **options: Any) -> Any:
        return savefig(self, *arguments, **(options | {"dpi": 20}))

    return save


def _with_weights(from_timm: Callable[..., Any]) -> Callable[..., Any]:
    """The loader of timm's networks, where weights that would be fetched lie in the cache already."""

    def load(spec: Any, size: int) -> Any:
        source = spec.weights or ""
        if source.startswith(REMOTE):
            assert in_hub_cache(source) is None, "the test would use weights of this machine"
            if not cached_path(source).is_file():
                save_weights(spec.architecture, cached_path(source), **spec.arguments)
        return from_timm(spec, size)

    return load


def save_weights(architecture: str, path: Path, **arguments: Any) -> None:
    """Random weights of a (narrow) network as a checkpoint, in the format that its name says."""
    state = timm.create_model(
        architecture, pretrained=False, num_classes=0, **arguments
    ).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)


def make_images(root: Path) -> None:
    """Everything that the documentation reads images from: folders with classes, files, archives."""
    draw = np.random.default_rng(0)
    for folder in FOLDERS:
        for number in range(IMAGES):
            path = root / folder / ("bird", "cat")[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize((48, 40), Image.Resampling.BICUBIC).save(path)
    photos = sorted((root / "photos").rglob("*.png"))
    for number in (1, 2):
        Image.open(photos[number]).save(root / f"photo{number}.jpg")
    (root / "shards").mkdir()
    archives = {root / "photos.tar": photos}
    archives |= {root / f"shards/train-{n:04d}.tar": photos[n::4] for n in range(4)}
    for archive, members in archives.items():
        with tarfile.open(archive, "w") as tar:
            for member in members:
                tar.add(member, arcname=member.name)


def make_coco_folder(root: Path) -> None:
    """path/to/coco as COCO is unpacked: a folder of images and a JSON per split."""
    from coco_shapes import make_coco  # of tests/img2vec, which is not on the path of the script

    for seed, split in enumerate(("train2017", "val2017")):
        made, to = root / "made" / split, root / "path" / "to" / "coco"
        make_coco(made, 4, seed=seed)
        (to / "annotations").mkdir(parents=True, exist_ok=True)
        (made / "images").rename(to / split)
        (made / "objects.json").rename(to / "annotations" / f"instances_{split}.json")


if __name__ == "__main__":
    apply()
    PRESETS.update(short_presets())
    sys.argv = sys.argv[1:]  # the program's name comes first, as in a shell
    importlib.import_module(f"{sys.argv[0]}.cli").main()
