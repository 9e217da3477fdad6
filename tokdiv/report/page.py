"""Pages that are one file: a template, its style and its pictures, with nothing to load from anywhere.

A page of tokdiv or img2vec is a jinja2 template that extends `base.html`. Everything that is put into it is
escaped: names of files, labels and keys are the user's data, not markup. And what the pages of both say of a
run's folder: the command it came from, the images that could not be used.
"""

import base64
import csv
import re
import shlex
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from tokdiv import __version__
from tokdiv.figures.style import encode_figure

NARROW = 3.3  # inches: the width of a figure for a telephone
SKIPPED = 10  # at most so many unusable images are named on a page
MEDIA_TYPES = {"svg": "image/svg+xml", "png": "image/png"}
# What no HTML may hold, as a name in a .tar can; tab and newline may stay.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
MISSING = "\N{EN DASH}"  # stands for a number that there is not


def render(template: str, package: str = "tokdiv", **context: Any) -> str:
    """The page that a template of a package makes of `context`, as HTML.

    Args:
        template: a file in the package's folder `templates`; it may extend `base.html`, and import
            `swatch`, `colored`, `scroll` and `command` from `macros.html`.
        package: whose templates; those of tokdiv are found from any.
        **context: what the template names; one that is missing raises jinja2.UndefinedError. Text is
            escaped, `inline_figure` excepted.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("tokdiv.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "fixed": _fixed}
    page = environment.get_template(template).render(version=__version__, **context)
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", page)


def inline_figure(
    figure: Figure,
    alt: str,
    caption: str = "",
    *,
    narrow: Figure | None = None,
    image_format: str = "svg",
    dpi: int = 150,
) -> Markup:
    """A drawn figure as a <figure> that carries its own picture.

    Args:
        figure: as the page shows it on a screen and on paper.
        alt: what it shows, for those who cannot see it. caption: a sentence below it.
        narrow: the same drawn for a screen below 600 px; without one, the figure scrolls there.
        image_format: "svg", or "png" for one that holds photographs or very many points.
        dpi: of a png.
    """
    # An SVG goes in as a picture, not as markup: the ids within two of them would clash.
    source = Markup("")
    if narrow is not None:
        source = Markup(
            '<source media="screen and (max-width: 600px)" srcset="{}" width="{}" height="{}">\n'
        ).format(_data_url(narrow, image_format, dpi), *_pixels(narrow))
    kind = ("raster" if image_format == "png" else "drawn") + (
        "" if narrow is not None else " wide"
    )
    # Without a narrow twin it scrolls on a narrow screen, in a box that the keyboard reaches.
    box = (
        Markup("")
        if narrow is not None
        else Markup(' role="group" tabindex="0" aria-label="Figure"')
    )
    picture = Markup(
        '<picture>\n{}<img class="{}" src="{}" width="{}" height="{}" alt="{}">\n</picture>'
    ).format(source, kind, _data_url(figure, image_format, dpi), *_pixels(figure), alt)
    below = Markup("\n<figcaption>{}</figcaption>").format(caption) if caption else ""
    return Markup('<figure>\n<div class="paper"{}>{}</div>{}\n</figure>').format(
        box, picture, below
    )


def given_command(config: dict[str, Any], package: str) -> list[str]:
    """The words that were typed to start a run, to be typed once more; none where that was another program.

    Args:
        config: of the run's config.json: `command`, its sys.argv, and `world`, the number of processes.
        package: "tokdiv" or "img2vec".
    """
    command, world = config.get("command"), config.get("world")
    if not isinstance(command, list) or len(command) < 2:
        return []
    # sys.argv[0] is the console script's path, or with `python -m` that of the package's __main__.py.
    program = Path(str(command[0]))
    if program.stem != package and program.parts[-2:] != (package, "__main__.py"):
        return []
    start = [package]
    if isinstance(world, int) and world > 1:
        start = ["torchrun", "--nproc-per-node", str(world), "-m", package]
    return [*start, *map(str, command[1:])]


def repeat_command(config: dict[str, Any], package: str) -> dict[str, str] | None:
    """How a page gives a run's command line back: `text` to type and what is `said` of it, or None."""
    words = given_command(config, package)
    if not words:
        return None
    return {
        "text": shlex.join(words),
        "said": "As it was given: relative paths hold from the folder where that was. With the same -o it goes "
        "on with that run; another -o begins anew.",
    }


def read_skipped(path: Path) -> list[tuple[str, str]]:
    """(key, reason) of each image that could not be used; none where the file is gone or damaged."""
    try:
        with path.open(newline="", encoding="utf-8", errors="backslashreplace") as file:
            return [(row[0], row[1]) for row in list(csv.reader(file))[1:] if len(row) == 2]
    except (OSError, csv.Error):
        return []


def _data_url(figure: Figure, image_format: str, dpi: int) -> str:
    encoded = base64.b64encode(encode_figure(figure, image_format, dpi)).decode("ascii")
    return f"data:{MEDIA_TYPES[image_format]};base64,{encoded}"


def _pixels(figure: Figure) -> tuple[int, int]:
    """Width and height in CSS pixels, 96 an inch."""
    width, height = figure.get_size_inches()
    return round(96 * width), round(96 * height)


def _count(value: int | None) -> str:
    """1234567 -> 1,234,567."""
    return MISSING if value is None else f"{value:,}"


def _fixed(value: float | None, digits: int = 4) -> str:
    """0.123456 -> 0.1235, with a true minus sign."""
    return MISSING if value is None else f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")
