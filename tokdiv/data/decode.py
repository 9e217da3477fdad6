"""From the bytes of an image to its pixels, and from pixels to the view that a teacher sees.

A file that is not whole is refused, also where its decoder would fill in the rest: made-up gray
would be measured like a picture.
"""

import contextlib
import io
import re
import struct
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile
from torchvision.io import ImageReadMode, decode_jpeg

# Pillow's own limit for a decompression bomb (twice its MAX_IMAGE_PIXELS), held here for every
# decoder and whatever a caller sets in Pillow.
MAX_PIXELS = 178_956_970

# Only these may be opened by content: Pillow would otherwise hand a file that claims to be
# PostScript to an interpreter of PostScript. Of these, a cut file is told from a whole one.
_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# Beyond this ratio of the sides, only what the crop needs is resized (see `center_view`).
_MAX_RESIZED_ASPECT = 16


class UnusableImage(Exception):
    """An image that cannot be used; `reason` is one short line, the same on every run."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_image(data: bytes | Image.Image) -> torch.Tensor:
    """The pixels of an image, uint8 (3, H, W), 0 black to 255 white; strides may be channels-last.

    Gray becomes three equal channels, a palette its colors, CMYK what Pillow makes of it. Alpha
    is dropped, not composited. Samples of 16 bits are scaled by 1/257 and rounded. EXIF rotation
    is left as it is (as in timm and torchvision). Of an animation or of several pages, the first.

    data: the bytes of a JPEG, PNG, WebP, BMP, TIFF, GIF or PNM file, or an image of Pillow.

    Raises UnusableImage for everything that is no whole image: empty, truncated, damaged, of
    unknown format, without pixels, more than 178,956,970 pixels, samples without a defined range
    (32-bit integers and floats). Known gap: where other software closed a cut JPEG again with an
    end marker, a cut within the last block, or between the scans of a progressive file, is not
    noticed.

    Safe in threads; the decoders release the interpreter's lock.
    """
    _silence_decoders()
    try:
        if isinstance(data, Image.Image):
            _check_size(*data.size)
            return _pixels_of_pillow(data)
        return _decode_bytes(bytes(data))
    except (UnusableImage, MemoryError):
        raise
    except Exception as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            raise MemoryError(str(error)) from error  # torch's own is a RuntimeError
        raise UnusableImage(_reason(error)) from error


def _decode_bytes(data: bytes) -> torch.Tensor:
    """The one place that chooses a decoder.

    torchvision for JPEG (the fastest of the usual ones, and it refuses a file without its end),
    Pillow for the rest. Not torchvision for PNG of 16 bits, which Pillow cuts to 8: its
    `decode_png` takes the whole process down on some damaged files. torchvision's image codecs
    are deprecated from 0.29 on in favor of torchcodec: replace `_torchvision_jpeg` then.
    """
    if not data:
        raise UnusableImage("empty file")
    if data.startswith(b"\xff\xd8\xff"):
        frame = _JpegFrame.read(data)
        _check_size(frame.width, frame.height)
        if frame.bits == 8 and frame.components in (1, 3):
            pixels = _torchvision_jpeg(data, ImageReadMode.RGB)
            if _is_filled_up(data, pixels, frame):
                raise UnusableImage("truncated JPEG: the rest of the picture is missing")
            return pixels
        # Four components: Pillow knows Adobe's inversion. It would also fill in a cut file.
        _torchvision_jpeg(data, ImageReadMode.UNCHANGED)
        return _pixels_of_pillow(_open_pillow(data))
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
        _check_size(*struct.unpack_from(">II", data, 16))
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        if 8 + struct.unpack_from("<I", data, 4)[0] > len(data):
            raise UnusableImage("truncated WebP")
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _check_tiff_directory(data)
    image: Any = _open_pillow(data)
    if image.format == "TIFF":
        _check_tiff_data(image, len(data))
        deep = set(_values(image.tag_v2, 258)) == {16}
    else:
        deep = image.format == "PNG" and data[24] == 16
    if deep and image.mode in ("RGB", "RGBA"):
        return _three_channels(_colors_of_16_bits(data, image))
    if image.format in ("BMP", "DIB"):
        _check_bmp(image, len(data))
    return _pixels_of_pillow(image)


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: bytes are read-only


def _torchvision_jpeg(data: bytes, mode: ImageReadMode) -> torch.Tensor:
    return decode_jpeg(_as_tensor(data), mode=mode)


@dataclass(frozen=True)
class _JpegFrame:
    """What a JPEG says of itself before its pixels: ITU T.81, B.2.2."""

    width: int
    height: int
    components: int
    bits: int
    end: int  # where the segments behind the frame header begin

    @classmethod
    def read(cls, data: bytes) -> "_JpegFrame":
        at = 2
        while True:
            while data[at : at + 2] == b"\xff\xff":  # fill bytes
                at += 1
            if at + 4 > len(data):
                raise UnusableImage("truncated JPEG")
            if data[at] != 0xFF:
                raise UnusableImage("damaged JPEG: no marker where one must be")
            marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
            if marker in (0xD9, 0xDA):
                raise UnusableImage("damaged JPEG: no frame header")
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                if at + 10 > len(data):
                    raise UnusableImage("truncated JPEG")
                bits, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
                return cls(width, height, components, bits, at + 2 + length)
            at += 2 + length


def _is_filled_up(data: bytes, image: torch.Tensor, frame: _JpegFrame) -> bool:
    """Whether libjpeg made up the lower rows of a baseline JPEG that was cut and closed again.

    It fills missing blocks with mid-gray, so only a picture with that very gray in its last corner
    is suspect. There, bytes put before the end marker settle it: a decoder that has all its blocks
    passes over them, one that is short of data would make pixels of them.
    """
    if not bool((image[:, -1, -1] == 128).all()):
        return False
    scan = data.find(b"\xff\xda", frame.end)
    end = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]").search(data, scan + 2)
    if scan < 0 or end is None or end.group() != b"\xff\xd9":
        return False
    probe = data[: end.start()] + bytes(range(1, 255)) * 2 + b"\xff\xd9"
    # By Pillow: torchvision would tell of the extra bytes on stderr.
    with _open_pillow(data) as whole, _open_pillow(probe) as longer:
        return not np.array_equal(np.asarray(whole), np.asarray(longer))


def _check_png(data: bytes) -> None:
    """Every chunk up to IEND is whole: Pillow does not look behind the last pixel."""
    at, kind = 8, b""
    while kind != b"IEND":
        if at + 12 > len(data):
            raise UnusableImage("truncated PNG")
        length, kind = struct.unpack_from(">I4s", data, at)
        if at == 8 and (kind != b"IHDR" or length != 13):
            raise UnusableImage("damaged PNG: no header")
        at += 12 + length
    if at > len(data):
        raise UnusableImage("truncated PNG")


# The tags that say where and how the pixels lie, and the bytes of a value of each TIFF type.
_TIFF_PIXEL_TAGS = frozenset((258, 273, 279, 320, 324, 325, 338, 339, 347))
_TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 16: 8}


def _check_tiff_directory(data: bytes) -> None:
    """The first directory and what it needs lie within the file (libtiff complains on stderr)."""
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    entry, inline = (order + "HHQQ", 8) if big else (order + "HHII", 4)
    try:
        (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        (num_entries,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
        at += 8 if big else 2
        for _ in range(min(num_entries, 65536)):
            tag, kind, count, value = struct.unpack_from(entry, data, at)
            length = count * _TIFF_TYPE_BYTES.get(kind, 0)
            if tag in _TIFF_PIXEL_TAGS and length > inline and value + length > len(data):
                raise UnusableImage("truncated TIFF")
            at += struct.calcsize(entry)
    except struct.error:
        raise UnusableImage("truncated TIFF") from None


def _check_tiff_data(image: Any, num_bytes: int) -> None:
    """All strips or tiles of the first page lie within the file."""
    tags = image.tag_v2
    for offsets, lengths in ((273, 279), (324, 325)):
        for offset, length in zip(_values(tags, offsets), _values(tags, lengths)):
            if offset + length > num_bytes:
                raise UnusableImage("truncated TIFF")


def _values(tags: Any, tag: int) -> tuple[int, ...]:
    """All values of a TIFF tag; none where it is missing. Pillow unwraps some single values."""
    values = tags.get(tag, ())
    return values if isinstance(values, tuple) else (values,)


def _check_bmp(image: Any, num_bytes: int) -> None:
    """The rows of an uncompressed BMP are all there, the padding of the last one too."""
    for codec, extents, offset, arguments in image.tile:
        if codec == "raw" and offset + arguments[1] * (extents[3] - extents[1]) > num_bytes:
            raise UnusableImage("truncated BMP")


def _open_pillow(data: bytes) -> ImageFile.ImageFile:
    """Open (not yet decode) with Pillow; too large an image is named with its dimensions."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.UnidentifiedImageError:
        raise UnusableImage(f"no known image format: begins with {data[:12]!r}") from None
    except Image.DecompressionBombError:
        for name in _FORMATS:
            factory, accept = Image.OPEN[name]
            if accept is None or accept(data[:16]):
                with contextlib.suppress(SyntaxError):  # of another format after all
                    _check_size(*factory(io.BytesIO(data), "").size)
        raise
    _check_size(*image.size)
    return image


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise UnusableImage(f"no pixels: {width} x {height}")
    if width * height > MAX_PIXELS:
        raise UnusableImage(
            f"too large: {width} x {height} pixels, at most {MAX_PIXELS:,} are read"
        )


def _pixels_of_pillow(image: Image.Image) -> torch.Tensor:
    """uint8 (3, H, W) of any image of Pillow; see `decode_image`."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PPM", "PNG")):
        # A PGM of more than 8 bits comes as mode I, which Pillow has scaled to 0..65535, and with
        # an older Pillow so does a gray PNG of 16 bits.
        samples = np.asarray(image).astype(np.int64)
        tags = getattr(image, "tag_v2", {})
        white = (1 << (_values(tags, 258) or (16,))[0]) - 1
        if tags.get(262) == 0:  # WhiteIsZero, which Pillow inverts in 8 bits only
            samples = white - samples
        return _three_channels(_to_8_bits(samples, white)[:, :, None])
    if mode in ("I", "F"):
        raise UnusableImage(
            "32-bit or signed samples have no defined range (Pillow's mode " + mode + ")"
        )
    if mode in ("La", "RGBa"):  # premultiplied: Pillow converts these by way of plain alpha only
        image = image.convert(mode.upper())
    return _three_channels(np.array(image.convert("RGB")))


def _colors_of_16_bits(data: bytes, image: Any) -> np.ndarray:
    """uint8 (H, W, 3) of a PNG or TIFF in color, or in gray with alpha, of 16 bits a sample.

    Pillow keeps the high byte of each sample only. Decoding once more with the byte order turned
    round gives the low bytes. Where Pillow has no such reading (planes apart, premultiplied
    alpha), the high byte is used: at most one level off.
    """
    turned = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    second: Any = _open_pillow(data)
    tiles, gray = [], False
    for tile in second.tile:
        codec, extents, offset, arguments = tile
        mode, *rest = (arguments,) if isinstance(arguments, str) else arguments
        if mode == "LA;16B":  # four bytes a pixel: gray high, gray low, alpha high, alpha low
            mode, gray = "RGBA", True
        elif re.fullmatch(r"RGB[AX]?;16[LBN]", mode):
            mode = mode[:-1] + turned[mode[-1]]
        else:
            return np.array(image)[:, :, :3]
        arguments = mode if isinstance(arguments, str) else (mode, *rest)
        turned_tile = (codec, extents, offset, arguments)
        tiles.append(type(tile)(*turned_tile) if hasattr(tile, "_fields") else turned_tile)
    second.tile = tiles
    try:
        low = np.array(second).astype(np.int32)
    except ValueError:  # "unknown raw mode for given image mode"
        return np.array(image)[:, :, :3]
    if gray:
        return _to_8_bits(low[:, :, :1] * 256 + low[:, :, 1:2])
    return _to_8_bits(np.array(image)[:, :, :3] * np.int32(256) + low[:, :, :3])


def _to_8_bits(samples: np.ndarray, white: int = 65535) -> np.ndarray:
    """uint8 of integers 0..white, rounded to the nearest."""
    return ((samples.astype(np.int64) * 255 + white // 2) // white).astype(np.uint8)


def _three_channels(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (3, H, W), channels-last in memory, of uint8 (H, W, 1) or (H, W, 3)."""
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    """One line of an error, without what differs between runs (addresses) or builds (source files)."""
    text = str(error).strip().split("\n")[0] or type(error).__name__
    text = re.sub(r"^decode_\w+, .*?:\d+, ", "", text)
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", text)
    return f"cannot be decoded: {text[:160]}"


_SILENCED = (("PIL", Warning), ("torchvision.io.image", DeprecationWarning))


def _silence_decoders() -> None:
    """Ignore the warnings of Pillow (odd metadata) and torchvision (its codecs are deprecated).

    A filter for those modules alone: `warnings.catch_warnings` is not safe in threads.
    """
    for module, category in _SILENCED:
        pattern = re.compile(re.escape(module))
        if ("ignore", None, category, pattern, 0) not in warnings.filters:
            warnings.filterwarnings("ignore", category=category, module=pattern.pattern)


def center_view(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resize the short side to round(size * 256 / 224) and cut the center: uint8 (3, size, size).

    image: uint8 (3, H, W); channels-last strides, as `decode_image` gives, are the fastest.

    Both sides become round(side * target / short) (bicubic, antialiased, in fixed point: the same
    kernel as Pillow's to within two levels); the crop begins at floor((side - size) / 2).
    Of a very long image only what the crop needs is resized, by Pillow: a line of 1 x 5,000 pixels
    would otherwise become 256 x 1,280,000.
    """
    H, W = image.shape[-2:]
    target, short = round(size * 256 / 224), min(H, W)
    height, width = round(H * target / short), round(W * target / short)
    top, left = (height - size) // 2, (width - size) // 2
    if max(height, width) > _MAX_RESIZED_ASPECT * target:
        across, down = W / width, H / height
        box = (
            left * across,
            top * down,
            min((left + size) * across, W),
            min((top + size) * down, H),
        )
        pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        part = pixels.resize((size, size), Image.Resampling.BICUBIC, box=box)
        return _three_channels(np.array(part))
    resized = F.interpolate(
        image[None], size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )[0]
    return resized[:, top : top + size, left : left + size]
