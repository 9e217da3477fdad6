"""From the file of a mask to its class numbers."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokdiv.data.decode import UnusableImage
from tokdiv.data.headers import check_size
from tokdiv.data.source import Item
from tokdiv.errors import UsageError, first_line

MAX_VALUE = 65_535
EXACT = ("PNG", "TIFF", "BMP", "GIF")
# Recognized, to be refused by name: lossy, or scaled by Pillow to a range of its own.
INEXACT = ("JPEG", "WEBP", "PPM")


def decode_mask(data: Item, name: str) -> NDArray[np.int64]:
    """The class numbers of a mask.

    A palette's indices are the numbers, its colors mean nothing. Samples of 1, 2, 4, 8 and 16 bits are read as
    they are in the file.

    Args:
        data: a file with one number per pixel: a PNG, TIFF, BMP, GIF or PNM; or an image of Pillow.
        name: of the file, for messages.

    Returns:
        int64 (H, W), 0 to 65,535.

    Raises:
        UsageError: a color image, a JPEG, or samples that are no such numbers.
        UnusableImage: not an image, damaged or cut.
    """
    if isinstance(data, UnusableImage):
        raise data
    try:
        image = data
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image), formats=EXACT + INEXACT)
            check_size(*image.size, pixel_bytes=8)
        _check_kind(image, name)
        values = np.asarray(image).astype(np.int64)
    except UsageError:
        raise
    except Exception as error:
        raise UnusableImage(f"cannot be decoded: {first_line(error, 160)}") from None
    if image.mode == "L" and (bits := _sample_bits(image, data)) < 8:
        values //= 255 // (2**bits - 1)  # Pillow spreads 2 and 4 bits over 0 to 255
    if values.size and not (values.min() >= 0 and values.max() <= MAX_VALUE):
        wrong = values.min() if values.min() < 0 else values.max()
        raise UsageError(
            f"'{name}' holds the number {wrong}; expected class numbers from 0 to {MAX_VALUE}"
        )
    return values


def _check_kind(image: Image.Image, name: str) -> None:
    """Refuse what does not keep class numbers."""
    if image.format in INEXACT:
        raise UsageError(
            f"'{name}' is a {image.format} file, which does not keep class numbers exactly: save masks as PNG"
        )
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        if image.mode == "F":
            raise UsageError(
                f"'{name}' holds floating-point numbers: expected whole class numbers; save it as uint8 or uint16"
            )
        raise UsageError(
            f"'{name}' is a color image ({image.mode}): expected one class number per pixel; convert it: look "
            f"each color up in your table of classes and save the numbers with "
            f"PIL.Image.fromarray(numbers.astype('uint8')).save(PATH)"
        )
    if image.format == "TIFF" and image.tag_v2.get(262) == 0 and image.mode != "P":  # type: ignore[attr-defined]
        raise UsageError(
            f"'{name}' is a TIFF whose 0 is white, so that its numbers are ambiguous: save masks as PNG"
        )


def _sample_bits(image: Image.Image, data: bytes | Image.Image) -> int:
    """Bits per sample in the file of a gray image."""
    if image.format == "PNG" and isinstance(data, bytes):
        return data[24]
    if image.format == "TIFF":
        return int(image.tag_v2.get(258, (8,))[0])  # type: ignore[attr-defined]
    return 8
