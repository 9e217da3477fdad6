"""Text of the user's that is shown: what cannot be shown is spelled out, in figures, pages and SVGs."""

import os
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from tokdiv.figures.depth import depth_figure
from tokdiv.figures.diversity_accuracy import diversity_accuracy_figure
from tokdiv.figures.evidence import evidence_figure
from tokdiv.figures.maps import maps_figure
from tokdiv.figures.similarity import similarity_figure
from tokdiv.figures.style import save_figure
from tokdiv.text import printable

CONTROLS = [chr(n) for n in [*range(0x20), *range(0x7F, 0xA0)]]
BIDI = list("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
HOSTILE = [
    "".join(CONTROLS[:16]),
    "".join(CONTROLS[16:]),
    "a" + "b".join(BIDI),
    os.fsdecode(b"name-\xff\xfe.png"),  # no UTF-8
    "\ud83d half of an emoji",
    "\ufffe\uffff\ufdd0",
    "<svg onload=x>&amp;]]>-->",
    "$x$ $\\frac{$ \\$y\\$ $$",
]


def test_what_xml_cannot_hold_is_spelled_out() -> None:
    allowed = {"\t", "\n"}
    for code in range(0x110000):
        character = chr(code)
        shown = printable(character)
        valid = (  # https://www.w3.org/TR/xml/#charsets, and not a control character
            character in allowed
            or 0x20 <= code <= 0xD7FF
            or 0xE000 <= code <= 0xFFFD
            or code >= 0x10000
        ) and (character in allowed or unicodedata.category(character) != "Cc")
        assert valid or shown != character, hex(code)
        if shown != character:
            assert shown.isascii() and shown.isprintable()
            assert shown[0] == "\\" and int(shown[2:], 16) in (code, code - 0xDC00)


def test_text_of_other_scripts_stays_as_it_is() -> None:
    for text in ("Größe", "名前.png", "صورة", "می‌خواهم", "👩‍🔬", "a\tb\nc", "co\u00adop"):
        assert printable(text) == text


def test_bytes_of_names_that_are_no_utf8_and_overrides_can_be_read() -> None:
    assert printable(os.fsdecode(b"a\xff.png")) == r"a\xff.png"
    assert printable("photo\u202egnp.exe") == r"photo\u202egnp.exe"
    assert printable("a\x07b") == r"a\x07b"


def svgs(name: str, folder: Path) -> list[Path]:
    """An SVG of each kind of figure with a teacher of this name."""
    ones = [0.5, 0.6]
    curve = (ones, ones, ones)
    names = pd.Series([name, "b"], dtype=object)  # pandas takes no surrogates as text
    table = pd.DataFrame({"name": names, "diversity": ones, "accuracy": ones})
    view = np.zeros((8, 8, 3), np.uint8)
    figures = [
        similarity_figure([name, "b"], np.full((9, 2), 0.5), ones, ones, [True, False], best=name),
        evidence_figure([64], [[1.0]], [f"{name} < b"], [False], 20, {}),
        depth_figure({name: curve, "b": curve}),
        diversity_accuracy_figure(table),
        maps_figure([view], [name], [[np.eye(2)]], [(0, 0, 1, 1)], [[(0, 0)]], [[0.5]]),
    ]
    return [save_figure(figure, folder / f"{n}.svg") for n, figure in enumerate(figures)]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_figures_with_hostile_names_are_valid_and_show_the_name(name: str, tmp_path: Path) -> None:
    for path in svgs(name, tmp_path):
        root = ElementTree.parse(path).getroot()
        assert not [element for element in root.iter() if element.tag.endswith("script")]
        assert "onload" not in {
            attribute for element in root.iter() for attribute in element.attrib
        }


def test_a_name_is_never_a_formula(tmp_path: Path) -> None:
    for name in ("$x$", "$\\frac{$", "\\$y\\$", "a$b$c$d$"):
        figure = depth_figure({name: ([0.5], [0.5], [0.5])})
        (label,) = [t for t in figure.findobj(Text) if "0.500" in t.get_text()]
        text, is_math = label._preprocess_math(label.get_text())
        assert not is_math and text.startswith(name)
