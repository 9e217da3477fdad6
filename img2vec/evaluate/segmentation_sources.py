"""SEG as the user writes it, opened as pairs of an image and a mask.

    FOLDER                      images/ and annotations/ with the same file names but for the suffix
    FOLDER:split=validation     images/validation/ and annotations/validation/, as in ADEChallengeData2016
    torch/VOCSegmentation:root=FOLDER:split=val, torch/Cityscapes:root=FOLDER:split=val
    hfds/NAME:split=validation  a Hugging Face data set with a column of images and one of masks

Options for all: `ignore=255` (numbers that are not counted, joined with /), `reduce_zero_label=true` (0 is ignored
and 1 is class 0, as for ADE20K), `classes=FILE` (names of the classes).
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from img2vec.evaluate.confusion import IGNORED
from img2vec.evaluate.masks import MAX_VALUE
from tokdiv.data.datasets import image_column, image_columns, load_hugging_face
from tokdiv.data.folder import open_folder
from tokdiv.data.source import Item, Source, add_to_fingerprint, begin_fingerprint, storable
from tokdiv.errors import UsageError, first_line

COMMON = ("split", "ignore", "reduce_zero_label", "classes")
OPTIONS = {
    "folder": COMMON,
    "torch": (*COMMON, "root", "year"),
    "hfds": (*COMMON, "root", "image", "mask"),
}
ADE20K = "objectInfo150.txt"
NAMES_FILES = ("classes.txt", "id2label.json", ADE20K)
MASK_COLUMNS = ("mask", "annotation", "label", "labels", "segmentation", "semantic", "masks")
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)


@dataclass(frozen=True)
class Pairs:
    """Images and masks that belong together.

    name: SEG as it was given.
    images, masks: where they are read; image_prefix, mask_prefix: what stands before their keys in messages.
    rows: int64 (n, 2), an image's and its mask's index there.
    label_of: int32 (65536,), a number in a mask -> its label, 0 or above or IGNORED.
    classes: names from a file or from the data set's makers, in the order of their labels; None without.
    unpaired: (file, reason) of those without partner. notes: what a reader must know, one line each.
    """

    name: str
    images: Source
    masks: Source
    image_prefix: str
    mask_prefix: str
    rows: NDArray[np.int64]
    label_of: NDArray[np.int32]
    classes: list[str] | None
    unpaired: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Of the files' names and sizes, and of what their numbers mean."""
        digest = begin_fingerprint("seg", self.images.fingerprint, self.masks.fingerprint)
        digest.update(self.label_of.tobytes())
        return digest.hexdigest()

    def image_key(self, index: int) -> str:
        return self.images.key(int(self.rows[index, 0]))

    def image_name(self, index: int) -> str:
        return self.image_prefix + self.image_key(index)

    def mask_name(self, index: int) -> str:
        return self.mask_prefix + self.masks.key(int(self.rows[index, 1]))

    def read_image(self, index: int) -> Item:
        return self.images.read(int(self.rows[index, 0]))

    def read_mask(self, index: int) -> Item:
        return self.masks.read(int(self.rows[index, 1]))


def open_pairs(seg: str) -> Pairs:
    """Open SEG.

    Raises:
        UsageError: no such data, an unknown option, or no image with a mask.
    """
    base, options = _split_options(seg)
    scheme, _, rest = base.partition("/")
    openers: dict[str, Callable[[str, str, dict[str, str]], Pairs]] = {
        "torch": _open_torchvision,
        "hfds": _open_hugging_face,
    }
    kind = "folder" if os.path.lexists(os.path.expanduser(base)) else scheme.lower()
    if kind in openers and rest:
        _check_options(seg, kind, options)
        return openers[kind](seg, rest, options)
    _check_options(seg, "folder", options)
    return _open_folder(seg, base, options)


def _split_options(seg: str) -> tuple[str, dict[str, str]]:
    """`FOLDER:split=val:ignore=11` -> (`FOLDER`, {split: val, ignore: 11}); an existing path wins."""
    options: dict[str, str] = {}
    while not os.path.lexists(os.path.expanduser(seg)):
        match = re.fullmatch(r"(.+):(\w+)=([^:]*)", seg, re.DOTALL)
        if match is None:
            break
        seg, key, value = match.groups()
        options.setdefault(key, value)
    return seg, options


def _check_options(seg: str, kind: str, options: dict[str, str]) -> None:
    for key in options:
        if key not in OPTIONS[kind]:
            raise UsageError(
                f"'{seg}': unknown option :{key}=; expected one of "
                f"{', '.join(f':{name}=' for name in OPTIONS[kind])}"
            )


# Folders -----------------------------------------------------------------------------------------


def _open_folder(seg: str, base: str, options: dict[str, str]) -> Pairs:
    root = os.path.expanduser(base)
    if not os.path.isdir(root):
        raise UsageError(
            f"'{seg}': no such folder; expected FOLDER with images/ and annotations/, "
            f"torch/VOCSegmentation:root=FOLDER, torch/Cityscapes:root=FOLDER or hfds/NAME"
        )
    folders = []
    for part in ("images", "annotations"):
        folder = os.path.join(root, part)
        if not os.path.isdir(folder):
            raise UsageError(
                f"'{seg}': it has no folder {part}/; expected images/ and annotations/ with the same file names"
            )
        folders.append(_split_folder(seg, folder, options.get("split")))
    images, masks = (open_folder(folder, folder) for folder in folders)
    rows, unpaired = _paired(images, masks, *folders)
    if not len(rows):
        raise UsageError(
            f"'{seg}': none of its {images.count} images has a mask of the same name; "
            f"'{unpaired[0][0]}': {unpaired[0][1]}"
        )
    names = next((n for n in NAMES_FILES if os.path.isfile(os.path.join(root, n))), None)
    return _pairs(
        seg, options, images, masks, rows, unpaired,
        prefixes=(os.path.join(folders[0], ""), os.path.join(folders[1], "")),
        names_file=names and os.path.join(root, names),
    )  # fmt: skip


def _split_folder(seg: str, folder: str, split: str | None) -> str:
    """The folder of a split; without a split, there must be files and not only folders in it."""
    with os.scandir(folder) as entries:
        found = [e for e in entries if not e.name.startswith(".")]
    splits = sorted(entry.name for entry in found if entry.is_dir())
    if split is None:
        if splits and len(splits) == len(found):
            raise UsageError(
                f"'{seg}': {os.path.basename(folder)}/ has the splits {', '.join(splits[:6])}: name one, as "
                f"{seg}:split={splits[0]}"
            )
        return folder
    if split not in splits and not os.path.isdir(os.path.join(folder, split)):
        raise UsageError(
            f"'{seg}': {os.path.basename(folder)}/ has no split '{split}'; expected one of "
            f"{', '.join(splits[:6]) or 'none: there are no folders in it'}"
        )
    return os.path.join(folder, split)


def _paired(
    images: Source, masks: Source, image_folder: str, mask_folder: str
) -> tuple[NDArray[np.int64], list[tuple[str, str]]]:
    """Pairs with the same path but for its suffix, and the files that have no partner."""

    def by_stem(source: Source, folder: str) -> dict[str, int]:
        stems: dict[str, int] = {}
        for index in range(source.count or 0):
            key = source.key(index)
            stem = os.path.splitext(key)[0]
            if stem in stems:
                raise UsageError(
                    f"'{folder}' has both '{source.key(stems[stem])}' and '{key}': which is meant? Remove one"
                )
            stems[stem] = index
        return stems

    of_images, of_masks = by_stem(images, image_folder), by_stem(masks, mask_folder)
    rows = [(index, of_masks[stem]) for stem, index in of_images.items() if stem in of_masks]
    unpaired = [
        (os.path.join(image_folder, images.key(i)), f"no mask {stem}.png in {mask_folder}")
        for stem, i in of_images.items()
        if stem not in of_masks
    ]
    unpaired += [
        (os.path.join(mask_folder, masks.key(i)), f"no image {stem}.* in {image_folder}")
        for stem, i in of_masks.items()
        if stem not in of_images
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 2), unpaired


# Other packages' data sets -----------------------------------------------------------------------


def _open_torchvision(seg: str, rest: str, options: dict[str, str]) -> Pairs:
    """torchvision's readers find the files; the files themselves are read as everywhere."""
    from torchvision.datasets import Cityscapes, VOCSegmentation

    root = os.path.expanduser(options.get("root", "."))
    split = options.get("split", "train")
    name = rest.lower()
    classes: list[str]
    labels: dict[int, int] | None = None
    try:
        if name in ("voc", "vocsegmentation"):
            dataset = VOCSegmentation(root, year=options.get("year", "2012"), image_set=split)
            images, masks = dataset.images, dataset.masks
            classes = VOC_CLASSES.split()
        elif name == "cityscapes":
            dataset = Cityscapes(root, split=split, mode="fine", target_type="semantic")
            images, masks = dataset.images, [targets[0] for targets in dataset.targets]
            used = [c for c in Cityscapes.classes if 0 <= c.train_id < 255]
            classes = [c.name for c in sorted(used, key=lambda c: c.train_id)]
            labels = {c.id: c.train_id for c in used}  # the 19 of the benchmark
        else:
            raise UsageError(
                f"'{seg}': expected torch/VOCSegmentation or torch/Cityscapes, or a folder"
            )
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"'{seg}': torchvision cannot open it: {first_line(error)} (root '{root}', split '{split}'; nothing "
            f"is downloaded)"
        ) from None
    if not images:
        raise UsageError(f"'{seg}': no images (root '{root}', split '{split}')")
    rows = np.repeat(np.arange(len(images), dtype=np.int64)[:, None], 2, axis=1)
    return _pairs(
        seg, options, _files(seg, images, root), _files(seg, masks, root), rows, [],
        prefixes=(os.path.join(root, ""), os.path.join(root, "")), classes=classes, labels=labels,
    )  # fmt: skip


def _files(seg: str, paths: list[str], root: str) -> Source:
    keys = [storable(os.path.relpath(path, root)) for path in paths]
    digest = begin_fingerprint("files")
    for key, path in zip(keys, paths):
        add_to_fingerprint(digest, key, os.path.getsize(path) if os.path.isfile(path) else -1)
    return Source(
        name=seg,
        count=len(paths),
        fingerprint=digest.hexdigest(),
        key_of=lambda index: keys[index],
        reader=lambda index: Path(paths[index]).read_bytes(),
    )


def _open_hugging_face(seg: str, rest: str, options: dict[str, str]) -> Pairs:
    dataset = load_hugging_face(seg, rest, options)
    columns = image_columns(dataset)
    for name in ("image", "mask"):
        if options.get(name, columns[0] if columns else "") not in columns:
            raise UsageError(
                f"'{seg}': expected :{name}= to name a column of images; there are "
                f"{', '.join(columns) or 'none'}"
            )
    image = options.get("image") or ("image" if "image" in columns else columns[0])
    left = [column for column in columns if column != image]
    mask = options.get("mask") or next((c for c in MASK_COLUMNS if c in left), None)
    if mask is None and len(left) == 1:
        mask = left[0]
    if mask is None:
        raise UsageError(
            f"'{seg}': which column holds the masks? Name it with :mask=COLUMN; columns of images are "
            f"{', '.join(columns)}"
        )
    images, masks = (image_column(seg, rest, dataset, column) for column in (image, mask))
    rows = np.repeat(np.arange(images.count or 0, dtype=np.int64)[:, None], 2, axis=1)
    return _pairs(
        seg, options, images, masks, rows, [], prefixes=(f"{seg}/{image}/", f"{seg}/{mask}/")
    )


# What the numbers mean ---------------------------------------------------------------------------


def _pairs(
    seg: str,
    options: dict[str, str],
    images: Source,
    masks: Source,
    rows: NDArray[np.int64],
    unpaired: list[tuple[str, str]],
    *,
    prefixes: tuple[str, str],
    names_file: str | None = None,
    classes: list[str] | None = None,
    labels: dict[int, int] | None = None,
) -> Pairs:
    """Pairs with the meaning that the options give the masks' numbers.

    Args:
        names_file, classes: names of the classes, unless an option names another file.
        labels: a mask's numbers -> labels; all others are ignored. None: they are the labels themselves.
    """
    reduce = options.get("reduce_zero_label", "false").lower()
    if reduce not in ("true", "false"):
        raise UsageError(f"'{seg}': expected :reduce_zero_label=true or false, not '{reduce}'")
    try:
        ignored = [int(number) for number in options.get("ignore", "255").split("/")]
    except ValueError:
        ignored = [-1]
    if not all(0 <= number <= MAX_VALUE for number in ignored):
        raise UsageError(
            f"'{seg}': expected :ignore= with a number from 0 to {MAX_VALUE}, or several joined with /, as "
            f":ignore=11/255"
        )
    label_of = np.arange(MAX_VALUE + 1, dtype=np.int32)
    if labels is not None:
        label_of[:] = IGNORED
        label_of[list(labels)] = list(labels.values())
    label_of[ignored] = IGNORED
    if reduce == "true":
        label_of[label_of != IGNORED] -= 1  # 0 becomes IGNORED
    notes = []
    if "classes" in options:
        classes = read_classes(seg, os.path.expanduser(options["classes"]))
    elif names_file is not None:
        classes = read_classes(seg, names_file)
        if os.path.basename(names_file) == ADE20K and reduce == "false":
            classes = ["other", *classes]
            notes.append(
                f"'{seg}': 0 in ADE20K means other, and counts as a class; :reduce_zero_label=true leaves it out, "
                f"as papers do"
            )
    return Pairs(
        name=seg,
        images=images,
        masks=masks,
        image_prefix=prefixes[0],
        mask_prefix=prefixes[1],
        rows=rows,
        label_of=label_of,
        classes=classes,
        unpaired=unpaired,
        notes=notes,
    )


def read_classes(seg: str, path: str) -> list[str]:
    """Names of the classes from a file: a name per line, `{"0": "wall", ...}`, or ADE20K's objectInfo150.txt.

    Raises:
        UsageError: no such file, or no names in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            table: Any = json.loads(text)
            names = [str(table[str(number)]) for number in range(len(table))]
        elif os.path.basename(path) == ADE20K:
            # Idx, Ratio, Train, Val, Stuff and Name, with synonyms after a comma
            lines = [line.split("\t") for line in text.splitlines()[1:] if line.strip()]
            names = [line[-1].split(",")[0].strip() for line in lines]
        else:
            names = [line.strip() for line in text.rstrip().splitlines()]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UsageError(
            f"'{seg}': cannot read names of classes from '{path}' ({first_line(error)}); expected a text with one "
            f'name per line, or a JSON such as {{"0": "wall", "1": "floor"}}'
        ) from None
    if not names:
        raise UsageError(f"'{seg}': '{path}' is empty; expected the name of one class per line")
    return names
