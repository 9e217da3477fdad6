"""Which teachers are noise-like: correspondence against diversity."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup
from matplotlib.figure import Figure

from tokdiv.figures.correspondence import correspondence_figure
from tokdiv.ranking import RankedTeacher
from tokdiv.report.page import NARROW, inline_figure


def draw_correspondence(teachers: Sequence[RankedTeacher], colors: Mapping[str, str]) -> Markup:
    """The figure of the teachers whose correspondence was measured, with its description."""
    values = ", ".join(f"{t.name} {t.correspondence:.3f}" for t in teachers)
    return inline_figure(
        figure_of_correspondence(teachers, colors, 6.5),
        f"Correspondence against token diversity, by teacher. Correspondence: {values}.",
        "A good teacher is diverse (right) and about the image (high). Bars are intervals.",
        narrow=figure_of_correspondence(teachers, colors, NARROW),
    )


def figure_of_correspondence(
    teachers: Sequence[RankedTeacher], colors: Mapping[str, str], width: float = 5.5
) -> Figure:
    """The figure alone, `width` inches wide."""
    return correspondence_figure(
        [t.name for t in teachers],
        [(t.diversity, 1 - t.ci_high, 1 - t.ci_low) for t in teachers],
        [
            (t.correspondence or 0.0, t.correspondence_low or 0.0, t.correspondence_high or 0.0)
            for t in teachers
        ],
        [t.pixels_correspondence or 0.0 for t in teachers],
        [t.baseline for t in teachers],
        colors=colors,
        width=width,
    )
