"""Results of an evaluation, as files and as a short table."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokdiv.run_dir import write_atomic, write_error

SCHEMA = 1


@dataclass(frozen=True)
class Results:
    """Results of one evaluation.

    Attributes:
        task: "knn", "probe", "finetune" or "detect".
        model: as it was given.
        metrics: accuracies and average precisions in [0, 1] (top1, top1_k20, box_ap50), and the task's other
            metrics; None for what the data do not determine.
        settings: the settings as they were used.
        data: train and val: name, fingerprint, images used and skipped; number of classes.
        notes: what a reader must know, one line each.
        history: one entry per epoch, for tasks that have epochs.
        by_class: one entry per class, for tasks that evaluate each.
    """

    task: str
    model: str
    metrics: Mapping[str, float | None]
    settings: dict[str, Any]
    data: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    by_class: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> str:
        """A few lines for the terminal: accuracies in percent, the data, the notes."""
        width = max(len(name) for name in self.metrics)
        train, val = self.data["train"], self.data["val"]
        lines = [f"{self.task} of {self.model}"]
        for name, value in self.metrics.items():
            lines.append(f"  {name:<{width}}  {_shown(name, value)}")
        skipped = train["skipped"] + val["skipped"]
        lines.append(
            f"  {val['images']:,} images, {self.data['classes']:,} classes; training images: "
            f"{train['images']:,}" + (f"; {skipped:,} unusable" if skipped else "")
        )
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def write(self, folder: str | Path) -> None:
        """Write results.json and results.csv.

        Raises:
            RunError: the folder cannot be written to, or the disk is full.
        """
        folder = Path(folder)
        content = {"schema": SCHEMA, **asdict(self)}
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        common = {"task": self.task, "model": self.model, **self.settings, **_flat(self.data)}
        writer.writerow(["metric", "value", *common])
        for name, value in self.metrics.items():
            writer.writerow([name, value, *(_cell(entry) for entry in common.values())])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(folder, error) from None
        write_atomic(folder / "results.json", json.dumps(content, indent=2) + "\n")
        write_atomic(folder / "results.csv", rows.getvalue())


def describe_data(train: Any, val: Any, train_skipped: int, val_skipped: int) -> dict[str, Any]:
    """`Results.data`, from two LabeledData and the numbers of their unusable images."""

    def side(data: Any, skipped: int) -> dict[str, Any]:
        return {
            "name": data.source.name,
            "fingerprint": data.source.fingerprint,
            "images": len(data) - skipped,
            "skipped": skipped,
        }

    return {
        "train": side(train, train_skipped),
        "val": side(val, val_skipped),
        "classes": train.num_classes,
    }


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "       \N{EN DASH}"
    is_share = name.startswith(("top", "box_ap", "mask_ap"))
    return f"{100 * value:6.2f} %" if is_share else f"{value:8.4g}"


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(
            _flat(value, f"{prefix}{key}_") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
