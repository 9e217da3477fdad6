"""Write OUT/report.html: what a pretraining did, on one page that loads nothing.

Only the token maps need more than OUT: the teacher, and a few images of DATA. Where those are not on this machine,
the page says so.
"""

import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor

from img2vec.figures import Lines, loss_figure, predictions_figure, read_metrics, watch_figure
from img2vec.log import METRICS, SKIPPED
from img2vec.token_maps import TokenMaps, token_maps
from tokdiv.data.source import Source
from tokdiv.errors import RunError, UsageError, first_line
from tokdiv.report.page import (
    MAX_SKIPPED,
    NARROW,
    Command,
    inline_figure,
    read_skipped,
    render,
    repeat_command,
)
from tokdiv.run_dir import CONFIG, read_json, write_atomic
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher

REPORT = "report.html"


def write_report(
    out: str | Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    teacher: Teacher | None = None,
    source: Source | None = None,
) -> Path:
    """Write OUT/report.html.

    Args:
        out: the folder that `img2vec pretrain` wrote.
        weights, teacher, source: what `pretrain` holds at its end; by default, what OUT names is loaded. A teacher
            made by the user's own code has to be given.

    Returns:
        The path of the page.

    Raises:
        UsageError: `out` is not the folder of a pretraining.
        RunError: the disk is full or not writable.
    """
    out = Path(out)
    run, lines = _read_run(out), read_metrics(out / METRICS)
    steps = [line for line in lines if "loss" in line]
    measured = [line for line in lines if line.get("knn_accuracy") is not None]
    finite = [line for line in steps if line["loss"] is not None]
    skipped = read_skipped(out / SKIPPED)
    maps, without_maps = _draw_maps(out, run, weights, teacher, source)
    page = render(
        "pretraining.html",
        "img2vec",
        run=run,
        settings=run["config"],
        teacher=run["teacher"],
        steps=len(steps),
        epochs=steps[-1]["epoch"] + 1 if steps else 0,
        first=finite[0] if finite else None,
        last=finite[-1] if finite else None,
        measured=measured,
        best=max(measured, key=lambda line: line["knn_accuracy"], default=None),
        similarity=[line for line in lines if line.get("token_similarity") is not None],
        rate=statistics.median(line["images_per_second"] for line in steps) if steps else None,
        skipped_steps=steps[-1].get("skipped_steps", 0) if steps else 0,
        skipped=skipped[:MAX_SKIPPED],
        num_skipped=len(skipped),
        losses=_draw_losses(lines, finite, measured) if finite else None,
        watch=_draw_watch(lines, steps) if steps else None,
        maps=maps,
        without_maps=without_maps,
        repeat=_pretrain_command(out, run),
        evaluate=_evaluate_commands(out),
        load=_load_command(out, run),
        exported=(out / "student").is_dir(),
    )
    write_atomic(out / REPORT, page)
    return out / REPORT


def _read_run(out: Path) -> dict[str, Any]:
    """OUT/config.json."""
    try:
        run = read_json(out / CONFIG)
        if {"config", "teacher", "data"} <= set(run) and (out / METRICS).is_file():
            return run
    except (OSError, ValueError):
        pass
    raise UsageError(f"'{out}' holds no run of img2vec pretrain")


# Figures -----------------------------------------------------------------------------------------


def _draw_losses(lines: Lines, finite: Lines, measured: Lines) -> Markup:
    alt = f"Losses over the steps: from {finite[0]['loss']:.4f} to {finite[-1]['loss']:.4f}."
    if measured:
        alt += " Below them the k-NN accuracy: " + ", ".join(
            f"{100 * line['knn_accuracy']:.1f}% at step {line['step']}" for line in measured[-5:]
        )
    return inline_figure(
        loss_figure(lines),
        alt,
        "Thin: every step, or the mean and range of neighboring steps. Thick: their running mean.",
        narrow=loss_figure(lines, NARROW),
    )


def _draw_watch(lines: Lines, steps: Lines) -> Markup:
    return inline_figure(
        watch_figure(lines),
        f"Learning rate, images per second and token similarity over {len(steps)} steps.",
        "Images/s includes everything between two steps, such as reading images.",
        narrow=watch_figure(lines, NARROW),
    )


def _draw_maps(
    out: Path,
    run: dict[str, Any],
    weights: Mapping[str, Tensor] | None,
    teacher: Teacher | None,
    source: Source | None,
) -> tuple[dict[str, Any] | None, str]:
    """The figure of the token maps and the names of its images; or None, and why there is none."""
    try:
        maps = token_maps(out, run, weights, teacher, source)
    except (UsageError, RunError, OSError) as error:
        return None, f"The page has no token maps: {error}."
    except Exception as error:  # of a user's own module, of a device
        return None, f"The page has no token maps: {type(error).__name__}: {first_line(error)}"
    figure = inline_figure(
        _maps_figure(maps, 6.5),
        f"{len(maps.keys)} images, each beside what the student sees of it, the teacher's tokens and the "
        f"predicted tokens, as colors.",
        "Gray: masked, not seen by the student. White: seen, so not predicted.",
        narrow=_maps_figure(maps, NARROW),
        image_format="png",
        dpi=200,
    )
    return {"figure": figure, "names": maps.keys}, ""


def _maps_figure(maps: TokenMaps, width: float) -> Figure:
    return predictions_figure(maps.views, maps.seen, maps.targets, maps.predictions, width)


# Commands ----------------------------------------------------------------------------------------


def _pretrain_command(out: Path, run: dict[str, Any]) -> Command:
    """The command line of the run, or the call from Python where it was started from there."""
    if (given := repeat_command(run, "img2vec")) is not None:
        return given
    custom = TeacherSpec.from_dict(run["teacher"]).is_custom
    teacher = "teacher" if custom else "TeacherSpec.from_dict(run['teacher'])"
    note = "From Python, as the run was started. The same out continues the run; another starts a new one."
    if custom:
        note += " The teacher is made by your own code."
    imports = "import json\nimport img2vec\n" + (
        "" if custom else "from tokdiv import TeacherSpec\n"
    )
    return Command(
        f"{imports}\nrun = json.load(open({str(out / CONFIG)!r}))\n"
        f"img2vec.pretrain(\n    {run['data']['source']!r},\n    {teacher},\n    {str(out)!r},\n"
        f"    config=img2vec.Config.from_dict(run['config']),\n)",
        note,
    )


def _evaluate_commands(out: Path) -> Command:
    commands = [
        ["img2vec", task, str(out), "--train", "TRAIN", "--val", "VAL", "-o", f"{out}-{task}"]
        for task in ("knn", "probe", "finetune")
    ]
    return Command(
        "\n".join(map(shlex.join, commands)),
        "TRAIN and VAL stand for class folders, or any other data with classes.",
    )


def _load_command(out: Path, run: dict[str, Any]) -> Command:
    mean, std = (", ".join(map(str, run["config"][key])) for key in ("mean", "std"))
    return Command(
        f"import timm\n\nmodel = timm.create_model({f'local-dir:{out}/student'!r}, pretrained=True)",
        f"It takes images normalized with mean {mean} and std {std}.",
    )
