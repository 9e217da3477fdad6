"""What the header of an image says before its pixels are decoded: its size, and whether the file is complete."""

import re
import struct
from dataclasses import dataclass
from typing import Any

# Of one image: 178,956,970 pixels of three bytes, the limit at which Pillow sees a decompression bomb. It holds
# for every decoder, and whatever a caller sets in Pillow.
MAX_DECODED_BYTES = 2**29
MAX_ROW_BITS = 2**31  # Pillow's own limit for a row, at 32 bits a pixel or more


class UnusableImage(Exception):
    """An image that cannot be used; `reason` is one short line, the same on every run."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def check_size(width: int, height: int, pixel_bytes: int = 3) -> None:
    """Refuse an image without pixels, or of more bytes than are decoded.

    Args:
        pixel_bytes: of a pixel in the file; three are the least, since colors come out.
    """
    if width < 1 or height < 1:
        raise UnusableImage(f"no pixels: {width} x {height}")
    pixel_bytes = max(3, pixel_bytes)
    if width * height * pixel_bytes > MAX_DECODED_BYTES:
        raise UnusableImage(
            f"too large: {width} x {height} pixels of {pixel_bytes} bytes, at most "
            f"{MAX_DECODED_BYTES:,} bytes are decoded"
        )
    if width * 8 * max(4, pixel_bytes) >= MAX_ROW_BITS:
        raise UnusableImage(f"too large: rows of {width} pixels")


@dataclass(frozen=True)
class JpegFrame:
    """What a JPEG says about itself before its pixels: ITU T.81, B.2.2.

    data: the file, without bytes between its first segments that belong to none of them.
    end: where in `data` the segments after the frame header begin.
    """

    data: bytes
    width: int
    height: int
    components: int
    bits: int
    end: int

    @classmethod
    def read(cls, data: bytes) -> "JpegFrame":
        at, pieces, begin = 2, [], 0
        for _ in range(MAX_SEGMENTS):
            # Like libjpeg, pass over padding: any bytes up to FF and a marker that is neither 00 nor FF.
            found = _MARKER.search(data, at)
            if found is None or found.end() + 2 > len(data):
                raise UnusableImage("truncated JPEG")
            if data[at : found.start()].strip(b"\xff"):
                pieces.append(data[begin:at])
                begin = found.start()
            at, marker = found.end(), data[found.end() - 1]
            if marker in _WITHOUT_LENGTH:
                continue
            if marker in (0xD9, 0xDA):
                break
            length = max(2, int.from_bytes(data[at : at + 2], "big"))
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                if at + 8 > len(data):
                    raise UnusableImage("truncated JPEG")
                bits, height, width, components = struct.unpack_from(">BHHB", data, at + 2)
                end = at + length
                if pieces:  # torchvision would complain about each padding on stderr
                    end += sum(map(len, pieces)) - begin
                    data = b"".join([*pieces, data[begin:]])
                return cls(data, width, height, components, bits, end)
            at += length
        raise UnusableImage("damaged JPEG: no frame header")


MAX_SEGMENTS = 65536  # of a JPEG before its frame header, and chunks of a PNG times 16
_MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD8))

# Chunks of a PNG whose size Pillow limits, and which do not change its pixels.
_PNG_METADATA = (b"iCCP", b"iTXt", b"tEXt", b"zTXt", b"eXIf")
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def check_png(data: bytes) -> tuple[bytes, bool]:
    """The file without texts and color profiles, and whether it has 16 bits a sample.

    Every chunk up to IEND is complete: Pillow does not look beyond the last pixel.
    """
    at, begin, kept = 8, 0, []
    for _ in range(16 * MAX_SEGMENTS):
        if at + 12 > len(data):
            raise UnusableImage("truncated PNG")
        length, kind = struct.unpack_from(">I4s", data, at)
        if at == 8 and (kind != b"IHDR" or length != 13):
            raise UnusableImage("damaged PNG: no header")
        if kind in _PNG_METADATA:
            kept.append(data[begin:at])
            begin = at + 12 + length
        at += 12 + length
        if kind == b"IEND":
            break
    if kind != b"IEND" or at > len(data):
        raise UnusableImage("truncated PNG")
    width, height, depth, color = struct.unpack_from(">IIBB", data, 16)
    check_size(width, height, _PNG_CHANNELS.get(color, 4) * (2 if depth == 16 else 1))
    return (b"".join([*kept, data[begin:]]) if kept else data), depth == 16


def check_webp(data: bytes) -> None:
    """The file is complete, and its canvas, which Pillow allocates on opening, is not too large."""
    if len(data) < 30 or 8 + struct.unpack_from("<I", data, 4)[0] > len(data):
        raise UnusableImage("truncated WebP")
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    check_size(width, height, 4)


# The tags that say where and how the pixels lie, and the bytes of a value of each TIFF type.
_TIFF_PIXEL_TAGS = frozenset((258, 273, 279, 320, 324, 325, 338, 339, 347))
_TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 16: 8}
_ORIENTATION = 274


def prepare_tiff(data: bytes) -> bytes:
    """The file, with its orientation set to "as stored", by which Pillow would turn the picture.

    The first directory and what it needs lie within the file (libtiff complains on stderr).
    """
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    entry, inline = (order + "HHQQ", 8) if big else (order + "HHII", 4)
    try:
        (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        (num_entries,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
        at += 8 if big else 2
        changes = []
        for _ in range(min(num_entries, 65536)):
            tag, kind, count, value = struct.unpack_from(entry, data, at)
            length = count * _TIFF_TYPE_BYTES.get(kind, 0)
            if tag in _TIFF_PIXEL_TAGS and length > inline and value + length > len(data):
                raise UnusableImage("truncated TIFF")
            at += struct.calcsize(entry)
            if tag == _ORIENTATION:
                one = struct.pack(order + {1: "B", 4: "I"}.get(kind, "H"), 1)
                changes.append((at - inline, one))
    except struct.error:
        raise UnusableImage("truncated TIFF") from None
    if all(data.startswith(one, field) for field, one in changes):
        return data
    changed = bytearray(data)
    for field, one in changes:
        changed[field : field + len(one)] = one
    return bytes(changed)


def check_tiff_data(image: Any, num_bytes: int) -> None:
    """The samples of the first page are not too many, and all its strips or tiles lie within the file."""
    num_samples, tile_width, tile_height = (
        (tiff_values(image, tag) or (1,))[0] for tag in (277, 322, 323)
    )
    pixel_bytes = -(-max(tiff_values(image, 258) or (1,)) * num_samples // 8)
    width, height = image.size
    check_size(width, height, pixel_bytes)
    check_size(tile_width, tile_height, pixel_bytes)
    for offsets, lengths in ((273, 279), (324, 325)):
        for offset, length in zip(tiff_values(image, offsets), tiff_values(image, lengths)):
            if offset + length > num_bytes:
                raise UnusableImage("truncated TIFF")


def tiff_values(image: Any, tag: int) -> tuple[int, ...]:
    """All values of a TIFF tag; none where it is missing. Pillow unwraps some single values."""
    values = getattr(image, "tag_v2", {}).get(tag, ())
    return values if isinstance(values, tuple) else (values,)


def check_bmp(image: Any, num_bytes: int) -> None:
    """The rows of an uncompressed BMP are all there, the padding of the last one too."""
    for codec, extents, offset, arguments in image.tile:
        if codec == "raw" and offset + arguments[1] * (extents[3] - extents[1]) > num_bytes:
            raise UnusableImage("truncated BMP")
