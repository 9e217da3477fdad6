"""Image files for tests, and what a source says about them."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tokdiv.data.open import open_source
from tokdiv.errors import UsageError


def png(level: int = 0, side: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (level % 256, level // 256, 7)).save(file, "PNG")
    return file.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def keys(source) -> list[str]:
    return [source.key(index) for index in range(source.count)]


def refusal(data: object) -> str:
    with pytest.raises(UsageError) as caught:
        open_source(str(data))
    assert "\n" not in str(caught.value)
    return str(caught.value)
