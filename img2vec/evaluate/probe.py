"""Linear classification of frozen features: MAE's linear probe; a quick one is in `logistic`."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from img2vec.evaluate.augment import crop_and_flip, training_steps
from img2vec.evaluate.encoder import load_encoder
from img2vec.evaluate.features import (
    Features,
    check_positive,
    default_workers,
    enough_memory,
    exact_device,
    extract_features,
    gather_rows,
    process,
)
from img2vec.evaluate.labeled import LabeledData, open_labeled
from img2vec.evaluate.logistic import fit_logistic
from img2vec.evaluate.optimization import Lars, learning_rate, warmup_remark
from img2vec.evaluate.results import Results, describe_data
from tokdiv.errors import RunError, UsageError
from tokdiv.teachers.teacher import Teacher

SOLVERS = ("lars", "lbfgs")
# LARS moves a weight by at most lr * trust * |w| / (1 - momentum) a step. Where the sum of this over the
# training is below twice |w|, the classifier still shows its random start; 4 is enough.
ENOUGH_MOVEMENT, GOOD_MOVEMENT = 2.0, 4.0
HIGHEST_RATE = 30.0  # above, a step exceeds a third of the weights' norm, and the loss grows


def probe(
    model: str | Path | Teacher,
    train: str,
    val: str,
    out: str | Path | None = None,
    *,
    solver: str = "lars",
    epochs: int = 90,
    batch_size: int = 16384,
    blr: float = 0.1,
    lr: float | None = None,
    warmup_epochs: float = 10,
    penalty: float | None = None,
    feature: str = "mean",
    image_size: int | None = None,
    encode_batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
) -> Results:
    """Accuracy of a linear classifier on frozen features.

    `solver="lars"` is MAE's recipe (arXiv 2111.06377, app. A.1): BatchNorm without affine parameters, a
    linear layer, LARS without weight decay, random resized crops and flips, cosine with warm-up.
    `solver="lbfgs"` fits the same classifier to features of the center views until the gradient vanishes.

    Args:
        model, feature, image_size, device, dtype: see `load_encoder`.
        train, val: DATA with classes.
        out: folder for results.json and results.csv; None writes nothing.
        epochs, warmup_epochs: of "lars".
        batch_size: of "lars", of all processes together; at most the number of training images.
        blr: base learning rate of "lars": lr = blr * batch_size / 256. lr: instead of it.
        penalty: of "lbfgs": the factor of half the squared weights beside the mean cross-entropy; None
            chooses among powers of ten on a fifth of the training images.
        encode_batch_size: images in a forward pass of one process.
        workers: decoding threads of one process; None for one per core.
        seed: of the order, the augmentation, the classifier's start and the fifth held out.

    Returns:
        top1, and top5 where there are five classes or more, in [0, 1], of the last state.

    Raises:
        UsageError, RunError: see `load_encoder`, `open_labeled`, `extract_features`.
    """
    if solver not in SOLVERS:
        raise UsageError(f"--solver {solver}: expected one of {', '.join(SOLVERS)}")
    check_positive(epochs=epochs, batch_size=batch_size, encode_batch_size=encode_batch_size)
    learn, measure = open_labeled(train, val)
    encoder = load_encoder(
        model, feature=feature, image_size=image_size, device=device, dtype=dtype
    )
    place = encoder.mean.device
    workers = default_workers() if workers is None else workers

    def features_of(data: LabeledData, description: str) -> Features:
        return extract_features(
            encoder,
            data,
            encoder.size,
            batch_size=encode_batch_size,
            workers=workers,
            device=place,
            description=description,
        )

    queries = features_of(measure, "features of val")
    settings: dict[str, Any] = {
        "solver": solver,
        "feature": feature,
        "image_size": encoder.size,
        "dim": encoder.dim,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "seed": seed,
    }
    history: list[dict[str, float]] = []
    notes: list[str] = []
    if solver == "lbfgs":
        bank = features_of(learn, "features of train")
        skipped = bank.skipped
        classifier, fitted = fit_logistic(
            bank, learn.num_classes, penalty, seed, exact_device(place)
        )
        settings.update(fitted)
        if not fitted["converged"]:
            notes.append(
                f"L-BFGS stopped before the optimum (a gradient of {fitted['gradient']:.1g} is left): give a "
                f"stronger --penalty than {fitted['penalty']:g}"
            )
    else:
        used = min(batch_size, len(learn))
        peak = blr * used / 256 if lr is None else lr
        settings.update(
            {
                "epochs": epochs,
                "warmup_epochs": warmup_epochs,
                "batch_size": used,
                "blr": blr,
                "lr": peak,
            }
        )
        notes += warmup_remark(warmup_epochs, epochs)
        if used < batch_size:
            notes.append(f"batch of {used}: the training images are fewer than {batch_size}")
        classifier, skipped, history = _train_lars(
            encoder,
            learn,
            epochs=epochs,
            warmup_epochs=warmup_epochs,
            batch_size=used,
            peak=peak,
            encode_batch_size=encode_batch_size,
            workers=workers,
            seed=seed,
        )
        moved = _movement(peak, epochs, len(learn) // used)
        if moved < ENOUGH_MOVEMENT:
            better = peak * GOOD_MOVEMENT / moved
            remedy = (
                f"--lr {better:.2g}" if better < HIGHEST_RATE else "--epochs and --lr above these"
            )
            notes.append(
                f"with {len(learn)} images this recipe, made for a million, moves the classifier's weights by "
                f"at most {moved:.2g} times their norm and leaves it untrained: give {remedy}, or --solver "
                f"lbfgs"
            )
    metrics = accuracy(_logits(classifier, queries.features), queries.labels)
    results = Results(
        task="probe",
        model=encoder.name,
        metrics=metrics,
        settings=settings,
        data=describe_data(learn, measure, skipped, queries.skipped),
        notes=notes,
        history=history,
    )
    if out is not None and process()[0] == 0:
        results.write(out)
    return results


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The shares of images whose class scores highest, and (from five classes on) among the top five."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    right = ranked == labels[:, None].to(ranked.device)
    metrics = {"top1": int(right[:, 0].sum()) / len(labels)}
    if logits.shape[1] >= 5:
        metrics["top5"] = int(right.sum()) / len(labels)
    return metrics


def _logits(classifier: nn.Module, features: Tensor) -> Tensor:
    classifier.eval()
    weight = next(classifier.parameters())
    with torch.no_grad():
        return torch.cat([classifier(rows.to(weight)).cpu() for rows in features.split(65_536)])


def _movement(peak: float, epochs: int, num_steps: int) -> float:
    """An upper bound of how far LARS can move the weights, as a share of their norm."""
    defaults = Lars([torch.zeros(1)]).defaults
    reach = defaults["trust"] / (1 - defaults["momentum"])
    return 0.5 * peak * reach * epochs * num_steps  # a cosine's mean is half its peak


def _train_lars(
    encoder: Teacher,
    data: LabeledData,
    *,
    epochs: int,
    warmup_epochs: float,
    batch_size: int,
    peak: float,
    encode_batch_size: int,
    workers: int,
    seed: int,
) -> tuple[nn.Module, int, list[dict[str, float]]]:
    """The trained classifier, how many images could not be used, and the loss of each epoch.

    Each process encodes its part of a batch; the features are gathered, and every process takes the same
    step on the whole batch. The classifier is a thousandth of the work, and so the statistics of the
    BatchNorm and the result do not depend on the number of processes.
    """
    device = encoder.mean.device
    classifier = batchnorm_linear(encoder.dim, data.num_classes, seed).to(device)
    optimizer = Lars(classifier.parameters())
    rank, _ = process()
    unusable: set[int] = set()
    history: list[dict[str, float]] = []
    steps = training_steps(
        data,
        crop_and_flip(encoder.size),
        batch_size=batch_size,
        micro_batch_size=encode_batch_size,
        epochs=epochs,
        seed=seed,
        workers=workers,
        pin_memory=device.type == "cuda",
    )
    losses: list[Tensor] = []
    total = epochs * (len(data) // batch_size)
    bar = tqdm(steps, total=total, desc="probe", unit="step", disable=None if rank == 0 else True)
    for step in bar:
        parts = [torch.empty(0, encoder.dim, device=device)]
        indices = [torch.empty(0, dtype=torch.int64)]
        for batch in step.batches:
            if len(batch.images):
                with enough_memory("--encode-batch-size", encode_batch_size):
                    images = batch.images.to(device, non_blocking=True)
                    parts.append(encoder(images).float().mean(dim=1))
            indices.append(batch.indices)
            unusable.update(batch.skipped)
        features = torch.cat(parts)
        rows = gather_rows(torch.cat(indices), device).to(device)
        features = gather_rows(features, device).to(device)
        order = rows.argsort()  # the same sums whatever the number of processes
        if len(order) < 2:
            raise RunError(
                f"'{data.source.name}': a batch of {batch_size} had {len(order)} usable images: too many are "
                f"damaged, or the batch is too small"
            )
        labels = torch.from_numpy(data.labels)[rows.cpu()].to(device)
        progress = step.epoch + step.step / step.num_steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                progress, peak=peak, epochs=epochs, warmup_epochs=warmup_epochs
            )
        classifier.train()
        loss = F.cross_entropy(classifier(features[order]), labels[order])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step.step + 1 == step.num_steps:
            mean_loss = float(torch.stack(losses).mean())
            losses.clear()
            history.append({"epoch": step.epoch, "loss": mean_loss})
            bar.set_postfix(epoch=step.epoch, loss=f"{mean_loss:.3f}")
    gone = gather_rows(torch.tensor(sorted(unusable), dtype=torch.int64), device)
    return classifier, len(gone.unique()), history


def batchnorm_linear(dim: int, num_classes: int, seed: int) -> nn.Sequential:
    """BatchNorm without affine parameters, and a linear layer with weights of deviation 0.01."""
    linear = nn.utils.skip_init(nn.Linear, dim, num_classes)  # its own start draws globally
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
        linear.bias.zero_()
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear)
