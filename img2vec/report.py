"""OUT/report.html: what a pretraining did, on one page that needs nothing else.

All of it comes from OUT, but for the token maps: they need the last weights, the teacher, and a few images
of DATA. Where those are not to be had, the page says so and does without.
"""

import itertools
import json
import shlex
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from img2vec.checkpoint import load_last, load_model_state
from img2vec.config import Config
from img2vec.figures import loss_figure, predictions_figure, read_metrics, watch_figure
from img2vec.log import METRICS
from img2vec.log import SKIPPED as SKIPPED_FILE
from img2vec.masking import draw_mask, plan_layout, split_indices
from img2vec.model import Img2Vec, make_student
from img2vec.targets import make_targets
from tokdiv.data.loader import Source, UnusableImage, center_view, decode_image, permutation
from tokdiv.data.open import open_source
from tokdiv.data.source import Item
from tokdiv.dist import choose_device
from tokdiv.errors import RunError, UsageError
from tokdiv.report.page import NARROW, SKIPPED, inline_figure, read_skipped, render, repeat_command
from tokdiv.run_dir import write_atomic
from tokdiv.teachers.load import load_teacher
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher

REPORT = "report.html"
IMAGES = 4  # whose tokens are shown


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
        weights, teacher, source: what `pretrain` has in its hands at its end; by default all is loaded
            from what OUT names. A teacher made by code of the user's own has to be given.

    Raises:
        UsageError: no OUT of a pretraining.
    """
    out = Path(out)
    run, lines = _read_run(out), read_metrics(out / METRICS)
    steps = [line for line in lines if "loss" in line]
    measured = [line for line in lines if line.get("knn_accuracy") is not None]
    similarity = [line for line in lines if line.get("token_similarity") is not None]
    finite = [line for line in steps if line["loss"] is not None]
    skipped = read_skipped(out / SKIPPED_FILE)
    pictures, without = _pictures(out, run, weights, teacher, source)
    page = render(
        "pretraining.html",
        "img2vec",
        run=run,
        settings=run["config"],
        teacher=run["teacher"],
        steps=len(steps),
        epochs=_epochs(steps),
        first=finite[0] if finite else None,
        last=finite[-1] if finite else None,
        measured=measured,
        best=max(measured, key=lambda line: line["knn_accuracy"]) if measured else None,
        similarity=similarity,
        rate=statistics.median(line["images_per_second"] for line in steps) if steps else None,
        skipped_steps=steps[-1].get("skipped_steps", 0) if steps else 0,
        skipped=skipped[:SKIPPED],
        num_skipped=len(skipped),
        losses=_losses(lines, finite, measured) if finite else None,
        watch=_watch(lines, steps) if steps else None,
        pictures=pictures,
        without=without,
        again=_again(out, run),
        evaluate=_evaluate(out, run),
        load=f"import timm\n\nmodel = timm.create_model({f'local-dir:{out}/student'!r}, pretrained=True)",
        exported=(out / "student").is_dir(),
    )
    # A name that is no Unicode is shown with its bytes spelled out.
    write_atomic(out / REPORT, page.encode("utf-8", "backslashreplace"))
    return out / REPORT


def _read_run(out: Path) -> dict[str, Any]:
    try:
        run = json.loads((out / "config.json").read_text(encoding="utf-8"))
        if {"config", "teacher", "data"} <= set(run) and (out / METRICS).is_file():
            return run
    except (OSError, ValueError, TypeError):
        pass
    raise UsageError(f"'{out}' holds no run of img2vec pretrain")


def _epochs(steps: list[dict[str, Any]]) -> int:
    return steps[-1]["epoch"] + 1 if steps else 0


# Figures -----------------------------------------------------------------------------------------


def _losses(
    lines: list[dict[str, Any]], finite: list[dict[str, Any]], measured: list[dict[str, Any]]
) -> Markup:
    alt = f"Losses over the steps: from {finite[0]['loss']:.4f} to {finite[-1]['loss']:.4f}."
    caption = (
        "Thin: every step, or the mean and range of neighboring ones. Thick: their running mean."
    )
    if measured:
        alt += " Below them the k-NN accuracy: " + ", ".join(
            f"{100 * line['knn_accuracy']:.1f}% at step {line['step']}" for line in measured[-5:]
        )
    return inline_figure(loss_figure(lines), alt, caption, narrow=loss_figure(lines, NARROW))


def _watch(lines: list[dict[str, Any]], steps: list[dict[str, Any]]) -> Markup:
    return inline_figure(
        watch_figure(lines),
        f"Learning rate, images per second and token similarity over {len(steps)} steps.",
        "Images/s counts all that happens between two steps, reading included.",
        narrow=watch_figure(lines, NARROW),
    )


# Token maps --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenMaps:
    """A few images with what the student makes of them.

    keys: n names. views: uint8 (n, S, S, 3). seen: bool (n, rows, columns) of the mask units. targets,
    predictions: float (n, rows, columns, 3) in [0, 1]; predictions are NaN where the student saw the image.
    """

    keys: list[str]
    views: NDArray[np.uint8]
    seen: NDArray[np.bool_]
    targets: NDArray[np.float64]
    predictions: NDArray[np.float64]


def _pictures(
    out: Path,
    run: dict[str, Any],
    weights: Mapping[str, Tensor] | None,
    teacher: Teacher | None,
    source: Source | None,
) -> tuple[dict[str, Any] | None, str]:
    """The figure of token maps and the names of its images, or None and why there is none."""
    try:
        maps = _token_maps(out, run, weights, teacher, source)
    except (UsageError, RunError, OSError) as error:
        return None, f"The page has no token maps: {error}."
    except Exception as error:  # of a user's own module, of a device: the page goes without
        reason = str(error).strip().split("\n")[0]
        return None, f"The page has no token maps: {type(error).__name__}: {reason}"

    def draw(width: float) -> Figure:
        return predictions_figure(
            maps.views, maps.seen, maps.targets, maps.predictions, width=width
        )

    figure = inline_figure(
        draw(6.5),
        f"{len(maps.keys)} images, each beside what the student sees of it, the teacher's tokens and the "
        f"predicted tokens, as colors.",
        "Gray: hidden from the student. White: seen by it, so not predicted.",
        narrow=draw(NARROW),
        image_format="png",
        dpi=200,
    )
    return {"figure": figure, "keys": maps.keys}, ""


@torch.no_grad()
def _token_maps(
    out: Path,
    run: dict[str, Any],
    weights: Mapping[str, Tensor] | None,
    teacher: Teacher | None,
    source: Source | None,
) -> TokenMaps:
    config = Config.from_dict(run["config"])
    device = choose_device(config.device) if teacher is None else teacher.mean.device
    if teacher is None:
        teacher = load_teacher(
            TeacherSpec.from_dict(run["teacher"]), image_size=config.image_size, device=device
        )
    if weights is None:
        found = load_last(out)
        if found is None:
            raise UsageError(f"'{out}' holds no checkpoint")
        weights = found[1]["model"]
    if source is None:
        source = open_source(run["data"]["source"])
        if source.fingerprint != run["data"]["fingerprint"]:
            raise UsageError(f"'{source.name}' holds other images now than those of the run")
    with torch.random.fork_rng(devices=[]):
        encoder = make_student(config)
        layout = plan_layout(
            config.image_size,
            encoder.patch_embed.patch_size[0],
            config.mask_unit,
            config.mask_ratio,
            teacher.grid,
            config.align,
            teacher.name,
        )
        model = Img2Vec(encoder, layout, teacher.dim, config).to(device).eval()
    load_model_state(model, dict(weights), out)

    keys, views = [], []
    for key, item in itertools.islice(_items(source, config.seed), 10 * IMAGES):
        try:
            views.append(center_view(decode_image(item), config.image_size))
            keys.append(key)
        except UnusableImage:
            continue
        if len(views) == IMAGES:
            break
    if not views:
        raise UsageError("none of the images tried can be used")
    images = torch.stack(views).to(device)
    masks = torch.from_numpy(
        np.stack([draw_mask(layout, config.seed, 0, n) for n in range(len(views))])
    ).to(device)
    from img2vec.train import resized

    # Compiled for the batches of the run, the teacher would be compiled anew for this one.
    with torch.compiler.set_stance("force_eager"):
        targets = make_targets(
            teacher(resized(images, teacher.size)), teacher.grid, layout, config.target_norm
        )
    predicted = model(images, masks).tokens.float()
    shown, guessed = colors_of(targets, predicted, split_indices(masks, layout)[2])
    grid = layout.targets
    return TokenMaps(
        keys,
        images.permute(0, 2, 3, 1).cpu().numpy(),
        ~masks.unflatten(1, layout.units).cpu().numpy(),
        shown.reshape(-1, *grid, 3),
        guessed.reshape(-1, *grid, 3),
    )


def colors_of(
    targets: Tensor, predicted: Tensor, masked: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The first three principal components of the teacher's tokens, as colors, and predictions in the same.

    The components are those of all the images' tokens together; each is stretched so that 2% of the
    teacher's tokens lie beyond either end.

    Args:
        targets: (B, T, C). predicted: (B, M, C) of the hidden ones. masked: int64 (B, M), which those are.

    Returns:
        Two (B, T, 3) in [0, 1]; the second is NaN where nothing was predicted.
    """
    # To the CPU first: MPS has no float64.
    targets, predicted = targets.cpu().double(), predicted.cpu().double()
    tokens = targets.flatten(0, 1)
    mean = tokens.mean(dim=0)
    axes = torch.linalg.svd(tokens - mean, full_matrices=False).Vh[:3]
    # A component's sign is arbitrary: its largest entry is made positive, so that colors repeat.
    largest = axes.abs().argmax(dim=1, keepdim=True)
    axes = axes * axes.gather(1, largest).sign()
    components = (tokens - mean) @ axes.T
    low, high = torch.quantile(components, torch.tensor([0.02, 0.98]).double(), dim=0)
    scale = (high - low).clamp_min(1e-12)

    def colored(values: Tensor) -> NDArray[np.float64]:
        found = (((values - mean) @ axes.T - low) / scale).clamp(0, 1).numpy()
        missing = 3 - found.shape[-1]  # fewer tokens or channels than three
        return np.pad(found, [(0, 0)] * (found.ndim - 1) + [(0, missing)], constant_values=0.5)

    shown = colored(targets)
    guessed = np.full(shown.shape, np.nan)
    rows = np.arange(len(shown))[:, None]
    guessed[rows, masked.cpu().numpy()] = colored(predicted)
    return shown, guessed


def _items(source: Source, seed: int) -> Iterator[tuple[str, Item]]:
    """Images of DATA in an order that the seed determines, undecoded."""
    if not source.permutable or source.count is None:
        yield from source.stream(seed)
        return
    for index in permutation(source.count, seed)[: 10 * IMAGES].tolist():
        try:
            yield source.key(index), source.read(index)
        except OSError:
            continue


# Commands ----------------------------------------------------------------------------------------


def _again(out: Path, run: dict[str, Any]) -> dict[str, str]:
    """How to go on with the run, or to repeat it."""
    if (given := repeat_command(run, "img2vec")) is not None:
        return given
    own = TeacherSpec.from_dict(run["teacher"]).is_custom
    teacher = "teacher" if own else "TeacherSpec.from_dict(run['teacher'])"
    said = "From Python, as the run was started. The same out goes on where that run stands; another begins anew."
    if own:
        said += " The teacher is made by code of your own."
    text = (
        "import json\nimport img2vec\n"
        + ("" if own else "from tokdiv import TeacherSpec\n")
        + f"\nrun = json.load(open({str(out / 'config.json')!r}))\n"
        f"img2vec.pretrain(\n    {run['data']['source']!r},\n    {teacher},\n    {str(out)!r},\n"
        f"    config=img2vec.Config.from_dict(run['config']),\n)"
    )
    return {"text": text, "said": said}


def _evaluate(out: Path, run: dict[str, Any]) -> str:
    return "\n".join(
        shlex.join(
            ["img2vec", task, str(out), "--train", "TRAIN", "--val", "VAL", "-o", f"{out}-{task}"]
        )
        for task in ("knn", "probe", "finetune")
    )
