"""Pages that are one file: a template, its style and its pictures, with nothing to load from anywhere.

A page of tokdiv or img2vec is a jinja2 template that extends `base.html`. Everything that is put into it is
escaped: names of files, labels and keys are the user's data, not markup.
"""

import base64
import re
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from tokdiv import __version__
from tokdiv.plots import encode_figure

MEDIA_TYPES = {"svg": "image/svg+xml", "png": "image/png"}
# What no HTML may hold, as a name in a .tar can; tab and newline may stay.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
MISSING = "\N{EN DASH}"  # stands for a number that there is not


def render(template: str, package: str = "tokdiv", **context: Any) -> str:
    """The page that a template of a package makes of `context`, as HTML.

    Args:
        template: a file in the package's folder `templates`; it may extend `base.html`, and import
            `swatch`, `coloured`, `scroll` and `command` from `macros.html`.
        package: whose templates; those of tokdiv are found from any.
        **context: what the template names; one that is missing raises jinja2.UndefinedError. Text is
            escaped, `inline_figure` excepted.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("tokdiv")]),
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
