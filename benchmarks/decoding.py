"""Ways to decode a JPEG into the view of 224 px: images/s of one core, and the effect of each on the score.

    python benchmarks/decoding.py [IMAGES]

IMAGES is a folder of JPEGs; by default `imagenet_originals` of TOKDIV_DATA, or the photographs that ship with
the package. Every way makes the same view (short side 256, bicubic, antialiased, center crop 224); ways that
are not installed are left out. The score S(x) of each view is compared with that of Pillow's, for the
teachers `pixels` and `sample`: the mean absolute difference over the images, and the shift of the mean.
"""

import argparse
import io
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import machine
import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

import tokdiv
from tokdiv.data.decode import center_view, decode_image
from tokdiv.teachers.load import load_teachers

SIZE, SHORT = 224, 256  # pixels
TEACHERS = ["pixels", "sample"]
LIMIT = 0.001  # of the shift of a mean similarity
View = Callable[[bytes], torch.Tensor]  # bytes of a JPEG -> uint8 (3, SIZE, SIZE)


def pillow(data: bytes, draft: bool = False) -> torch.Tensor:
    with Image.open(io.BytesIO(data)) as image:
        if draft:  # decodes at 1/2, 1/4 or 1/8 where that is still larger than the view
            image.draft("RGB", (SHORT, SHORT))
        image = image.convert("RGB")
    scale = SHORT / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    pixels = np.array(image.crop((left, top, left + SIZE, top + SIZE)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def torchvision(data: bytes) -> torch.Tensor:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return center_view(decode_jpeg(encoded, mode=ImageReadMode.RGB), SIZE)


def ways() -> dict[str, View]:
    """The installed ways, the reference first."""
    found: dict[str, View] = {
        "Pillow": pillow,
        "Pillow, draft mode": lambda data: pillow(data, draft=True),
        "torchvision": torchvision,
        "tokdiv (torchvision, and its checks)": lambda data: center_view(decode_image(data), SIZE),
    }
    try:
        from torchcodec.decoders import decode_jpeg as torchcodec_jpeg

        found["torchcodec"] = lambda data: center_view(
            torchcodec_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)), SIZE
        )
    except (ImportError, RuntimeError, OSError):  # RuntimeError: it finds no FFmpeg
        pass
    try:
        import simplejpeg

        found["simplejpeg"] = lambda data: center_view(
            torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1), SIZE
        )
    except ImportError:
        pass
    return found


def gpu_rate(files: list[bytes], repeats: int) -> float:
    """Images/s of torchvision's batched nvJPEG with the resize on the GPU."""
    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    rates = []
    for _ in range(repeats + 1):  # the first warms up
        begin = time.perf_counter()
        for image in decode_jpeg(encoded, mode=ImageReadMode.RGB, device="cuda"):
            center_view(image.float(), SIZE)
        torch.cuda.synchronize()
        rates.append(len(files) / (time.perf_counter() - begin))
    return machine.median(rates[1:])


def scores(teacher: tokdiv.Teacher, views: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        parts = [tokdiv.token_similarity(teacher(part)) for part in views.split(32)]
    return torch.cat(parts).double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="?", type=Path)
    parser.add_argument("--num-images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # torchvision's codecs, from 0.29 on
    samples = Path(tokdiv.__file__).parent / "samples" / "images"
    data = os.environ.get("TOKDIV_DATA")
    folder = arguments.images or (Path(data) / "imagenet_originals" if data else samples)
    paths = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    files = [path.read_bytes() for path in paths[: arguments.num_images]]
    # Every way must be able to read every file: grayscale and CMYK are left to the tests.
    files = [data for data in files if Image.open(io.BytesIO(data)).mode == "RGB"]
    found = ways()
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(arguments.repeats):
        for name, view in found.items():
            begin = time.perf_counter()
            for data in files:
                view(data)
            rates[name].append(len(files) / (time.perf_counter() - begin))
    torch.set_num_threads(os.cpu_count() or 1)
    views = {n: torch.stack([view(data) for data in files]) for n, view in found.items()}
    shifts: dict[str, dict[str, tuple[float, float]]] = {}
    for teacher in load_teachers(TEACHERS):
        reference = scores(teacher, views["Pillow"])
        for name in found:
            difference = scores(teacher, views[name]) - reference
            shifts.setdefault(name, {})[teacher.name] = (
                float(np.abs(difference).mean()),
                float(difference.mean()),
            )
    rows = [
        "| way | images/s of one core (median) | over Pillow | largest mean abs. difference of S(x) "
        "| largest shift of a mean (limit 0.001) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    result: dict[str, object] = {"num_images": len(files), "teachers": list(shifts["Pillow"])}
    for name, values in rates.items():
        ratio = machine.median([a / b for a, b in zip(values, rates["Pillow"])])
        mean_abs = max(pair[0] for pair in shifts[name].values())
        shift = max(abs(pair[1]) for pair in shifts[name].values())
        rows.append(
            f"| {name} | {machine.median(values):.0f} | {ratio:.2f} | {mean_abs:.5f} | {shift:.5f} |"
        )
        result[name] = {"images_per_second": values, "ratio": ratio, "shifts": shifts[name]}
    within = [n for n in found if max(abs(s) for _, s in shifts[n].values()) <= LIMIT]
    fastest = max(within, key=lambda name: machine.median(rates[name]))
    on_gpu = torch.cuda.is_available()
    nvjpeg = f"{gpu_rate(files, arguments.repeats):.0f} images/s" if on_gpu else "not measured"
    teachers = ", ".join(f"`{name}`" for name in shifts["Pillow"])
    rows += [
        "",
        f"{len(files)} JPEGs of {folder.name}, {arguments.repeats} interleaved repeats; S(x) of {teachers} in "
        f"float32, compared with Pillow's view. Batched nvJPEG on a GPU: {nvjpeg}.",
        "tokdiv decodes with torchvision, which it needs anyway. The fastest way here within the limit: "
        f"{fastest}.",
    ]
    machine.record("decoding", result, "\n".join(rows), "cuda" if on_gpu else "cpu")


if __name__ == "__main__":
    main()
