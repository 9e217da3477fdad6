"""Decoding and the view, against Pillow, numpy and hand-made files."""

import io
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokdiv.data.decode import UnusableImage, center_view, decode_image, image_extensions
from tokdiv.data.headers import MAX_DECODED_BYTES

DATA = os.environ.get("TOKDIV_DATA")


def picture(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A smooth random picture, uint8 (height, width, channels)."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, channels), dtype=np.uint8)
    bands = [
        Image.fromarray(noise[:, :, i]).resize((width, height), Image.Resampling.BICUBIC)
        for i in range(channels)
    ]
    return np.stack([np.asarray(band) for band in bands], axis=2)


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes | Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) by the code under test."""
    image = decode_image(data)
    assert image.dtype == torch.uint8
    assert image.ndim == 3
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def reason(data: bytes | Image.Image) -> str:
    with pytest.raises(UnusableImage) as caught:
        decode_image(data)
    assert "\n" not in caught.value.reason
    assert "0x" not in caught.value.reason
    return caught.value.reason


def png_of_16_bits(samples: np.ndarray, interlaced: bool = False) -> bytes:
    """A PNG of uint16 (H, W, channels) written by hand; interlaced by Adam7."""
    H, W, channels = samples.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2)]
        passes += [(0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b""
    for y, x, down, across in passes:
        part = samples[y::down, x::across]
        rows += b"".join(b"\0" + row.astype(">u2").tobytes() for row in part if part.size)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", W, H, 16, kind, 0, 0, int(interlaced))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff_of_16_bits(
    samples: np.ndarray, order: str, compressed: bool, photometric: int, extra: int | None = None
) -> bytes:
    """A TIFF of uint16 (H, W, channels) written by hand; order "<" or ">"."""
    H, W, channels = samples.shape
    content = samples.astype(order + "u2").tobytes()
    content = zlib.compress(content) if compressed else content
    compression = 8 if compressed else 1
    tags = [(256, "H", [W]), (257, "H", [H]), (258, "H", [16] * channels)]
    tags += [(259, "H", [compression]), (262, "H", [photometric]), (273, "I", [0])]
    tags += [(277, "H", [channels]), (278, "H", [H]), (279, "I", [len(content)])]
    tags += [(338, "H", [extra])] if extra is not None else []
    behind = 8 + 2 + 12 * len(tags) + 4
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    directory = struct.pack(order + "H", len(tags))
    for tag, kind, values in tags:
        if tag == 273:
            values = [behind + len(bits)]
        value = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(value) > 4:
            value = struct.pack(order + "I", behind)
        code = {"H": 3, "I": 4}[kind]
        directory += struct.pack(order + "HHI", tag, code, len(values)) + value.ljust(4, b"\0")
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return start + directory + struct.pack(order + "I", 0) + bits + content


def scaled(samples: np.ndarray) -> np.ndarray:
    """16 bits to 8 as the definition has it: 1/257, rounded."""
    return np.rint(samples / 257).astype(np.uint8)


RGB = Image.fromarray(picture(37, 29))
WHOLE_FILES = {
    "jpeg": encoded(RGB, "JPEG"),
    "jpeg progressive": encoded(RGB, "JPEG", progressive=True),
    "jpeg gray": encoded(RGB.convert("L"), "JPEG"),
    "jpeg with restarts": encoded(RGB, "JPEG", restart_marker_blocks=2),
    "jpeg with a thumbnail": encoded(
        RGB, "JPEG", exif=b"Exif\0\0" + encoded(RGB.resize((16, 12)), "JPEG")
    ),
    "jpeg cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "png": encoded(RGB, "PNG"),
    "png gray": encoded(RGB.convert("L"), "PNG"),
    "png palette": encoded(RGB.quantize(16), "PNG"),
    "png 1 bit": encoded(RGB.convert("1"), "PNG"),
    "webp": encoded(RGB, "WEBP"),
    "webp lossless": encoded(RGB, "WEBP", lossless=True),
    "webp animated": encoded(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(180)]),
    "bmp": encoded(RGB, "BMP"),
    "bmp palette": encoded(RGB.quantize(16), "BMP"),
    "tiff": encoded(RGB, "TIFF"),
    "tiff lzw": encoded(RGB, "TIFF", compression="tiff_lzw"),
    "tiff jpeg": encoded(RGB, "TIFF", compression="jpeg"),
    "tiff deflate": encoded(RGB, "TIFF", compression="tiff_adobe_deflate"),
    "tiff 1 bit": encoded(RGB.convert("1"), "TIFF", compression="group4"),
    "gif": encoded(RGB.quantize(16), "GIF"),
    "ppm": encoded(RGB, "PPM"),
}
if ".avif" in image_extensions():
    WHOLE_FILES["avif"] = encoded(RGB, "AVIF")
    WHOLE_FILES["avif animated"] = encoded(
        RGB, "AVIF", save_all=True, append_images=[RGB.rotate(180)]
    )


@pytest.mark.parametrize("kind", WHOLE_FILES)
def test_every_format_has_the_pixels_that_pillow_reads(kind):
    difference = pixels(WHOLE_FILES[kind]).astype(int) - by_pillow(WHOLE_FILES[kind])
    assert np.abs(difference).max() <= (1 if kind.startswith("jpeg") else 0)


@pytest.mark.parametrize("kind", WHOLE_FILES)
def test_a_cut_file_is_unusable_or_loses_nothing(kind):
    data = WHOLE_FILES[kind]
    whole = pixels(data)
    lengths = {*range(0, len(data), 7), *range(max(0, len(data) - 40), len(data))}
    undetected = []
    for length in lengths:
        try:
            assert np.array_equal(pixels(data[:length]), whole)
            undetected.append(len(data) - length)
        except UnusableImage:
            pass
    # The last bytes of these say nothing of the picture, and files without them are common.
    assert all(missing <= 4 for missing in undetected)
    assert not undetected or kind in ("gif", "tiff 1 bit")


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("tail", [b"\xff\xd9", b"\0" * 600, b"<html>oops</html>"])
def test_a_cut_jpeg_with_something_behind_the_cut_is_unusable(fraction, tail):
    data = encoded(picture(160, 120), "JPEG", quality=95)
    assert "JPEG" in reason(data[: int(len(data) * fraction)] + tail) or tail != b"\xff\xd9"


def test_a_grey_corner_is_no_sign_of_a_cut():
    gray = np.full((40, 40, 3), 128, np.uint8)
    assert (pixels(encoded(gray, "JPEG")) == 128).all()
    assert (pixels(encoded(gray[:, :, 0], "JPEG")) == 128).all()


def test_bytes_behind_the_end_of_a_jpeg_do_no_harm():
    data = WHOLE_FILES["jpeg"]
    for tail in (b"\0" * 100, b"trailer", WHOLE_FILES["jpeg gray"]):
        assert np.array_equal(pixels(data + tail), pixels(data))


def test_alpha_is_dropped_and_not_composited():
    rgba = picture(20, 16, 4)
    rgba[:8, :, 3] = 0
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(pixels(encoded(rgba, kind)), rgba[:, :, :3])
    gray_alpha = Image.fromarray(rgba[:, :, [0, 3]], "LA")
    assert np.array_equal(pixels(encoded(gray_alpha, "PNG")), np.repeat(rgba[:, :, :1], 3, 2))


def test_cmyk_is_what_pillow_makes_of_it():
    cmyk = Image.fromarray(picture(30, 20, 4), "CMYK")
    for kind in ("JPEG", "TIFF"):
        data = encoded(cmyk, kind)
        assert np.array_equal(pixels(data), by_pillow(data))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("interlaced", [False, True])
def test_png_of_16_bits_is_scaled_and_not_clipped(channels, interlaced):
    samples = np.random.default_rng(0).integers(0, 65536, (19, 13, channels))
    samples[0, :6, 0] = [0, 128, 129, 65406, 65407, 65535]
    colors = samples[:, :, :3] if channels > 2 else np.repeat(samples[:, :, :1], 3, 2)
    assert np.array_equal(pixels(png_of_16_bits(samples, interlaced)), scaled(colors))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [False, True])
def test_tiff_of_16_bits_is_scaled_and_not_clipped(order, compressed):
    samples = np.random.default_rng(1).integers(0, 65536, (19, 13, 4))
    gray = tiff_of_16_bits(samples[:, :, :1], order, compressed, photometric=1)
    assert np.array_equal(pixels(gray), scaled(np.repeat(samples[:, :, :1], 3, 2)))
    rgb = tiff_of_16_bits(samples[:, :, :3], order, compressed, photometric=2)
    assert np.array_equal(pixels(rgb), scaled(samples[:, :, :3]))
    rgba = tiff_of_16_bits(samples, order, compressed, photometric=2, extra=2)
    assert np.array_equal(pixels(rgba), scaled(samples[:, :, :3]))


def test_white_is_zero_is_turned_round_in_16_bits_too():
    samples = np.random.default_rng(1).integers(0, 65536, (5, 6, 1))
    data = tiff_of_16_bits(samples, "<", False, photometric=0)
    assert np.array_equal(pixels(data), scaled(np.repeat(65535 - samples, 3, 2)))


def test_pgm_of_16_bits_is_scaled():
    samples = np.random.default_rng(1).integers(0, 65536, (5, 6))
    data = b"P5 6 5 65535\n" + samples.astype(">u2").tobytes()
    assert np.array_equal(pixels(data)[:, :, 0], scaled(samples))


@pytest.mark.parametrize("kind", ["i4", "f4"])
def test_samples_without_a_range_are_refused(kind):
    image = Image.fromarray(np.ones((4, 5), kind))
    assert "no defined range" in reason(encoded(image, "TIFF"))
    assert "no defined range" in reason(image)


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF LZW", "MPO", "AVIF"])
def test_orientation_is_ignored_in_every_format(kind, orientation):
    """As in timm's and torchvision's pipelines; Pillow alone would turn a TIFF."""
    if kind == "AVIF" and ".avif" not in image_extensions():
        pytest.skip("this Pillow reads no AVIF")
    exif = Image.Exif()
    exif[274] = orientation
    options = {"save_all": True, "append_images": [RGB]} if kind == "MPO" else {}
    if kind == "TIFF LZW":
        options["compression"] = "tiff_lzw"
    plain = encoded(RGB, kind.split()[0], **options)
    turned = encoded(RGB, kind.split()[0], exif=exif, **options)
    assert turned != plain
    assert pixels(turned).shape == (29, 37, 3)
    if kind != "AVIF":  # where the turn is a property of the picture, and the encoder is told of it
        assert np.array_equal(pixels(turned), pixels(plain))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["B", "H", "I"])
def test_orientation_of_a_tiff_is_ignored_however_it_is_written(order, kind):
    samples = np.random.default_rng(1).integers(0, 65536, (5, 6, 3))
    plain = tiff_of_16_bits(samples, order, False, photometric=2)
    # An entry in place of RowsPerStrip, which is all rows by default; tags may come in any order.
    tag, code = struct.pack(order + "H", 278), {"B": 1, "H": 3, "I": 4}[kind]
    at = plain.index(tag + struct.pack(order + "H", 3))
    entry = struct.pack(order + "HHI", 274, code, 1) + struct.pack(order + kind, 6).ljust(4, b"\0")
    turned = plain[:at] + entry + plain[at + 12 :]
    assert np.array_equal(pixels(turned), scaled(samples))


def test_orientation_in_xmp_is_ignored_too():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(RGB, "TIFF", tiffinfo={700: xmp})
    assert b"Orientation" in data
    assert np.array_equal(pixels(data), np.asarray(RGB))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        (b"iCCP", b"profile\0\0"),
        (b"zTXt", b"Comment\0\0"),
        (b"iTXt", b"Comment\0\1\0\0\0"),
    ],
    ids=["iCCP", "zTXt", "iTXt"],
)
@pytest.mark.parametrize("behind", [False, True])
def test_a_png_with_large_metadata_is_read(kind, start, behind):
    data = encoded(RGB, "PNG")
    chunk = png_chunk(kind, start + zlib.compress(b"a" * (80 << 20)))
    at = len(data) - 12 if behind else 33
    assert np.array_equal(pixels(data[:at] + chunk + data[at:]), np.asarray(RGB))
    texts = b"".join(png_chunk(b"tEXt", b"Comment\0" + b"a" * 70_000) for _ in range(1000))
    assert np.array_equal(pixels(data[:at] + texts + data[at:]), np.asarray(RGB))
    assert "truncated PNG" in reason(data[:at] + chunk[:-9])
    palette = encoded(RGB.quantize(16), "PNG", transparency=3)
    assert np.array_equal(pixels(palette[:33] + chunk + palette[33:]), pixels(palette))


@pytest.mark.parametrize("padding", [b"\xff\0\xff\0", b"\xff" * 9, b"junk\xff\0", b"\0" * 70_000])
@pytest.mark.parametrize("kind", ["jpeg", "jpeg progressive", "jpeg gray", "jpeg cmyk"])
def test_padding_between_the_segments_of_a_jpeg_is_passed_over(kind, padding, capfd):
    data = WHOLE_FILES[kind]
    at, padded = 2, data[:2]
    while data[at + 1] not in (0xC0, 0xC2):  # up to the frame header
        length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        padded += padding + data[at : at + length]
        at += length
    assert np.array_equal(pixels(padded + padding + data[at:]), pixels(data))
    assert capfd.readouterr().err == ""


def test_a_jpeg_of_nothing_but_markers_takes_no_time():
    for junk in (b"\xff" * 5_000_000 + b"\0", b"\xff\xe0\0\2" * 1_000_000, b"\xff\xd0" * 1_000_000):
        begin = time.process_time()
        assert "JPEG" in reason(b"\xff\xd8\xff\xe0\0\4ab" + junk)
        assert time.process_time() - begin < 5


def test_of_an_animation_the_first_frame():
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (10, 200)]
    for kind in ("GIF", "TIFF", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert (pixels(data) == 10).all()


def test_pictures_of_pillow_are_taken_as_they_are():
    assert np.array_equal(pixels(RGB), np.asarray(RGB))
    assert np.array_equal(pixels(RGB.convert("L"))[:, :, 1], np.asarray(RGB.convert("L")))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty file"),
        (b"just text", "no known image format: begins with b'just text'"),
        (b"<!DOCTYPE html><p>404", "no known image format: begins with b'<!DOCTYPE ht'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no known image format"),
        (b"\xff\xd8\xff\xd9", "JPEG"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 50, "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "truncated PNG"),
        (b"II*\0\xff\xff\xff\x7f", "truncated TIFF"),
    ],
)
def test_what_is_no_image_has_a_reason(data, expected):
    assert expected in reason(data)
    assert reason(data) == reason(data)


def test_damage_inside_a_file_is_no_crash():
    deep = np.random.default_rng(0).integers(0, 65536, (9, 7, 3))
    files = [*WHOLE_FILES.values(), png_of_16_bits(deep), tiff_of_16_bits(deep, "<", True, 2)]
    rng = np.random.default_rng(0)
    num_unusable = 0
    for _ in range(60):
        for data in files:
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), rng.choice([1, 2, 5, 20])):
                damaged[place] = rng.integers(256)
            try:
                center_view(decode_image(bytes(damaged)), 16)
            except UnusableImage:  # the only error there may be; some damage goes unnoticed
                num_unusable += 1
    assert num_unusable > 60


def test_a_bomb_is_refused_by_its_header_with_its_dimensions():
    def with_size(data: bytes, at: int, form: str, *size: int) -> bytes:
        return data[:at] + struct.pack(form, *size) + data[at + struct.calcsize(form) :]

    side = 13_400
    assert 3 * side**2 > MAX_DECODED_BYTES
    frame = WHOLE_FILES["jpeg"].index(b"\xff\xc0") + 5
    bombs = [
        with_size(WHOLE_FILES["jpeg"], frame, ">HH", side, side),
        with_size(WHOLE_FILES["png"], 16, ">II", side, side),
        with_size(WHOLE_FILES["bmp"], 18, "<ii", side, side),
        WHOLE_FILES["ppm"].replace(b"37 29", b"13400 13400", 1),
    ]
    for bomb in bombs:
        assert "too large: 13400 x 13400 pixels" in reason(bomb)


def test_a_bomb_is_refused_whatever_its_depth_and_shape():
    def png_of(width: int, height: int, depth: int, color: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
        body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
        return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")

    assert "rows of 100000000 pixels" in reason(png_of(100_000_000, 1, 1, 0))
    assert "13000 x 13000 pixels of 6 bytes" in reason(png_of(13_000, 13_000, 16, 2))
    assert "12000 x 12000 pixels of 4 bytes" in reason(png_of(12_000, 12_000, 8, 6))
    assert "9000 x 9000 pixels of 8 bytes" in reason(png_of(9000, 9000, 16, 6))
    assert "too large" not in reason(png_of(13_000, 13_000, 8, 0))  # cut off, but not too large

    samples = np.zeros((4, 4, 3), np.uint16)
    tiff = tiff_of_16_bits(samples, "<", True, 2)
    width, height = (tiff.index(struct.pack("<HHI", tag, 3, 1)) + 8 for tag in (256, 257))
    huge = bytearray(tiff)
    huge[width : width + 2] = huge[height : height + 2] = struct.pack("<H", 13_000)
    assert "13000 x 13000 pixels of 6 bytes" in reason(bytes(huge))

    webp = bytearray(WHOLE_FILES["webp animated"])
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xff\x3f\0" * 2  # a canvas of 16384 x 16384, which Pillow allocates on opening
    assert "16384 x 16384 pixels" in reason(bytes(webp))
    for kind in ("webp", "webp lossless"):
        webp = bytearray(WHOLE_FILES[kind])
        at = {b"VP8 ": 26, b"VP8L": 21}[bytes(webp[12:16])]
        webp[at : at + 4] = b"\xff\xff\xff\xff" if at == 21 else b"\xff\x3f\xff\x3f"
        assert "too large: 1638" in reason(bytes(webp))

    gif = bytearray(WHOLE_FILES["gif"])
    gif[6:10] = struct.pack("<HH", 65_000, 65_000)
    assert "65000 x 65000 pixels" in reason(bytes(gif))


def test_a_tile_of_a_tiff_is_no_bomb():
    """libtiff allocates whole tiles, however small the picture is."""
    content = zlib.compress(bytes(100))
    tags = [(256, 4), (257, 4), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(322, 60_000), (323, 60_000), (324, 8 + 2 + 12 * 10 + 4), (325, len(content))]
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = struct.pack("<2sHI", b"II", 42, 8) + directory + bytes(4) + content
    assert "60000 x 60000 pixels" in reason(data)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("kind", "sides", "limit"),
    [
        ("16 bits", (4000, 4000, 3), 30),
        ("16 bits", (6000, 6000, 1), 12),
        ("8 bits", (6000, 6000, 3), 22),
    ],
)
def test_decoding_takes_a_bounded_multiple_of_the_pixels(tmp_path, kind, sides, limit):
    """Bytes a pixel at the peak, in a process of its own; 16 bits in color took 50."""
    if kind == "16 bits":
        data = png_of_16_bits(np.zeros(sides, np.uint16))
    else:
        data = encoded(np.zeros(sides, np.uint8), "PNG")
    (tmp_path / "image").write_bytes(data)
    script = f"""
import sys
from tokdiv.data.decode import decode_image
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
decode_image(open({str(tmp_path / "warm")!r}, "rb").read())
before = peak()
decode_image(open({str(tmp_path / "image")!r}, "rb").read())
print((peak() - before) * 1024)
"""
    (tmp_path / "warm").write_bytes(png_of_16_bits(np.zeros((9, 9, sides[2]), np.uint16)))
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < limit * sides[0] * sides[1]


def test_a_picture_without_pixels_is_refused():
    frame = WHOLE_FILES["jpeg"].index(b"\xff\xc0") + 5
    data = WHOLE_FILES["jpeg"]
    assert "no pixels" in reason(data[:frame] + b"\0\0" + data[frame + 2 :])
    assert "no pixels" in reason(Image.new("RGB", (0, 5)))


def test_running_out_of_memory_is_no_fault_of_the_image(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr("tokdiv.data.decode.decode_jpeg", fail)
    with pytest.raises(MemoryError):
        decode_image(WHOLE_FILES["jpeg"])


def test_no_warnings_from_the_decoders():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (*WHOLE_FILES.values(), png_of_16_bits(np.zeros((3, 3, 1)))):
            decode_image(data)


def test_threads_decode_alike():
    expected = {kind: pixels(data) for kind, data in WHOLE_FILES.items()}
    wrong = []

    def work() -> None:
        for kind, data in WHOLE_FILES.items():
            if not np.array_equal(pixels(data), expected[kind]):
                wrong.append(kind)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# The view


def view_by_pillow(image: np.ndarray, size: int) -> np.ndarray:
    """Resize and crop with Pillow, as the definition has it."""
    H, W = image.shape[:2]
    target, short = round(size * 256 / 224), min(H, W)
    height, width = round(H * target / short), round(W * target / short)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return np.asarray(resized)[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height"),
    [(500, 375), (333, 500), (256, 256), (224, 300), (40, 30), (7, 5), (1, 1), (3, 40), (700, 44)],
)
@pytest.mark.parametrize("size", [224, 96, 37])
def test_the_view_is_the_one_of_pillow(width, height, size):
    image = picture(width, height, seed=width)
    view = center_view(torch.from_numpy(image).permute(2, 0, 1), size)
    assert view.shape == (3, size, size)
    assert view.dtype == torch.uint8
    difference = view.permute(1, 2, 0).numpy().astype(int) - view_by_pillow(image, size)
    assert np.abs(difference).max() <= 2
    assert np.abs(difference).mean() < 0.1


def test_the_view_does_not_depend_on_the_layout():
    image = torch.from_numpy(picture(100, 80)).permute(2, 0, 1)
    assert torch.equal(center_view(image, 64), center_view(image.contiguous(), 64))


@pytest.mark.parametrize(("width", "height"), [(900, 20), (20, 900)])
def test_a_very_long_image_is_resized_only_where_it_is_seen(width, height):
    image = picture(width, height)
    view = center_view(torch.from_numpy(image).permute(2, 0, 1), 32)
    difference = view.permute(1, 2, 0).numpy().astype(int) - view_by_pillow(image, 32)
    assert np.abs(difference).max() <= 2


def test_a_line_of_pixels_costs_no_memory():
    line = torch.from_numpy(picture(5000, 1)).permute(2, 0, 1)  # 256 x 1,280,000 if resized whole
    view = center_view(line, 224)
    assert view.shape == (3, 224, 224)
    middle = line[:, 0, 2500].int()
    assert (view[:, 100, 112].int() - middle).abs().max() <= 8


@pytest.mark.skipif(DATA is None, reason="TOKDIV_DATA is not set")
def test_real_photographs_are_seen_as_pillow_sees_them():
    assert DATA is not None
    files = sorted(Path(DATA, "imagenet_originals").glob("*.JPEG"))[:12]
    means = []
    for file in files:
        data = file.read_bytes()
        image = by_pillow(data)
        view = center_view(decode_image(data), 224).permute(1, 2, 0).numpy().astype(int)
        difference = np.abs(view - view_by_pillow(image, 224))
        assert difference.max() <= 2
        means.append(difference.mean())
    assert len(files) == 12
    assert np.mean(means) < 0.05
