"""Images with objects in COCO's format, read and checked: IMAGES_FOLDER:annotations=FILE.json.

Objects are polygons or run-length encodings (RLE); a crowd is one that stands for many.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokdiv.data.headers import MAX_DECODED_BYTES
from tokdiv.errors import RunError, UsageError, first_line
from tokdiv.run_dir import file_sha256, read_json

NOTATION = "IMAGES_FOLDER:annotations=FILE.json"
LISTS = ("images", "annotations", "categories")

# Why objects are left out
LEFT_OUT = {
    "no_area": "their boxes have no area",
    "no_mask": "they have no usable mask",
    "no_image": "their image is not listed",
}


@dataclass(frozen=True)
class CocoData:
    """Images of a folder, and their objects.

    Attributes:
        name: as the user wrote it.
        folder: where the images are.
        fingerprint: of the JSON.
        classes: names; class n has label n + 1, as label 0 is the background.
        used_classes: those with objects other than crowds.
        num_objects, num_crowds: int64 (n,), per image.
        left_out: how many objects were left out, by key of LEFT_OUT.
        missing: files that the JSON names and the folder lacks; their images are not among the n.
        records: uint8, the JSON of all n images' records joined. ends: int64 (n,), where each ends. One array and
            not n dicts: a worker process would copy every page of dicts that it only reads, for their
            reference counts.
    """

    name: str
    folder: Path
    fingerprint: str
    classes: list[str] = field(repr=False)
    used_classes: set[str] = field(repr=False)
    num_objects: NDArray[np.int64] = field(repr=False)
    num_crowds: NDArray[np.int64] = field(repr=False)
    left_out: dict[str, int]
    missing: list[str]
    records: NDArray[np.uint8] = field(repr=False)
    ends: NDArray[np.int64] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ends)

    def record(self, index: int) -> dict[str, Any]:
        """`file`, `size` (height, width), and `objects`: label, box (x1, y1, x2, y2), area, crowd, mask."""
        start = self.ends[index - 1] if index else 0
        return json.loads(self.records[start : self.ends[index]].tobytes())

    def training_indices(self) -> NDArray[np.int64]:
        """Images to train on: those with objects, and those without any. Not those with crowds alone, which
        would be taught to be background."""
        return np.flatnonzero((self.num_objects > 0) | (self.num_crowds == 0))


# Reading the JSON --------------------------------------------------------------------------------


def open_coco(data: str, classes: list[str] | None = None) -> CocoData:
    """Read a COCO JSON and match it with its folder of images.

    Args:
        data: IMAGES_FOLDER:annotations=FILE.json.
        classes: names of the training classes, to which those of the JSON are matched by name; None takes
            the JSON's own categories, in the order of their numbers, gaps closed.

    Raises:
        UsageError: no such folder or file, no COCO JSON, a class with objects that `classes` lacks, none of the
            images there.
    """
    folder, path = _split_notation(data)
    content = _read_lists(path)
    own = _entries(path, "categories", content, lambda c: (_whole(c["id"]), _text(c["name"])))
    own.sort()
    for what, values in (("id", [i for i, _ in own]), ("name", [name for _, name in own])):
        repeated = [value for value, count in Counter(values).items() if count > 1]
        if repeated:
            raise UsageError(f"'{path}': two categories have the {what} {repeated[0]!r}")
    names = [name for _, name in own] if classes is None else classes
    labels = {name: number for number, name in enumerate(names, start=1)}
    category_names = dict(own)

    images = _entries(path, "images", content, _image)
    objects: dict[int, list[Any]] = {image_id: [] for image_id, *_ in images}
    if len(objects) < len(images):
        raise UsageError(f"'{path}': two images have the same id")
    sizes = {image_id: size for image_id, _, size in images}
    left_out: Counter[str] = Counter()
    unknown: set[str] = set()
    for image_id, category_id, found in _entries(
        path, "annotations", content, lambda a: _annotation(a, sizes)
    ):
        if category_id not in category_names:
            raise UsageError(
                f"'{path}': an object has the category {category_id}, which is not listed"
            )
        if isinstance(found, str):
            left_out[found] += 1
        elif (name := category_names[category_id]) not in labels:
            unknown.add(name)
        else:
            objects[image_id].append([labels[name], *found])
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UsageError(
            f"'{data}' has objects of classes that the training data lack: "
            f"{', '.join(sorted(unknown)[:3])}{more}; classes are matched by name"
        )
    there, missing = _in_folder(folder, path, images)
    records = [
        json.dumps({"file": file, "size": size, "objects": objects[image_id]}).encode()
        for image_id, file, size in there
    ]
    crowds = np.array([sum(o[3] for o in objects[i]) for i, *_ in there], dtype=np.int64)
    used = {o[0] for i, *_ in there for o in objects[i] if not o[3]}
    return CocoData(
        name=data,
        folder=folder,
        fingerprint=file_sha256(path),
        classes=list(names),
        used_classes={names[label - 1] for label in used},
        num_objects=np.array([len(objects[i]) for i, *_ in there], dtype=np.int64) - crowds,
        num_crowds=crowds,
        left_out=dict(left_out),
        missing=missing,
        records=np.frombuffer(b"".join(records), dtype=np.uint8),
        ends=np.cumsum([len(r) for r in records], dtype=np.int64),
    )


def _split_notation(data: str) -> tuple[Path, Path]:
    match = re.fullmatch(r"(.+):annotations=(.+)", data, re.DOTALL)
    if not match:
        raise UsageError(f"'{data}': expected {NOTATION}")
    folder, path = (Path(text).expanduser() for text in match.groups())
    if not folder.is_dir():
        raise UsageError(f"'{data}': no folder '{folder}'; expected {NOTATION}")
    if not path.is_file():
        raise UsageError(f"'{data}': no file '{path}'; expected {NOTATION}")
    return folder, path


def _read_lists(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"'{path}' is no COCO JSON: {first_line(error)}") from None
    except MemoryError:
        raise RunError(
            f"not enough memory to read '{path}' ({path.stat().st_size:,} bytes)"
        ) from None
    lacking = [name for name in LISTS if not isinstance(content.get(name), list)]
    if lacking:
        raise UsageError(
            f"'{path}' is no COCO JSON: expected the lists {', '.join(LISTS)}; it has no {lacking[0]}"
        )
    return content


def _entries(
    path: Path, name: str, content: dict[str, Any], read: Callable[[Any], Any]
) -> list[Any]:
    """What `read` makes of each entry of a list; one that is malformed is named."""
    found = []
    for number, entry in enumerate(content[name]):
        try:
            found.append(read(entry))
        except (KeyError, TypeError, ValueError, OverflowError, IndexError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
            raise UsageError(
                f"'{path}': entry {number} of {name} is malformed ({reason})"
            ) from None
    return found


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r:.40} is no whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r:.40} is no text")
    return value


def _image(entry: Any) -> tuple[int, str, tuple[int, int]]:
    """id, file and (height, width)."""
    height, width = _whole(entry["height"]), _whole(entry["width"])
    if min(height, width) < 1 or 3 * height * width > MAX_DECODED_BYTES:
        raise ValueError(f"{width} x {height} pixels")
    file = _text(entry["file_name"])
    pure = PurePosixPath(file)
    if pure.is_absolute() or ".." in pure.parts or "\0" in file:
        raise ValueError(f"file_name {file!r:.80} lies outside of the folder")
    return _whole(entry["id"]), file, (height, width)


def _annotation(
    entry: Any, sizes: dict[int, tuple[int, int]]
) -> tuple[int, int, tuple[tuple[float, ...], float, bool, Any] | str]:
    """Image and category, and (box, area, crowd, mask), or why the object is left out."""
    image_id, category_id = _whole(entry["image_id"]), _whole(entry["category_id"])
    if image_id not in sizes:
        return image_id, category_id, "no_image"
    height, width = sizes[image_id]
    x, y, w, h = np.array(entry["bbox"], dtype=np.float64).tolist()
    left, right = np.clip([x, x + w], 0, width).tolist()
    top, bottom = np.clip([y, y + h], 0, height).tolist()
    if not (right > left and bottom > top):  # also where a number is NaN
        return image_id, category_id, "no_area"
    area = float(entry.get("area", 0.0))
    crowd = bool(entry.get("iscrowd", 0))
    mask = entry.get("segmentation")
    if not _is_usable_mask(mask, height, width):
        return image_id, category_id, "no_mask"
    return (
        image_id,
        category_id,
        ((left, top, right, bottom), area if area > 0 else 0.0, crowd, mask),
    )


def _is_usable_mask(mask: Any, height: int, width: int) -> bool:
    """Whether a segmentation has polygons of three points or more, or an RLE of the image's size.

    pycocotools reads beyond an RLE that is too short, so its counts are added up here.
    """
    if isinstance(mask, list):
        polygons = [np.array(polygon, dtype=np.float64) for polygon in mask]
        return bool(polygons) and all(
            p.ndim == 1 and len(p) >= 6 and len(p) % 2 == 0 and bool(np.isfinite(p).all())
            for p in polygons
        )
    if not isinstance(mask, dict) or mask.get("size") != [height, width]:
        return False
    counts = mask.get("counts")
    if isinstance(counts, str):
        counts = rle_counts(counts)
    return (
        isinstance(counts, list)
        and all(isinstance(c, int) and c >= 0 for c in counts)
        and sum(counts) == height * width
    )


def rle_counts(text: str) -> list[int]:
    """The run lengths of a compressed RLE: pycocotools' rleFrString, in Python.

    Groups of five bits, lowest first, with 32 as the mark of more; from the fourth on, differences from the
    count before the last.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts if shift == 0 else [-1]  # cut within a number


def _in_folder(
    folder: Path, path: Path, images: list[tuple[int, str, tuple[int, int]]]
) -> tuple[list[tuple[int, str, tuple[int, int]]], list[str]]:
    """The images whose files are in the folder, and the names of the others. A folder is listed once."""
    listed: dict[Path, set[str]] = {}

    def exists(file: str) -> bool:
        whole = folder / file
        if whole.parent not in listed:
            listed[whole.parent] = (
                {entry.name for entry in whole.parent.iterdir()} if whole.parent.is_dir() else set()
            )
        return whole.name in listed[whole.parent]

    there = [image for image in images if exists(image[1])]
    missing = [file for _, file, _ in images if not exists(file)]
    if not there:
        example = f", such as '{missing[0]}'" if missing else ""
        raise UsageError(
            f"none of the {len(images)} images that '{path}' names is in '{folder}'{example}"
        )
    return there, missing
