"""Stand-ins for the commands of the documentation: small images, narrow networks, random weights.

As a script, it runs one command with them, as torchrun starts it:

    torchrun --nproc-per-node 2 tests/stand_ins.py tokdiv rank photos -t paper -o runs/paper
"""

import dataclasses
import importlib
import itertools
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

import tokdiv.teachers.load
from img2vec.config import PRESETS
from tokdiv.teachers.cache import cached_path, in_hub_cache

IMAGES = 12
FOLDERS = (  # names of a user's images in the documentation
    "photos",
    "tiles",
    *(
        f"{data}/{part}"
        for data in ("DATA", "imagenet", "path/to/imagenet")
        for part in ("train", "val")
    ),
)
SEGMENTATIONS = {"camvid": ("train", "val"), "ADEChallengeData2016": ("training", "validation")}
REMOTE = ("http://", "https://", "hf-hub:")

Patch = Callable[[Any, str, Any], None]  # as monkeypatch.setattr


def apply(patch: Patch = setattr) -> None:
    """Make timm's networks narrow, their weights random, and figures coarse."""
    patch(timm, "create_model", _narrow(timm.create_model))
    patch(tokdiv.teachers.load, "_from_timm", _with_weights(tokdiv.teachers.load._from_timm))
    patch(Figure, "savefig", _coarse(Figure.savefig))


def short_presets() -> dict[str, Any]:
    """The presets, each with one step and a narrow decoder."""
    short: dict[str, Any] = {"max_steps": 1, "decoder_dim": 64, "decoder_depth": 1, "workers": 1}
    return {name: dataclasses.replace(preset, **short) for name, preset in PRESETS.items()}


def _narrow(create_model: Callable[..., Any]) -> Callable[..., Any]:
    """timm's create_model, with large networks made narrow."""

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
    """Figures at a tenth of their resolution: other tests look at them."""

    def save(self: Figure, *arguments: Any, **options: Any) -> Any:
        return savefig(self, *arguments, **(options | {"dpi": 20}))

    return save


def _with_weights(from_timm: Callable[..., Any]) -> Callable[..., Any]:
    """The loader of timm's networks, with random weights in the cache in place of downloads."""

    def load(spec: Any, size: int) -> Any:
        source = spec.weights or ""
        if source.startswith(REMOTE):
            assert in_hub_cache(source) is None, "the test would use weights of this machine"
            if not cached_path(source).is_file():
                save_weights(spec.architecture, cached_path(source), **spec.arguments)
        return from_timm(spec, size)

    return load


def save_weights(architecture: str, path: Path, **arguments: Any) -> None:
    """Random weights of a (narrow) network as a checkpoint, in the format of its suffix."""
    state = timm.create_model(
        architecture, pretrained=False, num_classes=0, **arguments
    ).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)


def make_images(root: Path) -> None:
    """The images that the documentation reads: class folders, files, archives."""
    draw = np.random.default_rng(0)
    for folder in FOLDERS:
        for number in range(IMAGES):
            path = root / folder / ("bird", "cat")[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize((48, 40), Image.Resampling.BICUBIC).save(path)
    for folder, splits in SEGMENTATIONS.items():
        for split, number in itertools.product(splits, range(3)):
            pixels = draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            mask = np.repeat(np.array([0, 1, 2, 11], np.uint8), 12)[None].repeat(40, axis=0)
            for part, values in (("images", pixels), ("annotations", mask)):
                path = root / folder / part / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
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
        made, to = root / "made-coco" / split, root / "path" / "to" / "coco"
        make_coco(made, 4, seed=seed)
        (to / "annotations").mkdir(parents=True, exist_ok=True)
        (made / "images").rename(to / split)
        (made / "objects.json").rename(to / "annotations" / f"instances_{split}.json")


if __name__ == "__main__":
    apply()
    PRESETS.update(short_presets())
    sys.argv = sys.argv[1:]  # the program's name comes first, as in a shell
    importlib.import_module(f"{sys.argv[0]}.cli").main()
