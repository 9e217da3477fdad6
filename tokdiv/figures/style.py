"""What all figures share: the style, one color per teacher, names that fit, and files.

Figures are built with matplotlib's object-oriented interface, without pyplot and its global state, so they can be
drawn on a cluster without a display and in several threads.
"""

import io
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tokdiv.errors import UsageError
from tokdiv.run_dir import write_atomic
from tokdiv.text import printable

# Okabe and Ito's palette (2008), whose colors can be told apart with the three common color-vision deficiencies.
# Its yellow is left out, as it cannot be seen on white, and its black is a gray, as black is text.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "h")
DASHES: Any = ("-", "--", ":", "-.")
INK = "#222222"  # of text-like marks: intervals, outlines, thresholds

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "axes.unicode_minus": True,
    "grid.color": "#E2E2E2",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "text.usetex": False,
    "svg.hashsalt": "tokdiv",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
}
# Dates and versions are left out of the files, so that equal figures give equal bytes.
METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}

Parameters = ParamSpec("Parameters")


def styled(draw: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """Decorator: draw under STYLE, and restore the caller's own settings afterwards."""

    @wraps(draw)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def teacher_colors(names: Collection[str]) -> dict[str, str]:
    """One color per teacher, as '#rrggbb', whatever the order of `names`.

    In alphabetical order, the first seven names get the colors of PALETTE, the next seven the same hues darkened,
    the next lightened, and so on; from the 29th name on, colors repeat.
    """
    shades = ((0.0, 0.0), (0.0, 0.5), (1.0, 0.5), (0.0, 0.75))  # (0 black or 1 white, its share)
    colors = {}
    for index, name in enumerate(sorted(set(names))):
        towards, share = shades[index // len(PALETTE) % len(shades)]
        rgb = np.array(to_rgb(PALETTE[index % len(PALETTE)]))
        colors[name] = to_hex(tuple(rgb * (1 - share) + towards * share))
    return colors


def teacher_looks(
    names: Sequence[str], colors: Mapping[str, str] | None
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Color, marker and dash of each name; `colors` override those of `teacher_colors`."""
    known = {**teacher_colors(names), **(colors or {})}
    order = sorted(known)
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(order)}
    dashes = {name: DASHES[index // len(PALETTE) % len(DASHES)] for index, name in enumerate(order)}
    return known, markers, dashes


def legend_entry(label: str, color: str, **style: Any) -> Line2D:
    """An entry of a legend that is made by hand."""
    return Line2D([], [], color=color, label=label, **style)


def fit_name(name: str, width: int, lines: int = 2) -> str:
    """Break a name into at most `lines` lines of `width` characters, and elide its middle if need be.

    Every name in a figure goes through this function, so it also keeps names from being read as anything but text:
    what cannot be shown is spelled out, and dollar signs are escaped, which would begin a formula.

    Lines break after '/', ':', '@', '_', '.', '-', '=' or a space where one is near the end.
    """
    name = re.sub(r"\s+", " ", printable(name)).strip()
    capacity = width * lines
    while True:
        rest, wrapped = name, []
        if len(name) > capacity:
            head = math.ceil((capacity - 1) / 2)
            rest = name[:head] + "…" + name[len(name) - (capacity - 1 - head) :]
        while len(rest) > width:
            breaks = [m.end() for m in re.finditer(r"[/:@_.\-= …]", rest[:width])]
            cut = breaks[-1] if breaks and breaks[-1] > width // 2 else width
            wrapped.append(rest[:cut])
            rest = rest[cut:]
        wrapped.append(rest)
        if len(wrapped) <= lines:
            return "\n".join(line.strip() for line in wrapped).replace("$", r"\$")
        capacity -= 1  # Breaking at separators left room unused: elide a little more.


def check_lengths(num_teachers: int, **lengths: int) -> None:
    """Raise ValueError where an argument does not have one entry per teacher."""
    for argument, length in lengths.items():
        if length != num_teachers:
            raise ValueError(
                f"{argument} has {length} entries, expected {num_teachers}, one per teacher"
            )


def encode_figure(figure: Figure, image_format: str, dpi: int = 200) -> bytes:
    """A figure as the bytes of a "png", "svg" or "pdf" file."""
    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format=image_format, dpi=dpi, metadata=METADATA[image_format])
    return file.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure to `path` in the format of its suffix: .png (200 dpi), .svg or .pdf.

    Raises:
        UsageError: another suffix. RunError: the disk is full or not writable.
    """
    path = Path(path)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in METADATA:
        raise UsageError(
            f"cannot write a figure to {str(path)!r}: expected a name that ends in .png, .svg or .pdf; rename it"
        )
    write_atomic(path, encode_figure(figure, suffix))
    return path
