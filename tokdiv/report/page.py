"""Pages that are one file: a template with its style and its figures, which loads nothing.

Used by both packages. A page is a jinja2 template that extends `base.html`. Everything that is put into it is
escaped: names of files, labels and keys are the user's data, not markup.
"""

import base64
import csv
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from tokdiv import __version__
from tokdiv.figures.style import encode_figure
from tokdiv.text import printable

NARROW = 3.3  # inches: the width of a figure on a phone
MAX_SKIPPED = 10  # unusable images that a page names
MEDIA_TYPES = {"svg": "image/svg+xml", "png": "image/png"}
MISSING = "\N{EN DASH}"  # in place of a number that was not measured


@dataclass(frozen=True)
class Command:
    """Something to type: its text, and a note below it."""

    text: str
    note: str


def render(template: str, package: str = "tokdiv.report", **context: Any) -> str:
    """The HTML of a page.

    Args:
        template: a file in the package's folder `templates`. It may extend `base.html`, and import `swatch`,
            `colored`, `scroll` and `command` from `macros.html`.
        package: whose templates; those of tokdiv.report are found from any.
        **context: what the template names; a missing one raises jinja2.UndefinedError. Text is escaped, except for
            what `inline_figure` returns.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("tokdiv.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "fixed": _fixed}
    return printable(environment.get_template(template).render(version=__version__, **context))


def inline_figure(
    figure: Figure,
    alt: str,
    caption: str = "",
    *,
    narrow: Figure | None = None,
    image_format: str = "svg",
    dpi: int = 150,
) -> Markup:
    """A <figure> that carries its picture.

    Args:
        figure: for a screen and for paper.
        alt: describes it for those who cannot see it. caption: a sentence below it.
        narrow: the same figure for a screen below 600 px; without one, the figure scrolls there.
        image_format: "svg", or "png" for photographs and for very many points.
        dpi: of a png.
    """
    # An SVG is embedded as an image, not as markup: the ids within two of them would clash.
    source = Markup("")
    if narrow is not None:
        source = Markup(
            '<source media="screen and (max-width: 600px)" srcset="{}" width="{}" height="{}">\n'
        ).format(_data_url(narrow, image_format, dpi), *_pixels(narrow))
    kind = "raster" if image_format == "png" else "drawn"
    box = Markup("")
    if narrow is None:  # a box that scrolls on a narrow screen, also by the keyboard
        kind += " wide"
        box = Markup(' role="group" tabindex="0" aria-label="Figure"')
    picture = Markup(
        '<picture>\n{}<img class="{}" src="{}" width="{}" height="{}" alt="{}">\n</picture>'
    ).format(source, kind, _data_url(figure, image_format, dpi), *_pixels(figure), alt)
    below = Markup("\n<figcaption>{}</figcaption>").format(caption) if caption else ""
    return Markup('<figure>\n<div class="paper"{}>{}</div>{}\n</figure>').format(
        box, picture, below
    )


def given_command(config: dict[str, Any], package: str) -> list[str]:
    """The words of the command line that started a run; none where another program did.

    Args:
        config: the run's config.json: `command`, its sys.argv, and `world`, the number of processes.
        package: "tokdiv" or "img2vec".
    """
    command, world = config.get("command"), config.get("world")
    if not isinstance(command, list) or len(command) < 2:
        return []
    # sys.argv[0] is the path of the console script, or with `python -m` that of the package's __main__.py.
    program = Path(str(command[0]))
    if program.stem != package and program.parts[-2:] != (package, "__main__.py"):
        return []
    start = [package]
    if isinstance(world, int) and world > 1:
        start = ["torchrun", "--nproc-per-node", str(world), "-m", package]
    return [*start, *map(str, command[1:])]


def repeat_command(config: dict[str, Any], package: str) -> Command | None:
    """The command line that started a run, or None where another program did."""
    words = given_command(config, package)
    if not words:
        return None
    return Command(
        shlex.join(words),
        "As it was given; relative paths hold from the folder where it was started. With the same -o it continues "
        "that run; another -o starts a new one.",
    )


def read_skipped(path: Path) -> list[tuple[str, str]]:
    """(key, reason) of each image that could not be used; empty where the file is missing or damaged."""
    try:
        with path.open(newline="", encoding="utf-8", errors="backslashreplace") as file:
            return [(row[0], row[1]) for row in list(csv.reader(file))[1:] if len(row) == 2]
    except (OSError, csv.Error):
        return []


def percent(confidence: float) -> str:
    """0.99 -> 99%."""
    return f"{100 * confidence:.6g}%"


def signed(value: float) -> str:
    """0.123456 -> +0.1235, with a true minus sign."""
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def _data_url(figure: Figure, image_format: str, dpi: int) -> str:
    encoded = base64.b64encode(encode_figure(figure, image_format, dpi)).decode("ascii")
    return f"data:{MEDIA_TYPES[image_format]};base64,{encoded}"


def _pixels(figure: Figure) -> tuple[int, int]:
    """Width and height in CSS pixels, 96 per inch."""
    width, height = figure.get_size_inches()
    return round(96 * width), round(96 * height)


def _count(value: int | None) -> str:
    """1234567 -> 1,234,567."""
    return MISSING if value is None else f"{value:,}"


def _fixed(value: float | None, digits: int = 4) -> str:
    """0.123456 -> 0.1235, with a true minus sign."""
    return MISSING if value is None else f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")
