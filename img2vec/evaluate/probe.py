"""Linear classification of frozen features: MAE's linear probe, or the quick one in `logistic`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img2vec.evaluate.augment import TrainingStep, crop_and_flip, training_steps
from img2vec.evaluate.encoder import load_encoder
from img2vec.evaluate.features import (
    Features,
    enough_memory,
    extract_features,
    float64_device,
)
from img2vec.evaluate.labeled import LabeledData, open_labeled
from img2vec.evaluate.logistic import fit_logistic
from img2vec.evaluate.results import Results, describe_data
from img2vec.evaluate.settings import ProbeSettings, peak_lr, warmup_note
from img2vec.optim import learning_rate
from tokdiv.data.source import storable
from tokdiv.dist import Processes, current_processes, default_workers
from tokdiv.errors import RunError
from tokdiv.progress import progress_bar
from tokdiv.teachers.teacher import Teacher

MOMENTUM, TRUST = 0.9, 0.001  # of LARS
# LARS moves a weight by at most lr * TRUST * |w| / (1 - MOMENTUM) per step. Where this sums up to less than
# 2 |w| over the training, the classifier still shows its random start; 4 is enough.
ENOUGH_MOVEMENT, GOOD_MOVEMENT = 2.0, 4.0
HIGHEST_RATE = 30.0  # above, a step exceeds a third of the weights' norm, and the loss grows


@dataclass
class Fit:
    """A trained classifier, the number of unusable training images, and what to report."""

    classifier: nn.Module
    skipped: int
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)


def probe(
    model: str | Path | Teacher,
    train: str,
    val: str,
    out: str | Path | None = None,
    **options: Any,
) -> Results:
    """Accuracy of a linear classifier on frozen features.

    `solver="lars"` is MAE's recipe (arXiv 2111.06377, app. A.1): BatchNorm without affine parameters, a
    linear layer, LARS without weight decay, random resized crops and flips, cosine with warm-up.
    `solver="lbfgs"` fits the same classifier to features of the center views until the gradient vanishes.

    Args:
        model: see `load_encoder`.
        train, val: DATA with classes.
        out: folder for results.json and results.csv; None writes nothing.
        options: fields of `ProbeSettings`.

    Returns:
        top1, and top5 where there are five classes or more, in [0, 1], of the last state.

    Raises:
        UsageError, RunError: see `load_encoder`, `open_labeled`, `extract_features`.
    """
    settings = ProbeSettings(**options)
    train_data, val_data = open_labeled(train, val)
    encoder = load_encoder(
        model,
        feature=settings.feature,
        image_size=settings.image_size,
        device=settings.device,
        dtype=settings.dtype,
    )
    group = current_processes(encoder.mean.device)
    queries = _features(encoder, val_data, settings, "features of val")
    fit = _fit_lbfgs if settings.solver == "lbfgs" else _fit_lars
    fitted = fit(encoder, train_data, settings, group)
    results = Results(
        task="probe",
        model=storable(encoder.name),
        metrics=accuracy(_logits(fitted.classifier, queries.features), queries.labels),
        settings={
            "solver": settings.solver,
            "feature": settings.feature,
            "image_size": encoder.size,
            "dim": encoder.dim,
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "seed": settings.seed,
            **fitted.settings,
        },
        data=describe_data(train_data, val_data, fitted.skipped, queries.skipped),
        notes=fitted.notes,
        history=fitted.history,
    )
    if out is not None:
        group.on_first(lambda: results.write(out))
    return results


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares of images whose class has the highest logit, and (from five classes on) one of the top five."""
    right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None].to(logits.device)
    metrics = {"top1": int(right[:, 0].sum()) / len(labels)}
    if logits.shape[1] >= 5:
        metrics["top5"] = int(right.sum()) / len(labels)
    return metrics


def _logits(classifier: nn.Module, features: Tensor) -> Tensor:
    classifier.eval()
    weight = next(classifier.parameters())
    with torch.no_grad():
        return torch.cat([classifier(rows.to(weight)).cpu() for rows in features.split(65_536)])


def _features(
    encoder: Teacher, data: LabeledData, settings: ProbeSettings, description: str
) -> Features:
    return extract_features(
        encoder,
        data,
        encoder.size,
        batch_size=settings.encode_batch_size,
        workers=settings.workers,
        device=encoder.mean.device,
        description=description,
    )


def _fit_lbfgs(
    encoder: Teacher, data: LabeledData, settings: ProbeSettings, group: Processes
) -> Fit:
    """Logistic regression on the features of the center views; every process computes the same."""
    bank = _features(encoder, data, settings, "features of train")
    classifier, fitted = fit_logistic(
        bank, data.num_classes, settings.penalty, settings.seed, float64_device(group.device)
    )
    fit = Fit(classifier, bank.skipped, fitted)
    if not fitted["converged"]:
        fit.notes.append(
            f"L-BFGS stopped before the optimum (a gradient of {fitted['gradient']:.1g} is left): give a "
            f"stronger --penalty than {fitted['penalty']:g}"
        )
    return fit


# LARS --------------------------------------------------------------------------------------------


def _fit_lars(
    encoder: Teacher, data: LabeledData, settings: ProbeSettings, group: Processes
) -> Fit:
    """MAE's recipe.

    Each process encodes its part of a batch; the features are gathered, and every process takes the same
    step on the whole batch. The classifier is a thousandth of the work, and so BatchNorm's statistics and
    the result do not depend on the number of processes.
    """
    batch_size = min(settings.batch_size, len(data))
    peak = peak_lr(settings, batch_size)
    classifier = batchnorm_linear(encoder.dim, data.num_classes, settings.seed).to(group.device)
    optimizer = make_lars(classifier)
    unusable: set[int] = set()
    losses: list[Tensor] = []
    history: list[dict[str, float]] = []
    steps = training_steps(
        data,
        crop_and_flip(encoder.size),
        batch_size=batch_size,
        micro_batch_size=settings.encode_batch_size,
        epochs=settings.epochs,
        seed=settings.seed,
        workers=default_workers() if settings.workers is None else settings.workers,
        pin_memory=group.device.type == "cuda",
    )
    bar = progress_bar(
        steps,
        total=settings.epochs * (len(data) // batch_size),
        desc="probe",
        unit="step",
        show=group.rank == 0,
    )
    for step in bar:
        features, indices, skipped = _encode(encoder, step, settings)
        unusable.update(skipped)
        indices = group.gather_rows(indices)
        features = group.gather_rows(features).to(group.device)
        if len(indices) < 2:
            raise RunError(
                f"'{data.source.name}': a batch of {batch_size} had {len(indices)} usable images: too many are "
                f"damaged, or the batch is too small"
            )
        order = indices.argsort()  # the same sums for any number of processes
        labels = torch.from_numpy(data.labels)[indices[order]].to(group.device)
        epoch = step.epoch + step.step / step.num_steps
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(epoch, settings.epochs, settings.warmup_epochs, peak)
        classifier.train()
        loss = F.cross_entropy(classifier(features[order.to(group.device)]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step.step + 1 == step.num_steps:
            mean_loss = float(torch.stack(losses).mean())
            losses.clear()
            history.append({"epoch": step.epoch, "loss": mean_loss})
            bar.set_postfix(epoch=step.epoch, loss=f"{mean_loss:.3f}")
    gone = group.gather_rows(torch.tensor(sorted(unusable), dtype=torch.int64))
    used = {
        "epochs": settings.epochs,
        "warmup_epochs": settings.warmup_epochs,
        "batch_size": batch_size,
        "blr": settings.blr,
        "lr": peak,
    }
    notes = _lars_notes(settings, batch_size, peak, len(data))
    return Fit(classifier, len(gone.unique()), used, notes, history)


def _encode(
    encoder: Teacher, step: TrainingStep, settings: ProbeSettings
) -> tuple[Tensor, Tensor, list[int]]:
    """Features (n, C), indices (n,) of this process's usable images, and the indices of unusable ones."""
    device = encoder.mean.device
    features = [torch.empty(0, encoder.dim, device=device)]
    indices = [torch.empty(0, dtype=torch.int64)]
    skipped: list[int] = []
    for batch in step.batches:
        if len(batch.images):
            with enough_memory("--encode-batch-size", settings.encode_batch_size):
                images = batch.images.to(device, non_blocking=True)
                features.append(encoder(images).float().mean(dim=1))
        indices.append(batch.indices)
        skipped += batch.skipped
    return torch.cat(features), torch.cat(indices), skipped


def batchnorm_linear(dim: int, num_classes: int, seed: int) -> nn.Sequential:
    """BatchNorm without affine parameters, and a linear layer with initial weights of deviation 0.01."""
    linear = nn.utils.skip_init(
        nn.Linear, dim, num_classes
    )  # its own init draws from the global generator
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
        linear.bias.zero_()
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear)


def make_lars(classifier: nn.Module) -> torch.optim.Optimizer:
    """LARS (You et al., arXiv 1708.03888) on weights, momentum SGD on biases, no decay, as in MAE.

    For a weight w with gradient g, at learning rate lr:

        v <- MOMENTUM * v + TRUST * |w| / |g| * g      (g itself where either norm is 0)
        w <- w - lr * v
    """
    from timm.optim import Lars

    weights = [p for p in classifier.parameters() if p.ndim > 1]
    biases = [p for p in classifier.parameters() if p.ndim <= 1]
    return Lars(
        # Without always_adapt, timm scales only parameters with weight decay.
        [{"params": weights, "always_adapt": True}, {"params": biases}],
        lr=0.0,
        momentum=MOMENTUM,
        trust_coeff=TRUST,
        eps=0.0,
    )


def _lars_notes(
    settings: ProbeSettings, batch_size: int, peak: float, num_images: int
) -> list[str]:
    """What to know about a recipe that was made for a million images."""
    notes = warmup_note(settings.warmup_epochs, settings.epochs)
    if batch_size < settings.batch_size:
        notes.append(
            f"batch of {batch_size}: the training images are fewer than {settings.batch_size}"
        )
    # An upper bound, in norms of the weights; a cosine's mean is half its peak.
    steps = settings.epochs * (num_images // batch_size)
    moved = 0.5 * peak * TRUST / (1 - MOMENTUM) * steps
    if moved < ENOUGH_MOVEMENT:
        better = peak * GOOD_MOVEMENT / moved if moved else HIGHEST_RATE
        remedy = f"--lr {better:.2g}" if better < HIGHEST_RATE else "--epochs and --lr above these"
        notes.append(
            f"with {num_images} images this recipe, made for a million, moves the classifier's weights by "
            f"at most {moved:.2g} times their norm and leaves it untrained: give {remedy}, or --solver "
            f"lbfgs"
        )
    return notes
