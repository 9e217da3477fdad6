"""Data sets that another package reads: Hugging Face, torchvision, TensorFlow."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from tokdiv.data.source import (
    Item,
    Source,
    add_to_fingerprint,
    begin_fingerprint,
    first_line,
    storable,
    unique,
)
from tokdiv.data.stream import shuffled
from tokdiv.errors import UsageError


def open_hugging_face(data: str, rest: str, options: dict[str, str]) -> Source:
    """`hfds/NAME` or `hfds/FOLDER` (save_to_disk, parquet, image folder), with images undecoded."""
    dataset = load_hugging_face(data, rest, options)
    images = image_columns(dataset)
    if not images:
        raise UsageError(f"{data!r} has no column of images, only {', '.join(dataset.features)}")
    column = "image" if "image" in images else images[0]
    return image_column(data, rest, dataset, column)


def load_hugging_face(data: str, rest: str, options: dict[str, str]) -> Any:
    """The `datasets.Dataset` of one split."""
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{data!r} needs the package datasets: pip install tokdiv[hf]") from None

    split = options.get("split", "train")
    local = os.path.expanduser(rest)
    try:
        if os.path.isdir(local) and any(
            os.path.isfile(os.path.join(local, name))
            for name in ("state.json", "dataset_dict.json")
        ):
            dataset = datasets.load_from_disk(local)
            if isinstance(dataset, datasets.DatasetDict):
                if split not in dataset:
                    raise ValueError(f"Unknown split {split!r}. Should be one of {list(dataset)}.")
                dataset = dataset[split]
        else:
            # Before datasets 4, not saying so would ask at the terminal whether to run a script.
            old = int(datasets.__version__.split(".")[0]) < 4
            trust = {"trust_remote_code": False} if old else {}
            name = local if os.path.isdir(local) else rest
            dataset = datasets.load_dataset(
                name, split=split, cache_dir=options.get("root"), **trust
            )
    except Exception as error:
        raise UsageError(f"{data!r}: {first_line(error)}") from error
    return dataset


def image_columns(dataset: Any) -> list[str]:
    """Names of a data set's columns that hold images."""
    import datasets

    return [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]


def image_column(data: str, rest: str, dataset: Any, column: str) -> Source:
    """One column of images as a Source, undecoded, with the data set's labels where it has some."""
    import datasets
    import pyarrow.compute

    features, local = dataset.features, os.path.expanduser(rest)
    kinds = {name: kind for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    label = next((name for name in ("label", "labels", *kinds) if name in kinds), None)
    labels = None if label is None else np.asarray(dataset.with_format("numpy")[label][:], np.int64)
    classes = None if label is None else list(kinds[label].names)
    dataset = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    names: list[str | None] = []
    sizes: list[int | None] = []
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        structure = table.column(column)
        names += pyarrow.compute.struct_field(structure, "path").to_pylist()
        content = pyarrow.compute.struct_field(structure, "bytes")
        sizes += pyarrow.compute.binary_length(content).to_pylist()
    if os.path.isdir(local):
        names = [name and _below(name, local) for name in names]
    keys = None
    if any(names):
        keys = unique(storable(name or str(index)) for index, name in enumerate(names))
    digest = begin_fingerprint("hfds")
    for index, size in enumerate(sizes):
        add_to_fingerprint(digest, keys[index] if keys else "", -1 if size is None else size)

    def read(index: int) -> bytes:
        image = dataset[index][column] or {}
        if image.get("bytes"):
            return image["bytes"]
        if not image.get("path"):
            raise OSError("the data set holds no image in this row")
        with open(image["path"], "rb") as file:
            return file.read()

    return Source(
        name=data,
        count=len(sizes),
        fingerprint=digest.hexdigest(),
        labels=labels,
        classes=classes,
        key_of=lambda index: keys[index] if keys else str(index),
        reader=read,
    )


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
        except (SyntaxError, ValueError, EOFError) as error:  # Pillow's, of a damaged file
            raise OSError(first_line(error)) from error
        return image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))

    classes = getattr(dataset, "classes", None)
    return Source(
        name=data,
        count=len(dataset),
        fingerprint=digest.hexdigest(),
        labels=labels,
        classes=None if classes is None else [str(name) for name in classes],
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
