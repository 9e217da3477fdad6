"""Does correspondence tell trained networks from noise? All networks at hand, and what can go wrong with them.

    TOKDIV_DATA=DATA python benchmarks/correspondence.py

Trained networks, their untrained and shuffled twins, tokens that know only their position, and trainings that
failed in ways that users meet; on photographs, street scenes and textures; with other crops, tolerances and blocks.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import machine
import numpy as np
import torch
from precision import real_teachers
from torch import Tensor, nn

import tokdiv
from tokdiv.certify import confidence_sequence
from tokdiv.correspondence import (
    AREA,
    CropPair,
    correspondence,
    crop_views,
    draw_crops,
    pixel_cells,
)
from tokdiv.data.decode import decode_image

SIZE = 224
MARGIN = 0.02  # above raw pixels, as in `tokdiv rank`
CONFIDENCE = 0.99
BATCH = 32  # images, two views each


@dataclass(frozen=True)
class Pairs:
    """N images as pairs of views. views: (N, 2, 3, SIZE, SIZE) uint8. boxes: (N, 2, 4) of the crops."""

    views: Tensor
    boxes: Tensor


def make_pairs(
    images: Iterable[Tensor], area: tuple[float, float] = AREA, mirrored: bool = True
) -> Pairs:
    views, boxes = [], []
    for position, image in enumerate(images):
        crops: CropPair = draw_crops(image.shape[1], image.shape[2], 0, position, area)
        first, second = crop_views(image, crops, SIZE)
        views.append(torch.stack([first, second if mirrored else second.flip(2)]))
        boxes.append(torch.tensor([crops.first, crops.second]))
    return Pairs(torch.stack(views), torch.stack(boxes))


def photographs(folder: Path, count: int) -> list[Tensor]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".png"))
    chosen = np.random.default_rng(0).permutation(len(files))[:count]
    return [decode_image(files[n].read_bytes()) for n in sorted(chosen)]


def textures(count: int) -> list[Tensor]:
    """Stationary noise with the spectrum of natural images (1/f), in color: no objects, no places."""
    draw = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256)))
    frequency[0, 0] = 1
    made = []
    for _ in range(count):
        noise = np.fft.fft2(draw.normal(size=(3, 256, 256))) / frequency
        plane = np.fft.ifft2(noise).real
        plane = (plane - plane.mean()) / plane.std() * 48 + 128
        made.append(torch.from_numpy(plane.clip(0, 255).astype(np.uint8)))
    return made


def measured(
    tokens: Callable[[Tensor], Tensor],
    grid: tuple[int, int],
    pairs: Pairs,
    mirrored: bool = True,
    tolerance: float = 0.1,
) -> np.ndarray:
    """(N,) the correspondence of each image."""
    scores = []
    for start in range(0, len(pairs.views), BATCH):
        part = slice(start, start + BATCH)
        found = [tokens(pairs.views[part, side]) for side in (0, 1)]
        boxes = pairs.boxes[part]
        scores.append(
            correspondence(
                *found, boxes[:, 0], boxes[:, 1], grid, mirrored=mirrored, tolerance=tolerance
            )
        )
    return torch.cat(scores).numpy()


def pixels_on(grid: tuple[int, int], pairs: Pairs, mirrored: bool = True) -> np.ndarray:
    """(N,) the correspondence of raw pixels on a grid."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255
    return measured(lambda views: pixel_cells((views - mean) / std, grid), grid, pairs, mirrored)


def verdict(scores: np.ndarray, pixels: np.ndarray, alpha: float) -> tuple[str, float, float]:
    """noise-like, not, or open; and the interval of the mean difference to pixels."""
    bounds = confidence_sequence(
        scores.astype(np.float64) - pixels, None, alpha, -1.0, 1.0, times=np.array([len(scores)])
    )
    low, high = float(bounds.low[-1]), float(bounds.high[-1])
    said = "not noise-like" if low > MARGIN else "noise-like" if high < MARGIN else "open"
    return said, low, high


# The networks ------------------------------------------------------------------------------------


@torch.no_grad()
def shuffled(teacher: tokdiv.Teacher) -> tokdiv.Teacher:
    """Every weight tensor with its entries in random order: the same statistics, nothing learned."""
    generator = torch.Generator().manual_seed(0)
    for tensor in teacher.module.state_dict().values():
        if tensor.is_floating_point() and tensor.numel() > 1:
            order = torch.randperm(tensor.numel(), generator=generator)
            tensor.copy_(tensor.flatten()[order].view_as(tensor))
    return teacher


@torch.no_grad()
def noisy(teacher: tokdiv.Teacher, strength: float) -> tokdiv.Teacher:
    """Noise of `strength` times each tensor's standard deviation added to its weights."""
    generator = torch.Generator().manual_seed(0)
    for tensor in teacher.module.state_dict().values():
        if tensor.is_floating_point() and tensor.numel() > 1:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(noise * tensor.std() * strength)
    return teacher


@torch.no_grad()
def without_statistics(teacher: tokdiv.Teacher) -> tokdiv.Teacher:
    """BatchNorm's running mean and variance as if they had never been saved."""
    for module in teacher.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()  # type: ignore[union-attr]
            module.running_var.fill_(1)  # type: ignore[union-attr]
    return teacher


def position_only(grid: tuple[int, int] = (14, 14)) -> Callable[[Tensor], Tensor]:
    """Tokens that say where in the view they are, and nothing of the image."""
    rows, columns = (torch.arange(n) / n for n in grid)
    waves = [
        f(2 * math.pi * k * axis)
        for k in (0.25, 0.5, 1, 2)
        for f in (torch.sin, torch.cos)
        for axis in (rows[:, None].expand(grid), columns[None].expand(grid))
    ]
    tokens = torch.stack(waves, dim=-1).flatten(0, 1)
    return lambda views: tokens.expand(len(views), -1, -1)


def untrained(spec: str) -> str:
    """The same architecture, cut and arguments with random weights."""
    label, _, body = spec.partition("=")
    head, _, rest = body.partition("@")
    options = ":".join(part for part in rest.split(":")[1:])
    return f"untrained_{label}={head}@random" + (f":{options}" if options else "")


def candidates(data: Path) -> list[tuple[str, str, Callable[[], tokdiv.Teacher]]]:
    """(kind, name, how to load it); kinds: trained, baseline, noise, damaged."""
    trained = [(spec.partition("=")[0], spec) for spec in real_teachers(data)]
    trained += [
        (name, name) for name in ("sample_mae_vit", "sample_dino_vit", "sample_dino_resnet")
    ]
    found: list[tuple[str, str, Callable[[], tokdiv.Teacher]]] = []
    for name, spec in trained:
        found.append(("trained", name, lambda spec=spec: tokdiv.load_teacher(spec)))
    for name in ("pixels", "hog"):
        found.append(("baseline", name, lambda name=name: tokdiv.load_teacher(name)))
    twins = [(n, s) for n, s in trained if n in ("resnet18", "vit_tiny", "mobilenet_qat")]
    for name, spec in twins:
        for seed in (0, 1):
            text = f"{untrained(spec)}:seed={seed}"
            found.append(
                (
                    "noise",
                    f"untrained {name}, seed {seed}",
                    lambda text=text: tokdiv.load_teacher(text),
                )
            )
        found.append(
            ("noise", f"shuffled {name}", lambda spec=spec: shuffled(tokdiv.load_teacher(spec)))
        )
    for name, spec in trained[-3:]:
        found.append(
            ("noise", f"shuffled {name}", lambda spec=spec: shuffled(tokdiv.load_teacher(spec)))
        )
    for strength in (0.5, 1.0, 2.0):
        for name, spec in twins:
            found.append(
                (
                    "damaged",
                    f"{name}, noise {strength:g} sd",
                    lambda spec=spec, s=strength: noisy(tokdiv.load_teacher(spec), s),
                )
            )
    found.append(
        (
            "damaged",
            "sample_dino_resnet, BatchNorm statistics lost",
            lambda: without_statistics(tokdiv.load_teacher("sample_dino_resnet")),
        )
    )
    return found


# The tables --------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [
        f"| {' | '.join(header)} |",
        f"| {' | '.join(['---'] + ['---:'] * (len(header) - 1))} |",
    ]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--num-small", type=int, default=100, help="images of the other tables")
    arguments = parser.parse_args()
    if "TOKDIV_DATA" not in os.environ:
        print("skipped: set TOKDIV_DATA to the folder with the real images and weights")
        return
    data = Path(os.environ["TOKDIV_DATA"])
    photos = photographs(data / "imagenet_1000", arguments.num_images)
    pairs = make_pairs(photos)
    listed = candidates(data)
    alpha = (1 - CONFIDENCE) / len(listed)
    reference: dict[tuple[int, int], np.ndarray] = {}
    rows, kept = [], []
    for kind, name, load in listed:
        teacher = load()
        grid = teacher.grid
        if grid not in reference:
            reference[grid] = pixels_on(grid, pairs)
        scores = measured(teacher, grid, pairs)
        said, low, high = verdict(scores, reference[grid], alpha)
        kept.append(
            {
                "kind": kind,
                "name": name,
                "grid": grid,
                "correspondence": float(scores.mean()),
                "pixels": float(reference[grid].mean()),
                "low": low,
                "high": high,
                "verdict": said,
            }
        )
        rows.append(
            (
                name,
                kind,
                f"{grid[0]}x{grid[1]}",
                f"{scores.mean():.3f}",
                f"{reference[grid].mean():.3f}",
                f"{low:+.3f} to {high:+.3f}",
                said,
            )
        )
        print(rows[-1], flush=True)
    scores = measured(position_only(), (14, 14), pairs)
    said, low, high = verdict(scores, reference[14, 14], alpha)
    rows.append(
        (
            "position only",
            "noise",
            "14x14",
            f"{scores.mean():.3f}",
            f"{reference[14, 14].mean():.3f}",
            f"{low:+.3f} to {high:+.3f}",
            said,
        )
    )
    text = [
        f"{arguments.num_images} photographs of imagenet_1000, float32, {SIZE} px. The interval is the "
        f"{CONFIDENCE:.0%} confidence sequence of the mean paired difference to raw pixels on the same grid, "
        f"shared over {len(listed)} candidates; noise-like is below {MARGIN}.",
        "",
        table(
            ["network", "kind", "grid", "correspondence", "pixels", "minus pixels", "verdict"], rows
        ),
    ]
    sections, more = variants(data, photos[: arguments.num_small], arguments.num_small)
    text += sections
    text += ["", "## Where it fails", "", *failures(kept)]
    result = {
        "machine": machine.describe(),
        "num_images": arguments.num_images,
        "candidates": kept,
        "variants": more,
    }
    machine.write(
        "correspondence", "Correspondence: trained networks and noise", result, "\n".join(text)
    )


def variants(data: Path, photos: list[Tensor], count: int) -> tuple[list[str], dict[str, object]]:
    """Crops, tolerances, mirroring, blocks and image contents, on fewer images."""
    specs = {spec.partition("=")[0]: spec for spec in real_teachers(data)}
    names = ["vit_tiny", "resnet18", "mobilenet_bird"]
    networks: dict[str, tokdiv.Teacher] = {n: tokdiv.load_teacher(specs[n]) for n in names}
    networks["sample_dino_vit"] = tokdiv.load_teacher("sample_dino_vit")
    networks["untrained vit_tiny"] = tokdiv.load_teacher(untrained(specs["vit_tiny"]))
    networks["shuffled resnet18"] = shuffled(tokdiv.load_teacher(specs["resnet18"]))
    found: dict[str, object] = {}
    text: list[str] = []

    def add(title: str, columns: dict[str, tuple[Pairs, bool, float]]) -> None:
        rows = []
        for name, teacher in networks.items():
            values = [
                measured(teacher, teacher.grid, pairs, mirrored, tolerance).mean()
                for pairs, mirrored, tolerance in columns.values()
            ]
            rows.append([name, *(f"{value:.3f}" for value in values)])
        rows.append(
            ["pixels 14x14"]
            + [
                f"{measured(PIXELS, (14, 14), pairs, mirrored, tolerance).mean():.3f}"
                for pairs, mirrored, tolerance in columns.values()
            ]
        )
        rows.append(
            ["position only"]
            + [
                f"{measured(position_only(), (14, 14), pairs, mirrored, tolerance).mean():.3f}"
                for pairs, mirrored, tolerance in columns.values()
            ]
        )
        found[title] = {"columns": list(columns), "rows": rows}
        text.extend(["", f"## {title}", "", table(["network", *columns], rows)])
        print(text[-1], flush=True)

    plain = make_pairs(photos)
    add(
        "Mirrored or not, and the area of the crops",
        {
            "mirrored, 0.3 to 0.7": (plain, True, 0.1),
            "not mirrored": (make_pairs(photos, mirrored=False), False, 0.1),
            "mirrored, 0.1 to 0.3": (make_pairs(photos, (0.1, 0.3)), True, 0.1),
            "mirrored, 0.6 to 0.9": (make_pairs(photos, (0.6, 0.9)), True, 0.1),
        },
    )
    add("Tolerance", {f"{t:g} of the side": (plain, True, t) for t in (0.05, 0.1, 0.2)})
    add(
        "Contents of the images",
        {
            "photographs": (plain, True, 0.1),
            "street scenes": (
                make_pairs(photographs(data / "camvid" / "images", count)),
                True,
                0.1,
            ),
            "textures": (make_pairs(textures(count)), True, 0.1),
        },
    )
    rows = []
    for block in range(0, 12, 2):
        teacher = tokdiv.load_teacher(f"{specs['vit_tiny']}:blocks={block + 1}")
        value = measured(teacher, teacher.grid, plain).mean()
        rows.append([f"vit_tiny, block {block + 1}", f"{value:.3f}"])
    for block in (1, 2, 3):
        teacher = tokdiv.load_teacher(specs["resnet18"].replace("blocks=3", f"blocks={block}"))
        value = measured(teacher, teacher.grid, plain).mean()
        reference = pixels_on(teacher.grid, plain).mean()
        rows.append(
            [f"resnet18, stage {block} ({teacher.grid[0]}x{teacher.grid[1]})", f"{value:.3f}"]
        )
        rows.append([f"pixels at {teacher.grid[0]}x{teacher.grid[1]}", f"{reference:.3f}"])
    found["Blocks and token counts"] = rows
    text += ["", "## Blocks and token counts", "", table(["tokens of", "correspondence"], rows)]
    return text, found


def PIXELS(views: Tensor) -> Tensor:  # noqa: N802 - stands for a network
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255
    return pixel_cells((views - mean) / std, (14, 14))


def failures(kept: list[dict]) -> list[str]:
    """What was wrongly flagged, what was missed, and what stayed open."""
    wrong = [r["name"] for r in kept if r["kind"] == "trained" and r["verdict"] == "noise-like"]
    missed = [r["name"] for r in kept if r["kind"] == "noise" and r["verdict"] == "not noise-like"]
    still = [r["name"] for r in kept if r["verdict"] == "open"]
    damaged = [
        f"{r['name']} ({r['correspondence']:.3f}, {r['verdict']})"
        for r in kept
        if r["kind"] == "damaged"
    ]
    return [
        f"- Trained networks flagged as noise-like: {', '.join(wrong) or 'none'}.",
        f"- Untrained or shuffled networks not flagged: {', '.join(missed) or 'none'}.",
        f"- Not decided on these images: {', '.join(still) or 'none'}.",
        f"- Trained networks that were damaged: {'; '.join(damaged)}. Damage that leaves features about the image "
        "is not noise, and is not flagged.",
    ]


if __name__ == "__main__":
    main()
