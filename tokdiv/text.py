"""Text of the user's that is shown: names of files, labels, keys."""

import re

# What XML and HTML cannot hold, or what would reorder the text around it: control characters (tab and newline may
# stay), line separators, bidirectional embeddings, overrides and isolates, surrogates, and noncharacters.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def printable(text: str) -> str:
    r"""Spell out what cannot be shown: a bell as \x07, a byte 0xff of a name that is no UTF-8 as \xff."""
    return UNPRINTABLE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte that is no UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
