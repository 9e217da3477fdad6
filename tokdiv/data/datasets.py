"""Data sets that another package reads: Hugging Face, torchvision, TensorFlow."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokdiv.data.decode import UnusableImage
from tokdiv.data.source import (
    Item,
    Source,
    add_to_fingerprint,
    begin_fingerprint,
    check_encoded,
    read_file,
    storable,
    unique,
)
from tokdiv.data.stream import shuffled
from tokdiv.errors import UsageError, first_line

ON_DISK = ("state.json", "dataset_dict.json")  # what save_to_disk leaves
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "category", "fine_label")


def is_hugging_face_folder(path: str) -> bool:
    """Whether a folder holds what `datasets` wrote: save_to_disk or Parquet."""
    folder = Path(path)
    parquet = (*folder.glob("*.parquet"), *folder.glob("data/*.parquet"))
    return any((folder / name).is_file() for name in ON_DISK) or bool(parquet)


def open_hugging_face(data: str, rest: str, options: dict[str, str]) -> Source:
    """`hfds/NAME` or `hfds/FOLDER` (save_to_disk, parquet, image folder), with images undecoded."""
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{data!r} needs the package datasets: pip install tokdiv[hf]") from None
    local = os.path.expanduser(rest)
    split = options.get("split", "train")
    try:
        dataset = _load_hugging_face(rest, local, split, options.get("root"))
    except Exception as error:
        raise UsageError(f"{data!r}: {first_line(error)}") from error
    if not len(dataset):
        raise UsageError(f"{data!r} holds no images: the split {split!r} has no rows")
    notes: list[str] = []
    column = _image_column(data, dataset, notes)
    labels, classes = _labels_of(dataset)
    try:
        dataset = dataset.select_columns([column])
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    except Exception as error:
        raise UsageError(
            f"{data!r}: its column '{column}' does not hold images: {first_line(error)}"
        ) from error
    names, sizes = _names_and_sizes(dataset, column)
    if os.path.isdir(local):
        names = [name and _below(name, local) for name in names]
    keys = None
    if any(names):
        keys = unique(storable(name or str(index)) for index, name in enumerate(names))
    digest = begin_fingerprint("hfds")
    for index, size in enumerate(sizes):
        add_to_fingerprint(digest, keys[index] if keys else "", -1 if size is None else size)

    def read(index: int) -> Item:
        if (size := sizes[index]) is not None:
            check_encoded(size)
        try:
            image = dataset[index][column] or {}
        except (OSError, MemoryError):
            raise
        except Exception as error:  # of a damaged file
            raise UnusableImage(f"cannot be read: {first_line(error)}") from error
        if image.get("bytes"):
            return image["bytes"]
        if not image.get("path"):
            raise UnusableImage("the data set holds no image in this row")
        return read_file(image["path"])

    return Source(
        name=data,
        count=len(sizes),
        fingerprint=digest.hexdigest(),
        labels=labels,
        classes=classes,
        warnings=notes,
        key_of=lambda index: keys[index] if keys else str(index),
        reader=read,
    )


def _load_hugging_face(name: str, local: str, split: str, root: str | None) -> Any:
    import datasets

    if not any(os.path.isfile(os.path.join(local, file)) for file in ON_DISK):
        # Before datasets 4, not saying so would ask at the terminal whether to run a script.
        old = int(datasets.__version__.split(".")[0]) < 4
        trust = {"trust_remote_code": False} if old else {}
        name = local if os.path.isdir(local) else name
        return datasets.load_dataset(name, split=split, cache_dir=root, **trust)
    try:
        found = datasets.load_from_disk(local)
    except IndexError:  # saved without a row, it has no files
        return []
    if not isinstance(found, datasets.DatasetDict):
        found = {split.partition("[")[0]: found}  # without splits: it is the one asked for
    # As load_dataset reads it: train, train[:80%], train+test.
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(
        {n: len(d) for n, d in found.items()}
    )
    rows = [found[part.splitname].select(range(part.from_, part.to)) for part in parts]
    rows = [part for part in rows if len(part)]
    return datasets.concatenate_datasets(rows) if rows else []


def _image_column(data: str, dataset: Any, notes: list[str]) -> str:
    """The column of images: by its type, then by its name. Parquet files of others have binary columns."""
    import datasets

    def holds_bytes(kind: Any) -> bool:
        if isinstance(kind, dict):
            return "bytes" in kind
        return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")

    features = dataset.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    images = images or [name for name, kind in features.items() if holds_bytes(kind)]
    if not images:
        raise UsageError(f"{data!r} has no column of images, only {', '.join(features)}")
    column = next((name for name in IMAGE_COLUMNS if name in images), images[0])
    if len(images) > 1:
        notes.append(
            f"{data}: of the columns {', '.join(images)}, the images of '{column}' are used"
        )
    return column


def _labels_of(dataset: Any) -> tuple[np.ndarray | None, list[str] | None]:
    """int64 labels, -1 where one is missing, and names: of a ClassLabel, of integers, or of texts."""
    import datasets

    kinds = dict(dataset.features)
    class_labels = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    values = [name for name in LABEL_COLUMNS if isinstance(kinds.get(name), datasets.Value)]
    named = [name for name in LABEL_COLUMNS if name in class_labels]
    label = next(iter([*named, *class_labels, *values]), None)
    if label is None:
        return None, None
    column = dataset.with_format("arrow")[label][:]
    texts = kinds[label].dtype in ("string", "large_string")
    if not texts and not kinds[label].dtype.startswith(("int", "uint")):
        return None, None
    found = column.to_pylist()
    if texts:
        classes = sorted({text for text in found if text is not None})
        number = {text: index for index, text in enumerate(classes)}
        numbers = [-1 if text is None else number[text] for text in found]
        return np.array(numbers, np.int64), [storable(name) for name in classes]
    if any(value is not None and value >= 2**63 for value in found):
        return None, None
    labels = np.array([-1 if value is None else value for value in found], np.int64)
    return labels, list(kinds[label].names) if label in class_labels else None


def _names_and_sizes(dataset: Any, column: str) -> tuple[list[str | None], list[int | None]]:
    import pyarrow.compute

    names: list[str | None] = []
    sizes: list[int | None] = []
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        structure = table.column(column)
        names += pyarrow.compute.struct_field(structure, "path").to_pylist()
        content = pyarrow.compute.struct_field(structure, "bytes")
        sizes += pyarrow.compute.binary_length(content).to_pylist()
    return names, sizes


def _below(path: str, root: str) -> str:
    """The path below root, or its last part where it lies elsewhere."""
    inside = os.path.relpath(path, root) if os.path.isabs(path) else path
    return os.path.basename(path) if inside.startswith("..") else inside


def open_torchvision(data: str, rest: str, options: dict[str, str]) -> Source:
    """`torch/NAME:root=FOLDER`: a torchvision data set that is on disk already (never downloaded)."""
    root = os.path.expanduser(options.get("root", "."))
    split = options.get("split", "train")
    dataset = _timm_dataset(data, f"torch/{rest}", root, split)
    labels = _int_labels(getattr(dataset, "targets", None), len(dataset))
    digest = begin_fingerprint("torch", rest, split)
    add_to_fingerprint(digest, "", len(dataset))
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())

    def read(index: int) -> Item:
        try:
            image = dataset[index][0]
        except MemoryError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UnusableImage(f"cannot be decoded: {first_line(error)}") from error
        return image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))

    classes = getattr(dataset, "classes", None)
    return Source(
        name=data,
        count=len(dataset),
        fingerprint=digest.hexdigest(),
        labels=labels,
        classes=None if classes is None else [storable(str(name)) for name in classes],
        key_of=str,
        reader=read,
    )


def open_iterable(data: str, rest: str, options: dict[str, str]) -> Source:
    """`tfds/NAME`, `hfids/NAME`: what timm reads as a stream, shuffled through a buffer."""
    scheme = data.partition("/")[0].lower()
    split = options.get("split", "train")
    more: dict[str, Any] = {}
    if (size := options.get("num_samples")) is not None:
        if scheme != "hfids" or not size.isdecimal() or int(size) < 1:
            raise UsageError(f"{data!r}: expected hfids/NAME:num_samples=N with N of 1 or more")
        more["num_samples"] = int(size)

    def dataset() -> Any:
        return _timm_dataset(data, f"{scheme}/{rest}", options.get("root"), split, **more)

    first = dataset()
    try:
        count = len(first) or None
    except TypeError:
        count = None

    def samples(seed: int) -> Iterator[tuple[str, Item]]:
        images = ((str(number), sample[0]) for number, sample in enumerate(dataset()))
        return shuffled(images, seed)

    digest = begin_fingerprint(scheme, rest, split)
    add_to_fingerprint(digest, "", -1 if count is None else count)
    return Source(
        name=data,
        count=count,
        fingerprint=digest.hexdigest(),
        permutable=False,
        open_stream=samples,
    )


def _timm_dataset(data: str, name: str, root: str | None, split: str, **more: Any) -> Any:
    import timm.data

    try:
        return timm.data.create_dataset(name, root=root, split=split, download=False, **more)
    except ImportError as error:
        package = error.name or str(error)
        raise UsageError(f"{data!r} needs the package {package}: pip install {package}") from error
    except Exception as error:  # each of these packages fails in its own way
        raise UsageError(
            f"{data!r} cannot be opened: {first_line(error)} (root {root!r}, split {split!r}; "
            f"change them with :root=FOLDER and :split=NAME, give :num_samples=N to hfids; nothing is downloaded)"
        ) from error


def _int_labels(targets: Any, count: int) -> np.ndarray | None:
    try:
        labels = np.asarray(targets)
    except ValueError:
        return None
    return (
        labels.astype(np.int64) if labels.shape == (count,) and labels.dtype.kind in "iu" else None
    )
