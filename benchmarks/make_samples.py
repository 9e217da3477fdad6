"""Cut the sample photographs that ship with tokdiv out of those in scikit-image's wheel.

Only photographs that scikit-image's documentation states to be in the public domain or under
CC0 are used; 'no known copyright restrictions' (coins, ihc) or no statement at all (moon,
motorcycle, page) is not enough. Larger photographs give several crops, at most five each, so that
no single one dominates. Writes `images/*.jpg` and `LICENSES.md`.

    python benchmarks/make_samples.py [--out tokdiv/samples]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import skimage
from PIL import Image

SHORT_SIDE = 288
JPEG_QUALITY = 88
MAX_TOTAL_BYTES = 2_000_000


@dataclass(frozen=True)
class Photograph:
    """One source: scikit-image's file, what it shows, and its terms as scikit-image states them."""

    file: str
    shows: str
    author: str
    source: str
    license: str


PHOTOGRAPHS = {
    "astronaut": Photograph(
        "astronaut.png",
        "the astronaut Eileen Collins",
        "NASA",
        "https://flic.kr/p/r9qvLn",
        "public domain",
    ),
    "brick": Photograph(
        "brick.png",
        "a brick wall",
        "CC0Textures, Bricks25",
        "https://cc0textures.com/view.php?tex=Bricks25",
        "CC0 1.0",
    ),
    "camera": Photograph(
        "camera.png",
        "a man with a film camera on a lawn",
        "Lav Varshney",
        "https://github.com/scikit-image/scikit-image/issues/3927",
        "CC0 1.0",
    ),
    "cat": Photograph(
        "chelsea.png",
        "Chelsea the cat",
        "Stefan van der Walt",
        "https://scikit-image.org/docs/stable/api/skimage.data.html#skimage.data.chelsea",
        "CC0 1.0",
    ),
    "clock": Photograph(
        "clock_motion.png",
        "a wall clock, blurred by the camera's motion",
        "Stefan van der Walt",
        "https://scikit-image.org/docs/stable/api/skimage.data.html#skimage.data.clock",
        "public domain",
    ),
    "coffee": Photograph(
        "coffee.png",
        "a cup of espresso on a wooden table",
        "Rachel Michetti (courtesy of Pikolo Espresso Bar)",
        "https://scikit-image.org/docs/stable/api/skimage.data.html#skimage.data.coffee",
        "CC0 1.0",
    ),
    "galaxies": Photograph(
        "hubble_deep_field.jpg",
        "the Hubble eXtreme Deep Field",
        "NASA",
        "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/",
        "public domain",
    ),
    "grass": Photograph(
        "grass.png",
        "grass",
        "linolafett",
        "https://www.deviantart.com/linolafett/art/Grass-01-434853879",
        "CC0 1.0",
    ),
    "gravel": Photograph(
        "gravel.png",
        "gravel",
        "CC0Textures, Gravel04",
        "https://cc0textures.com/view.php?tex=Gravel04",
        "CC0 1.0",
    ),
    "retina": Photograph(
        "retina.jpg",
        "the back of a human eye",
        "Mikael Häggström",
        "https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg",
        "CC0 1.0",
    ),
    "rocket": Photograph(
        "rocket.jpg",
        "a Falcon 9 rocket before its launch at dusk",
        "SpaceX",
        "https://www.flickr.com/photos/spacexphotos/16511594820/in/photostream/",
        "public domain",
    ),
}

# File name without suffix -> photograph, (left, top, right, bottom) in its pixels (None: all of
# it), and what this crop shows.
CROPS: dict[str, tuple[str, tuple[int, int, int, int] | None, str]] = {
    "astronaut_portrait": ("astronaut", None, "whole photograph"),
    "astronaut_face": ("astronaut", (110, 0, 350, 240), "her face"),
    "astronaut_helmet": ("astronaut", (262, 316, 512, 512), "her helmet"),
    "astronaut_shuttle": ("astronaut", (338, 10, 512, 270), "a model of the Space Shuttle"),
    "astronaut_suit": ("astronaut", (20, 215, 280, 475), "her suit with its patches"),
    "brick_wall": ("brick", None, "whole photograph"),
    "brick_rows": ("brick", (20, 250, 276, 506), "rows of bricks"),
    "camera_man": ("camera", None, "whole photograph"),
    "camera_head": ("camera", (90, 50, 350, 270), "the man's head and the camera"),
    "camera_skyline": ("camera", (280, 70, 512, 280), "buildings beyond the lawn"),
    "camera_tripod": ("camera", (180, 240, 440, 512), "the tripod"),
    "cat_portrait": ("cat", None, "whole photograph"),
    "cat_eyes": ("cat", (110, 50, 400, 225), "her eyes"),
    "cat_fur": ("cat", (0, 70, 220, 290), "her cheek's fur"),
    "cat_muzzle": ("cat", (170, 110, 360, 300), "her nose and whiskers"),
    "clock_blurred": ("clock", None, "whole photograph"),
    "coffee_cup": ("coffee", None, "whole photograph"),
    "coffee_espresso": ("coffee", (150, 0, 430, 220), "the cup from above"),
    "coffee_spoon": ("coffee", (270, 190, 470, 390), "the spoon on the saucer"),
    "coffee_table": ("coffee", (0, 0, 240, 400), "the table's wood and the saucer's edge"),
    "galaxies_field": ("galaxies", None, "whole photograph"),
    "galaxies_bright": ("galaxies", (560, 330, 860, 630), "a bright galaxy and a star"),
    "galaxies_spiral": ("galaxies", (60, 260, 360, 560), "a face-on spiral galaxy among others"),
    "grass_lawn": ("grass", None, "whole photograph"),
    "grass_blades": ("grass", (130, 110, 386, 366), "blades of grass"),
    "gravel_bed": ("gravel", None, "whole photograph"),
    "gravel_stones": ("gravel", (10, 10, 266, 266), "single stones"),
    "retina_fundus": ("retina", None, "whole photograph"),
    "retina_macula": ("retina", (480, 480, 930, 930), "the macula"),
    "retina_optic_disc": ("retina", (40, 420, 540, 920), "the optic disc"),
    "rocket_dusk": ("rocket", None, "whole photograph"),
    "rocket_body": ("rocket", (220, 90, 420, 427), "the rocket"),
    "rocket_lights": ("rocket", (40, 190, 300, 427), "the launch pad's lights"),
    "rocket_tower": ("rocket", (0, 20, 240, 420), "the towers beside the pad"),
}


INTRODUCTION = """\
# Sources and licenses of the sample photographs

All are in the public domain or under [CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/),
as the documentation of
[scikit-image](https://scikit-image.org/docs/stable/api/skimage.data.html), which ships the
originals, states for each. They were cropped, resized to a short side of 288 pixels and saved as
JPEG by `benchmarks/make_samples.py`; these changes are under CC0 1.0 too. Naming the authors is
thanks, not a duty. No person or organization shown endorses anything.

| file | what | source | author | license |
| --- | --- | --- | --- | --- |"""


def make_crop(photograph: Image.Image, box: tuple[int, int, int, int] | None) -> Image.Image:
    """Cut `box` (left, top, right, bottom in pixels) and resize its short side to 288 pixels."""
    crop = photograph if box is None else photograph.crop(box)
    scale = SHORT_SIDE / min(crop.size)
    size = (round(crop.width * scale), round(crop.height * scale))
    return crop.resize(size, Image.Resampling.BICUBIC)


def write_licenses(path: Path) -> None:
    """Write the table of files, sources, authors and licenses."""
    lines = [INTRODUCTION]
    for name, (key, _, part) in CROPS.items():
        photograph = PHOTOGRAPHS[key]
        lines.append(
            f"| `images/{name}.jpg` | {photograph.shows}: {part} "
            f"| <{photograph.source}> (scikit-image `{photograph.file}`) "
            f"| {photograph.author} | {photograph.license} |"
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent.parent / "tokdiv" / "samples"
    parser.add_argument("--out", type=Path, default=default, help="folder to write to")
    out = parser.parse_args().out
    (out / "images").mkdir(parents=True, exist_ok=True)
    data = Path(skimage.__file__).parent / "data"
    total = 0
    for name, (key, box, _) in CROPS.items():
        with Image.open(data / PHOTOGRAPHS[key].file) as photograph:
            crop = make_crop(photograph, box)
        path = out / "images" / f"{name}.jpg"
        crop.save(path, quality=JPEG_QUALITY, optimize=True, progressive=False)
        total += path.stat().st_size
    if total > MAX_TOTAL_BYTES:
        raise SystemExit(f"{total} bytes of images, expected at most {MAX_TOTAL_BYTES}: crop less")
    write_licenses(out / "LICENSES.md")
    print(f"{len(CROPS)} images, {total} bytes, in {out}")


if __name__ == "__main__":
    main()
