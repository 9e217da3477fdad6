"""DIR/predictions.png and DIR/report.html: what a segmentation found, on one page that needs nothing else."""

import csv
import io
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from torch import Tensor

from img2vec.evaluate.results import Results
from img2vec.evaluate.segmentation_figures import class_colors, loss_figure, predictions_figure
from tokdiv.errors import first_line
from tokdiv.figures.style import save_figure
from tokdiv.report.page import MAX_SKIPPED, NARROW, inline_figure, render, repeat_command
from tokdiv.run_dir import write_atomic
from tokdiv.versions import versions

log = logging.getLogger(__name__)

PREDICTIONS, REPORT, SKIPPED_FILE = "predictions.png", "report.html", "skipped.csv"
MISTAKES = 10  # the most frequent confusions that the page names


@dataclass(frozen=True)
class Example:
    """A validation image with its prediction: key, image uint8 (H, W, 3), labels and predicted (H, W)."""

    key: str
    image: NDArray[np.uint8]
    labels: NDArray[np.integer]
    predicted: NDArray[np.integer]


def write_skipped(folder: Path, skipped: Sequence[tuple[str, str]]) -> None:
    """DIR/skipped.csv, where anything was skipped; an older one goes."""
    if not skipped:
        (folder / SKIPPED_FILE).unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("key", "reason"), *skipped])
    write_atomic(folder / SKIPPED_FILE, text.getvalue())


def write_report(
    folder: Path,
    results: Results,
    confusion: Tensor,
    examples: list[Example],
    skipped: Sequence[tuple[str, str]],
    world: int,
) -> None:
    """Write predictions.png and report.html. A failure here is only a warning: the results are complete.

    Args:
        skipped: (file, reason). world: number of processes.
    """
    try:
        _write_report(folder, results, confusion, examples, skipped, world)
    except Exception as error:
        log.warning("no %s: %s: %s", REPORT, type(error).__name__, first_line(error))


def _write_report(
    folder: Path,
    results: Results,
    confusion: Tensor,
    examples: list[Example],
    skipped: Sequence[tuple[str, str]],
    world: int,
) -> None:
    classes = [row["name"] for row in results.by_class]

    def draw(width: float) -> Any:
        return predictions_figure(
            [e.image for e in examples],
            [e.labels for e in examples],
            [e.predicted for e in examples],
            classes,
            width,
        )

    figure = draw(6.5)
    save_figure(figure, folder / PREDICTIONS)
    colors = ["#{:02x}{:02x}{:02x}".format(*color) for color in class_colors(len(classes))]
    labeled = max(1, sum(row["pixels"] for row in results.by_class))
    page = render(
        "segmentation.html",
        "img2vec",
        results=results,
        metrics=results.metrics,
        rows=[
            {**row, "color": colors[row["number"]], "share": row["pixels"] / labeled}
            for row in results.by_class
        ],
        predictions=inline_figure(
            figure,
            f"{len(examples)} validation images, each beside its ground truth, the prediction, and where that is "
            f"wrong.",
            "Error: red is wrong, gray is right. White has no label.",
            narrow=draw(NARROW),
            image_format="png",
            dpi=200,
        ),
        keys=[example.key for example in examples],
        mistakes=most_frequent_mistakes(confusion, classes),
        losses=_losses(results.history),
        skipped=skipped[:MAX_SKIPPED],
        num_skipped=len(skipped),
        repeat=repeat_command({"command": sys.argv, "world": world}, "img2vec"),
        versions=versions(),
    )
    write_atomic(folder / REPORT, page.encode("utf-8", "backslashreplace"))


def most_frequent_mistakes(confusion: Tensor, classes: list[str]) -> list[dict[str, Any]]:
    """The true and predicted class of the most pixels predicted wrongly, with their share of the true class."""
    wrong = confusion.clone()
    wrong.fill_diagonal_(0)
    counts, order = wrong.flatten().sort(descending=True, stable=True)
    true_pixels = confusion.sum(dim=1)
    found = []
    for count, place in zip(counts[:MISTAKES].tolist(), order[:MISTAKES].tolist()):
        true, predicted = divmod(place, len(classes))
        if count:
            share = count / int(true_pixels[true])
            found.append({"true": classes[true], "predicted": classes[predicted], "share": share})
    return found


def _losses(history: list[dict[str, Any]]) -> Markup | None:
    if len(history) < 2:
        return None
    return inline_figure(
        loss_figure(history),
        f"Loss over the steps: from {history[0]['loss']:.4f} to {history[-1]['loss']:.4f}.",
        narrow=loss_figure(history, NARROW),
    )
