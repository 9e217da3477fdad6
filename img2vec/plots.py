"""The loss of a run as a picture."""

import json
from pathlib import Path


def plot_loss(metrics: Path, path: Path) -> None:
    """Draw `metrics.jsonl`: the losses, and where measured the k-NN accuracy, over the steps.

    The file appears whole or not at all. Without a finite loss nothing is drawn.
    """
    from matplotlib.figure import Figure

    from tokdiv.plots import save_figure

    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.strip()]
    losses = [line for line in lines if line.get("loss") is not None]
    if not losses:
        return
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    steps = [line["step"] for line in losses]
    names = {"loss": "loss", "patch_loss": "patch", "global_loss": "global"}
    colours = {"loss": "#222222", "patch_loss": "#0072B2", "global_loss": "#E69F00"}
    for key, label in names.items():
        values = [line[key] for line in losses]
        if any(values):  # a global loss that is turned off is 0 throughout
            axes.plot(steps, values, color=colours[key], alpha=0.25, linewidth=0.8)
            axes.plot(steps, _smoothed(values), color=colours[key], linewidth=1.4, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("smooth L1")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", frameon=False)
    measured = [line for line in lines if line.get("knn_accuracy") is not None]
    if measured:
        right = axes.twinx()
        right.plot(
            [line["step"] for line in measured],
            [100 * line["knn_accuracy"] for line in measured],
            color="#009E73",
            marker="o",
            markersize=3.5,
            linewidth=1.0,
        )
        right.set_ylabel("k-NN accuracy (%)", color="#009E73")
    save_figure(figure, path)


def _smoothed(values: list[float]) -> list[float]:
    """A running mean over about a fiftieth of the run, so that the trend shows through the noise."""
    weight = 2 / (1 + max(1.0, len(values) / 50))
    result, mean = [], values[0]
    for value in values:
        mean += weight * (value - mean)
        result.append(mean)
    return result
