"""Images with classes, and two sets of them that agree on what the classes are."""

from dataclasses import dataclass

import numpy as np

from tokdiv.data.loader import Source
from tokdiv.data.open import open_source
from tokdiv.errors import UsageError

REMEDY = "give class folders (DATA/CLASS/image.jpg), .tar shards with .cls members, or hfds/ with a label"


@dataclass(frozen=True)
class LabeledData:
    """Images of a source with their class numbers.

    source: where the images are read.
    indices: int64 (n,), of the images in the source.
    labels: int64 (n,), 0 to num_classes - 1.
    classes: class names, in the order of their numbers; digits where the source has only numbers.
    """

    source: Source
    indices: np.ndarray
    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def take(self, positions: np.ndarray) -> "LabeledData":
        """The images at these positions."""
        return LabeledData(
            self.source, self.indices[positions], self.labels[positions], self.classes
        )


def labeled(source: Source) -> LabeledData:
    """All images of a source that has classes; raises UsageError where it has none."""
    if not source.permutable:
        raise UsageError(
            f"'{source.name}' is a stream, whose classes are not known in advance, and an evaluation "
            f"needs them: {REMEDY}"
        )
    if source.labels is None:
        raise UsageError(f"'{source.name}' has no classes, which an evaluation needs: {REMEDY}")
    labels = np.asarray(source.labels, dtype=np.int64)
    if len(labels) and labels.min() < 0:
        missing = int((labels < 0).sum())
        raise UsageError(
            f"'{source.name}': {missing} of {len(labels)} images have no class (a negative label), as in "
            f"a test split; name a split with classes"
        )
    classes = source.classes
    if classes is None:
        # Only the numbers that occur: they may be identifiers around 1e9.
        numbers, labels = np.unique(labels, return_inverse=True)
        classes = [str(number) for number in numbers]
    return LabeledData(source, np.arange(len(labels), dtype=np.int64), labels, list(classes))


def open_labeled(train: str, val: str) -> tuple[LabeledData, LabeledData]:
    """Open train and val data; classes are matched by name.

    Args:
        train, val: DATA as `tokdiv.data.open_source` takes it, with classes.

    Returns:
        Both data sets, labeled with the class numbers of `train`.

    Raises:
        UsageError: no classes, only one, or classes in `val` that `train` lacks.
    """
    train_data, val_data = labeled(open_source(train)), labeled(open_source(val))
    if train_data.num_classes < 2:
        raise UsageError(
            f"'{train}' has one class only ('{train_data.classes[0]}'): an evaluation needs two or more"
        )
    numbers = {name: number for number, name in enumerate(train_data.classes)}
    used = np.unique(val_data.labels)
    unknown = [
        name for name in (val_data.classes[number] for number in used) if name not in numbers
    ]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UsageError(
            f"'{val}' has classes that '{train}' lacks: {', '.join(unknown[:3])}{more}; classes are "
            f"matched by name"
        )
    train_numbers = np.zeros(len(val_data.classes), dtype=np.int64)
    for number in used:
        train_numbers[number] = numbers[val_data.classes[number]]
    labels = train_numbers[val_data.labels]
    return train_data, LabeledData(val_data.source, val_data.indices, labels, train_data.classes)


def split_labeled(
    source: Source, fraction: float = 0.2, seed: int = 0
) -> tuple[LabeledData, LabeledData]:
    """Split a labeled source into train data and a `fraction` of val data, class by class.

    A class with a single image is train data.
    """
    data = labeled(source)
    kept, held_out = split_labels(data.labels, fraction, seed)
    return data.take(kept), data.take(held_out)


def split_labels(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending positions kept and held out: round(fraction * n) of each class, but never all of it."""
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held_out[members[: min(len(members) - 1, round(fraction * len(members)))]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
