"""Images with classes, and two sets of them that agree on what the classes are."""

from dataclasses import dataclass

import numpy as np

from tokdiv.data.loader import Source
from tokdiv.data.open import open_source
from tokdiv.errors import UsageError

_REMEDY = "give class folders (DATA/CLASS/image.jpg), .tar shards with .cls members, or hfds/ with a label"


@dataclass(frozen=True)
class LabeledData:
    """Images of a source, with the number of the class of each.

    source: where they are read.
    indices: int64 (n,), of the images in the source.
    labels: int64 (n,), 0 to num_classes - 1.
    classes: the names, in the order of their numbers; digits where the source has only numbers.
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

    def take(self, rows: np.ndarray) -> "LabeledData":
        """The images of these rows."""
        return LabeledData(self.source, self.indices[rows], self.labels[rows], self.classes)


def labeled(source: Source) -> LabeledData:
    """All images of a source that has classes; raises UsageError where it has none."""
    if not source.permutable:
        raise UsageError(
            f"'{source.name}' is a stream, whose classes are not known beforehand: an evaluation needs "
            f"them; {_REMEDY}"
        )
    if source.labels is None:
        raise UsageError(f"'{source.name}' has no classes, which an evaluation needs: {_REMEDY}")
    labels = np.asarray(source.labels, dtype=np.int64)
    if len(labels) and labels.min() < 0:
        missing = int((labels < 0).sum())
        raise UsageError(
            f"'{source.name}': {missing} of {len(labels)} images have no class (a negative label), as in "
            f"a test split; name a split with classes"
        )
    classes = source.classes or [str(number) for number in range(int(labels.max()) + 1)]
    return LabeledData(source, np.arange(len(labels), dtype=np.int64), labels, list(classes))


def open_labeled(train: str, val: str) -> tuple[LabeledData, LabeledData]:
    """Open the images to learn from and those to measure on; classes are matched by name.

    Args:
        train, val: DATA as `tokdiv.data.loader.open_source` takes it, with classes.

    Returns:
        Both, labeled with the numbers of train's classes.

    Raises:
        UsageError: no classes, only one, or classes in `val` that `train` lacks.
    """
    learn, measure = labeled(open_source(train)), labeled(open_source(val))
    if learn.num_classes < 2:
        raise UsageError(
            f"'{train}' has one class only ('{learn.classes[0]}'): an evaluation needs two or more"
        )
    numbers = {name: number for number, name in enumerate(learn.classes)}
    used = np.unique(measure.labels)
    unknown = [measure.classes[number] for number in used if measure.classes[number] not in numbers]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UsageError(
            f"'{val}' has classes that '{train}' lacks: {', '.join(unknown[:3])}{more}; classes are "
            f"matched by name"
        )
    to_train = np.zeros(len(measure.classes), dtype=np.int64)
    for number in used:
        to_train[number] = numbers[measure.classes[number]]
    matched = LabeledData(measure.source, measure.indices, to_train[measure.labels], learn.classes)
    return learn, matched


def split_labeled(
    source: Source, fraction: float = 0.2, seed: int = 0
) -> tuple[LabeledData, LabeledData]:
    """Split one labeled source into images to learn from and a `fraction` to measure on, class by class.

    A class with a single image stays in the first part.
    """
    everything = labeled(source)
    kept, held_out = split_rows(everything.labels, fraction, seed)
    return everything.take(kept), everything.take(held_out)


def split_rows(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending rows kept and held out: of each class, round(fraction * n) but never all."""
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        held_out[rows[: min(len(rows) - 1, round(fraction * len(rows)))]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
