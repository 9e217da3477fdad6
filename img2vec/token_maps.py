"""Token maps: what a student predicts for a few images, beside the teacher's tokens, as colors."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from img2vec.checkpoint import load_model_state
from img2vec.config import Config
from img2vec.masking import draw_mask, split_indices
from img2vec.model import make_model, make_student
from img2vec.resume import load_last
from img2vec.targets import make_targets, resize_view
from tokdiv.data.decode import UnusableImage, center_view, decode_image
from tokdiv.data.loader import permutation
from tokdiv.data.open import open_source
from tokdiv.data.source import Item, Source
from tokdiv.dist import choose_device
from tokdiv.errors import UsageError
from tokdiv.teachers.load import load_teacher
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher

NUM_IMAGES = 4
NUM_TRIED = 10 * NUM_IMAGES  # images that are read to find so many usable ones


@dataclass(frozen=True)
class TokenMaps:
    """A few images, the teacher's tokens and the predicted ones.

    Attributes:
        keys: n names.
        views: uint8 (n, S, S, 3).
        seen: bool (n, rows, columns) on the grid of mask units, True where the student saw the image.
        targets, predictions: float (n, rows, columns, 3), colors in [0, 1]; predictions are NaN where the student
            saw the image.
    """

    keys: list[str]
    views: NDArray[np.uint8]
    seen: NDArray[np.bool_]
    targets: NDArray[np.float64]
    predictions: NDArray[np.float64]


@torch.no_grad()
def token_maps(
    out: Path,
    run: dict[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    teacher: Teacher | None = None,
    source: Source | None = None,
) -> TokenMaps:
    """Predict the tokens of the first usable images of DATA, in an order drawn from the run's seed.

    Args:
        out: the folder of a pretraining. run: its config.json.
        weights, teacher, source: by default, what `run` names is loaded.

    Raises:
        UsageError: there is no checkpoint, or DATA or the teacher cannot be opened again.
        RunError: the teacher's weights have changed.
    """
    config = Config.from_dict(run["config"])
    if teacher is None:
        spec = TeacherSpec.from_dict(run["teacher"])
        device = choose_device(config.device)
        teacher = load_teacher(spec, image_size=config.image_size, device=device)
    device = teacher.mean.device
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
        model = make_model(encoder, teacher, config).to(device).eval()
    layout = model.layout
    load_model_state(model, dict(weights), out)

    keys, images = _read_views(source, config)
    images = images.to(device)
    drawn = [draw_mask(layout, config.seed, 0, n) for n in range(len(keys))]
    masks = torch.from_numpy(np.stack(drawn)).to(device)
    # A compiled teacher would be compiled anew for a batch of this size.
    with torch.compiler.set_stance("force_eager"):
        tokens = teacher(resize_view(images, teacher.size))
    targets = make_targets(tokens, teacher.grid, layout, config.target_norm)
    predicted = model(images, masks).tokens.float()
    shown, predicted_colors = colors_of(targets, predicted, split_indices(masks, layout)[2])
    return TokenMaps(
        keys,
        images.permute(0, 2, 3, 1).cpu().numpy(),
        ~masks.unflatten(1, layout.units).cpu().numpy(),
        shown.reshape(-1, *layout.targets, 3),
        predicted_colors.reshape(-1, *layout.targets, 3),
    )


def _read_views(source: Source, config: Config) -> tuple[list[str], Tensor]:
    """Names and uint8 (n, 3, S, S) views of the first usable images.

    Raises:
        UsageError: none of the images tried can be used.
    """
    keys, views = [], []
    for key, item in itertools.islice(_items(source, config.seed), NUM_TRIED):
        try:
            views.append(center_view(decode_image(item), config.image_size))
        except UnusableImage:
            continue
        keys.append(key)
        if len(keys) == NUM_IMAGES:
            break
    if not keys:
        raise UsageError("none of the images tried can be used")
    return keys, torch.stack(views)


def _items(source: Source, seed: int) -> Iterator[tuple[str, Item]]:
    """Names and encoded images of DATA, in an order drawn from the seed."""
    if not source.permutable or source.count is None:
        yield from source.stream(seed)
        return
    for index in permutation(source.count, seed)[:NUM_TRIED].tolist():
        try:
            yield source.key(index), source.read(index)
        except OSError:
            continue


def colors_of(
    targets: Tensor, predicted: Tensor, masked: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The first three principal components of the teacher's tokens as colors, and the predictions in the same.

    The components are those of all images' tokens together. Each is scaled so that 2% of the teacher's tokens lie
    beyond either end.

    Args:
        targets: (B, T, C), the teacher's tokens.
        predicted: (B, M, C), the predictions at the masked positions.
        masked: int64 (B, M), indices of the masked positions.

    Returns:
        Two arrays (B, T, 3) in [0, 1]; the second is NaN where nothing was predicted.
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
        missing = 3 - found.shape[-1]  # with fewer tokens or channels than three
        return np.pad(found, [(0, 0)] * (found.ndim - 1) + [(0, missing)], constant_values=0.5)

    shown = colored(targets)
    predicted_colors = np.full(shown.shape, np.nan)
    predicted_colors[np.arange(len(shown))[:, None], masked.cpu().numpy()] = colored(predicted)
    return shown, predicted_colors
