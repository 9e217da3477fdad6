"""From the bytes of an image to its pixels, and from pixels to the view that a teacher sees.

A file that is cut off is refused, also where its decoder would fill in the rest: gray that no camera took would
be measured like a picture. So is a file whose header promises more than MAX_DECODED_BYTES.
"""

import contextlib
import functools
import importlib
import io
import re
import sys
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, features
from torchvision.io import ImageReadMode, decode_jpeg

from tokdiv.data.headers import (
    JpegFrame,
    UnusableImage,
    check_bmp,
    check_png,
    check_size,
    check_tiff_data,
    check_webp,
    prepare_tiff,
    tiff_values,
)

# Only these may be opened by content: Pillow would otherwise hand a file that claims to be PostScript to an
# interpreter of PostScript. Of these, a cut file is told from a complete one.
FORMATS = {
    "BMP": (".bmp",),
    "DIB": (),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "PNG": (".png",),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
# Formats that Pillow reads once another package is installed: the format, its extensions, module and package.
PLUGINS = (
    ("AVIF", (".avif",), "pillow_avif", "pillow-avif-plugin"),
    ("HEIF", (".heic", ".heif", ".hif"), "pillow_heif", "pillow-heif"),
    ("JXL", (".jxl",), "pillow_jxl", "pillow-jxl-plugin"),
)
# Other images, which are not read: to be named where they are left out.
OTHER_EXTENSIONS = (
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"),  # raw files of cameras
    *(".dcm", ".dicom", ".fits", ".nii"),  # medical and scientific
    *(
        ".dds",
        ".eps",
        ".exr",
        ".hdr",
        ".ico",
        ".j2k",
        ".jp2",
        ".jpx",
        ".pcx",
        ".psd",
        ".svg",
        ".tga",
    ),
)

MAX_RESIZED_ASPECT = 16  # beyond this ratio of the sides, only what the crop needs is resized
CHUNK = 1 << 20  # samples converted at a time, which bounds the memory for intermediate results


@functools.cache
def readable_formats() -> dict[str, tuple[str, ...]]:
    """The formats that can be read here, with the extensions of their files."""
    found = dict(FORMATS)
    for name, extensions, module, _ in PLUGINS:
        if name == "AVIF" and features.check("avif"):  # Pillow 11.3 or newer
            found[name] = extensions
            continue
        try:
            plugin = importlib.import_module(module)
        except Exception:  # missing, or made for another Pillow
            continue
        if register := getattr(plugin, "register_heif_opener", None):
            register()
        found[name] = extensions
    return found


@functools.cache
def image_extensions() -> frozenset[str]:
    """The extensions, as .jpg, of the files that are taken for images."""
    return frozenset(e for extensions in readable_formats().values() for e in extensions)


@functools.cache
def unread_extensions() -> dict[str, str]:
    """Extensions of images that cannot be read here, each with what to do about it."""
    remedies = dict.fromkeys(OTHER_EXTENSIONS, "convert them to PNG, TIFF or JPEG")
    for name, extensions, _, package in PLUGINS:
        if name not in readable_formats():
            remedies |= dict.fromkeys(extensions, f"pip install {package}, or convert them")
    return remedies


def decode_image(data: bytes | Image.Image | UnusableImage) -> torch.Tensor:
    """The pixels of an image, uint8 (3, H, W), 0 black to 255 white; strides may be channels-last.

    Gray becomes three equal channels, a palette its colors, CMYK what Pillow makes of it. Alpha is dropped,
    not composited. Samples of 16 bits are scaled by 1/257 and rounded. The orientation in EXIF, XMP or a TIFF
    tag is ignored in every format, as ImageNet's pipelines (timm, torchvision) ignore it. Of an animation or
    of several pages, the first.

    Args:
        data: the bytes of a file in one of `readable_formats`, an image of Pillow, or why there is none.

    Raises:
        UnusableImage: everything that is not a complete image: empty, cut off, damaged, of unknown format,
            without pixels, of more than MAX_DECODED_BYTES, with samples without a defined range (32-bit
            integers and floats). Known gap: where other software closed a cut JPEG again with an end marker,
            a cut within the last block, or between the scans of a progressive file, is not noticed.
        MemoryError: there is not enough memory.

    Safe in threads; the decoders release the interpreter's lock.
    """
    _silence_decoders()
    try:
        if isinstance(data, UnusableImage):
            raise data
        if isinstance(data, Image.Image):
            check_size(*data.size)
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

    torchvision for JPEG (the fastest of the usual ones, and it refuses a file without its end), Pillow for
    the rest. Not torchvision for PNG of 16 bits, which Pillow cuts to 8: its `decode_png` takes the whole
    process down on some damaged files. torchvision's image codecs are deprecated from 0.29 on in favor of
    torchcodec: replace `_torchvision_jpeg` then.
    """
    if not data:
        raise UnusableImage("empty file")
    if data.startswith(b"\xff\xd8"):  # padding may follow, which libjpeg passes over
        return _decode_jpeg(data)
    deep = False
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        data, deep = check_png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        check_webp(data)
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        data = prepare_tiff(data)
    image: Any = _open_pillow(data)
    if image.format == "TIFF":
        check_tiff_data(image, len(data))
        deep = set(tiff_values(image, 258)) == {16}
    elif image.format in ("BMP", "DIB"):
        check_bmp(image, len(data))
    if deep and image.mode in ("RGB", "RGBA"):
        return _three_channels(_colors_of_16_bits(data, image))
    return _pixels_of_pillow(image)


def _decode_jpeg(data: bytes) -> torch.Tensor:
    frame = JpegFrame.read(data)
    check_size(frame.width, frame.height, frame.components * (1 + (frame.bits > 8)))
    if frame.bits == 8 and frame.components in (1, 3):
        pixels = _torchvision_jpeg(frame.data, ImageReadMode.RGB)
        if _is_filled_up(frame.data, pixels, frame):
            raise UnusableImage("truncated JPEG: the rest of the picture is missing")
        return pixels
    # Four components: Pillow knows Adobe's inversion. It would also fill in a cut file.
    _torchvision_jpeg(frame.data, ImageReadMode.UNCHANGED)
    return _pixels_of_pillow(_open_pillow(frame.data))


def _torchvision_jpeg(data: bytes, mode: ImageReadMode) -> torch.Tensor:
    # A copy: bytes are read-only.
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)


def _is_filled_up(data: bytes, image: torch.Tensor, frame: JpegFrame) -> bool:
    """Whether libjpeg made up the lower rows of a baseline JPEG that was cut and closed again.

    It fills missing blocks with mid-gray, so only a picture with that very gray in its last corner is
    suspect. There, bytes put before the end marker decide: a decoder that has all its blocks passes over
    them, one that is short of data makes pixels of them.
    """
    if not bool((image[:, -1, -1] == 128).all()):
        return False
    scan = data.find(b"\xff\xda", frame.end)
    end = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]").search(data, scan + 2)
    if scan < 0 or end is None or end.group() != b"\xff\xd9":
        return False
    probe = data[: end.start()] + bytes(range(1, 255)) * 2 + b"\xff\xd9"
    # By Pillow: torchvision would complain about the extra bytes on stderr.
    with _open_pillow(data) as original, _open_pillow(probe) as longer:
        return not np.array_equal(np.asarray(original), np.asarray(longer))


def _open_pillow(data: bytes) -> ImageFile.ImageFile:
    """Open (not yet decode) with Pillow; too large an image is named with its dimensions."""
    formats = tuple(readable_formats())
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.UnidentifiedImageError:
        raise UnusableImage(f"no known image format: begins with {data[:12]!r}") from None
    except Image.DecompressionBombError:
        for name in formats:
            factory, accept = Image.OPEN[name]
            if accept is None or accept(data[:16]):
                with contextlib.suppress(SyntaxError):  # of another format after all
                    check_size(*factory(io.BytesIO(data), "").size)
        raise
    check_size(*image.size, len(image.getbands()) * (2 if "16" in image.mode else 1))
    image.info.pop("xmp", None)  # Pillow would turn a TIFF by the orientation in it
    return image


def _pixels_of_pillow(image: Image.Image) -> torch.Tensor:
    """uint8 (3, H, W) of any image of Pillow; see `decode_image`."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PPM", "PNG")):
        # A PGM of more than 8 bits comes as mode I, which Pillow has scaled to 0..65535, and with
        # an older Pillow so does a gray PNG of 16 bits.
        white = (1 << (tiff_values(image, 258) or (16,))[0]) - 1
        # WhiteIsZero, which Pillow inverts in 8 bits only.
        inverted = tiff_values(image, 262) == (0,)
        return _three_channels(_to_8_bits(np.asarray(image), white, inverted)[:, :, None])
    if mode in ("I", "F"):
        raise UnusableImage(
            "32-bit or signed samples have no defined range (Pillow's mode " + mode + ")"
        )
    if mode in ("La", "RGBa"):  # premultiplied: Pillow converts these by way of plain alpha only
        image = image.convert(mode.upper())
    return _three_channels(np.array(image if mode == "RGB" else image.convert("RGB")))


def _to_8_bits(samples: np.ndarray, white: int, inverted: bool) -> np.ndarray:
    """uint8 of integers 0..white, rounded to the nearest."""
    flat, scaled = samples.reshape(-1), np.empty(samples.size, np.uint8)
    for at in range(0, flat.size, CHUNK):
        part = flat[at : at + CHUNK].astype(np.int64)
        part = white - part if inverted else part
        scaled[at : at + CHUNK] = (part * 255 + white // 2) // white
    return scaled.reshape(samples.shape)


def _colors_of_16_bits(data: bytes, image: Any) -> np.ndarray:
    """uint8 (H, W, 3) of a PNG or TIFF in color, or in gray with alpha, of 16 bits a sample.

    Pillow keeps the high byte of each sample only. Decoding once more with the byte order turned round gives
    the low bytes. Where Pillow has no such reading (planes apart, premultiplied alpha), the high byte is
    used: at most one level off.
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
        low = np.asarray(second)
    except ValueError:  # "unknown raw mode for given image mode"
        return np.array(image)[:, :, :3]
    if gray:
        return _rounded(low[:, :, :1], low[:, :, 1:2])
    return _rounded(np.asarray(image)[:, :, :3], low[:, :, :3])


def _rounded(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """(256 * high + low) / 257, rounded, in uint8: that is high + (low - high) / 257."""
    rounded = high.copy()
    for row in range(0, len(high), step := max(1, CHUNK // max(1, high[0].size))):
        difference = low[row : row + step].astype(np.int16) - high[row : row + step]
        rounded[row : row + step] += (difference > 128).astype(np.uint8)
        rounded[row : row + step] -= (difference < -128).astype(np.uint8)
    return rounded


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

    Both sides become round(side * target / short) (bicubic, antialiased, in fixed point: the same kernel as
    Pillow's to within two levels); the crop begins at floor((side - size) / 2). Of a very long image only
    what the crop needs is resized, by Pillow: a line of 1 x 5,000 pixels would otherwise become
    256 x 1,280,000.

    Args:
        image: uint8 (3, H, W); channels-last strides, as `decode_image` gives, are the fastest.
    """
    H, W = image.shape[-2:]
    target, short = round(size * 256 / 224), min(H, W)
    height, width = round(H * target / short), round(W * target / short)
    top, left = (height - size) // 2, (width - size) // 2
    if max(height, width) > MAX_RESIZED_ASPECT * target:
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
