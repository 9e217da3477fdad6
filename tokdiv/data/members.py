"""The members of a tar, read from front to back in bounded memory, whoever wrote it.

Why not Python's tarfile: it keeps every header, reads long names and sparse maps of any size into memory, calls
itself once for every extended header, and ends silently at a damaged one.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from tokdiv.data.source import max_encoded_bytes
from tokdiv.errors import first_line

BLOCK = 512
MAX_HEADER_BYTES = 2**20  # of a long name, or of the records of a PAX header
END_BYTES = 2**20  # what is looked at after the end mark: tar pads with fewer zeros
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"


class DamagedTar(Exception):
    """The rest of a tar cannot be used; the message says why, as "is damaged"."""


class NotATar(DamagedTar):
    """Not even the first header is one."""

    def __init__(self) -> None:
        super().__init__("is no tar")


@dataclass(frozen=True)
class Member:
    """A member of a tar.

    name: without a leading "./" or "/"; bytes that are not UTF-8 are surrogates.
    kind: "file", "link" (a hard link), or "other": folders, symbolic links, devices, sparse files.
    offset, size: of its content, in bytes. link: for a hard link, the name of its file.
    """

    name: str
    kind: str
    offset: int
    size: int
    link: str = ""


def is_compressed(path: str) -> bool:
    """Whether a file is a compressed tar, by its name or its first bytes."""
    with open(path, "rb") as file:
        start = file.read(6)
    return path.lower().endswith(COMPRESSED) or start.startswith((_GZIP, _BZIP2, _XZ, _ZSTD))


def decompressed(file: Any) -> tuple[Any, bool]:
    """The content of a file that may be compressed, and whether it was.

    Raises:
        DamagedTar: compressed in a way that this Python does not read.
    """
    buffered = io.BufferedReader(file)
    start = buffered.peek(6)
    if start.startswith(_GZIP):
        return gzip.GzipFile(fileobj=buffered), True
    if start.startswith(_BZIP2):
        return bz2.BZ2File(buffered), True
    if start.startswith(_XZ):
        return lzma.LZMAFile(buffered), True
    if start.startswith(_ZSTD):
        raise DamagedTar("is compressed with zstd: unpack it, or pack it with gzip")
    return buffered, False


class Tar:
    """A tar that is being read.

    Args:
        file: its bytes.
        num_bytes: how many there are, where content can be passed over by seeking; None for a stream.
    """

    def __init__(self, file: Any, num_bytes: int | None) -> None:
        self.file, self.num_bytes, self.position = file, num_bytes, 0

    def members(self) -> Iterator[Member]:
        """All members, in order. `read` gives the content of the last one.

        Raises:
            DamagedTar: no more can be read, after those before have been given.
        """
        named: dict[str, Any] = {}  # what extended headers say about the next member
        following = 0
        while True:
            self._pass_to(following)
            first = self.position == 0
            header = self.read_up_to(BLOCK)
            if len(header) < BLOCK:
                raise NotATar() if first else DamagedTar("has no end mark and may be cut off")
            if not any(header):
                break
            kind, size = header[156:157], _size_in(header, first)
            if kind in b"LKxX":
                if size > MAX_HEADER_BYTES:
                    raise DamagedTar("is damaged: it has a header of more than a megabyte")
                named |= _extended(kind, self.read(size))
                following = self.position + -size % BLOCK
                continue
            sparse = kind == b"S" or named.get("sparse", False)
            if kind == b"S":
                more = header[482]
                while more:
                    more = self.read(BLOCK)[504]
            # Links, devices and folders have no content, whatever their size says.
            size = 0 if kind in b"123456" else named.get("size", size)
            following = self.position + size + -size % BLOCK
            if self.num_bytes is not None and self.position + size > self.num_bytes:
                raise DamagedTar("is cut off")
            if kind == b"g":  # remarks on all members, as git writes
                continue
            name = named.get("name") or _name(header)
            yield Member(
                _relative(name),
                "other" if sparse or name.endswith("/") else _KINDS.get(kind, "other"),
                self.position,
                size,
                _relative(named.get("link") or _text(header[157:257])),
            )
            named = {}
        if any(self.read_up_to(END_BYTES)):
            raise DamagedTar(
                "has more data after its end mark, as joined tars have, which is not read"
            )

    def read(self, num_bytes: int) -> bytes:
        """The next bytes.

        Raises:
            DamagedTar: there are not so many.
        """
        data = self.read_up_to(num_bytes)
        if len(data) < num_bytes:
            raise DamagedTar("is cut off")
        return data

    def read_up_to(self, num_bytes: int) -> bytes:
        """The next bytes, fewer at the end."""
        parts = []
        try:
            while num_bytes and (part := self.file.read(num_bytes)):
                parts.append(part)
                num_bytes -= len(part)
                self.position += len(part)
        except (EOFError, zlib.error, lzma.LZMAError, HTTPException) as error:
            raise DamagedTar(f"is damaged: {first_line(error)}") from error
        except OSError as error:
            if error.errno is not None or isinstance(error, (TimeoutError, ConnectionError)):
                raise
            raise DamagedTar(f"is damaged: {first_line(error)}") from error
        return b"".join(parts)

    def _pass_to(self, position: int) -> None:
        if position == self.position:
            return
        if self.num_bytes is not None:
            self.file.seek(position)
            self.position = position
            return
        if position - self.position > (most := max_encoded_bytes()):
            raise DamagedTar(f"has a member of more than {most:,} bytes, which is not passed over")
        while self.position < position:
            self.read(min(2**20, position - self.position))


_KINDS = {b"0": "file", b"\0": "file", b"7": "file", b"1": "link"}


def _size_in(header: bytes, first: bool) -> int:
    """The size in a header, whose checksum has to be right."""
    try:
        total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if _number(header[148:156]) == total:
            return _number(header[124:136])
    except ValueError:
        pass
    raise NotATar() if first else DamagedTar("is damaged")


def _number(field: bytes) -> int:
    """A number of at least 0, in octal digits or, where it is large, in base 256."""
    if field[0] & 0x80:
        number = int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
        if field[0] & 0x40 or number >= 2**63:
            raise ValueError("negative or huge")
        return number
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    if not digits.isdigit():
        raise ValueError("no digits")
    return int(digits, 8)


def _extended(kind: bytes, content: bytes) -> dict[str, Any]:
    """What an extended header says about the next member: name, link, size, and whether it is sparse."""
    if kind in b"LK":
        return {"name" if kind == b"L" else "link": _text(content)}
    named: dict[str, Any] = {}
    at = 0
    while (space := content.find(b" ", at, at + 20)) > at:
        try:
            length = int(content[at:space])
            key, _, value = content[space + 1 : at + length - 1].partition(b"=")
            if key == b"size":
                named["size"] = int(value)
        except ValueError:
            length = 0
        if length < 5 or not 0 <= named.get("size", 0) < 2**63:
            raise DamagedTar("is damaged")
        if key in (b"path", b"GNU.sparse.name"):
            named["name"] = _text(value)
        elif key == b"linkpath":
            named["link"] = _text(value)
        if key.startswith(b"GNU.sparse."):
            named["sparse"] = True
        at += length
    return named


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header.startswith(b"ustar\0", 257) else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _relative(name: str) -> str:
    return name.removeprefix("./").lstrip("/")
