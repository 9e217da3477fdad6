"""The curve of a training: a list of lines, and TensorBoard's events with the same numbers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Line = dict[str, Any]  # with `step`


@contextmanager
def recorded(folder: Path | None, history: list[Line]) -> Iterator[Callable[[Line], None]]:
    """A function that adds a line to the history and, where there is a folder, to TensorBoard's events.

    Older events of the folder are replaced by those of the history: after an interruption, a run goes on from its
    checkpoint, and what it recorded after that comes again.
    """
    if folder is None:
        yield history.append
        return
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as events:

        def write(line: Line) -> None:
            for name, value in line.items():
                if name != "step":
                    events.add_scalar(f"train/{name}", value, line["step"])

        def record(line: Line) -> None:
            history.append(line)
            write(line)

        for line in history:
            write(line)
        yield record


def write_metrics(folder: Path, metrics: Mapping[str, float | None], step: int) -> None:
    """Add a run's last evaluation to its events."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as events:
        for name, value in metrics.items():
            if value is not None:
                events.add_scalar(f"val/{name}", value, step)
