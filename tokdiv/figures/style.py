"""Arrays to matplotlib figures: everything that tokdiv draws, in one style.

Figures are built with matplotlib's object-oriented interface (no pyplot, no global state), so they
can be drawn on a cluster without a display and in threads that do not share figures. A teacher has
one color, from `teacher_colors`, in every figure that is given the same dict.
"""

from __future__ import annotations

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

# Okabe and Ito's palette (2008), told apart under the three common color-vision deficiencies.
# Its yellow is left out, as it cannot be seen on white, and its black is a gray, as black is text.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "h")

DASHES: Any = ("-", "--", ":", "-.")

QUERY_COLOR = "#E8000B"

COLOR_MAP = "viridis"

METADATA: dict[str, dict[str, Any]] = {  # of each kind of file, what would change from run to run
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}

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

Parameters = ParamSpec("Parameters")


def _styled(draw: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """Draw under STYLE and give the caller's own settings back afterwards."""

    @wraps(draw)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def _new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def teacher_colors(names: Collection[str]) -> dict[str, str]:
    """One color a teacher, as '#rrggbb', the same whatever the order of `names`.

    The first seven names (alphabetically) get the seven colors of PALETTE, the next seven the
    same hues darkened, the next lightened, and so on; from the 29th name on, colors repeat.
    Line plots and scatters tell teachers apart by marker too.
    """
    shades = ((0.0, 0.0), (0.0, 0.5), (1.0, 0.5), (0.0, 0.75))  # (towards: 0 black, 1 white; share)
    colors = {}
    for index, name in enumerate(sorted(set(names))):
        towards, share = shades[index // len(PALETTE) % len(shades)]
        rgb = np.array(to_rgb(PALETTE[index % len(PALETTE)]))
        colors[name] = to_hex(tuple(rgb * (1 - share) + towards * share))
    return colors


def _looks(
    names: Sequence[str], colors: Mapping[str, str] | None
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Color, marker and dash of each name; markers and dashes follow the colors' order."""
    known = {**teacher_colors(names), **(colors or {})}
    order = sorted(known)
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(order)}
    dashes = {name: DASHES[index // len(PALETTE) % len(DASHES)] for index, name in enumerate(order)}
    return known, markers, dashes


def _ink(color: str) -> str:
    """`color` darkened until small text in it can be read on white."""
    return to_hex(tuple(0.6 * np.array(to_rgb(color))))


def _key(label: str, color: str, **style: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=color, label=label, **style)


def fit_name(name: str, width: int, lines: int = 2) -> str:
    """Break `name` into at most `lines` lines of `width` characters, its middle elided if need be.

    Lines break after '/', ':', '@', '_', '.', '-', '=' or a space where one is near the end. Dollar
    signs are escaped, so that matplotlib does not read formulas into names.
    """
    name = re.sub(r"\s+", " ", name).strip()
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


def _check_lengths(num_teachers: int, **lengths: int) -> None:
    for argument, length in lengths.items():
        if length != num_teachers:
            raise ValueError(
                f"{argument} has {length} entries, expected {num_teachers}, one a teacher"
            )


def encode_figure(figure: Figure, image_format: str, dpi: int = 200) -> bytes:
    """`figure` as a file of `image_format`: "png", "svg" or "pdf".

    No date or version is written into it, so equal figures give equal bytes.
    """
    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format=image_format, dpi=dpi, metadata=METADATA[image_format])
    return file.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write `figure` to `path` as its suffix says: .png (200 dpi), .svg or .pdf.

    The file appears whole or not at all: it is written beside its place under a temporary name and
    then renamed.

    Raises:
        UsageError: Another suffix.
    """
    path = Path(path)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in METADATA:
        raise UsageError(
            f"cannot write a figure to {str(path)!r}: expected a name that ends in .png, .svg or"
            " .pdf; rename it"
        )
    encoded = encode_figure(figure, suffix)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(encoded)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
