"""LARS against hand computation, L-BFGS against the optimum's conditions, the probe end to end."""

import json

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy.special import logsumexp

from img2vec.evaluate import probe
from img2vec.evaluate.logistic import logistic_regression
from img2vec.evaluate.probe import accuracy, batchnorm_linear, make_lars
from img2vec.evaluate.settings import warmup_note
from tokdiv.errors import UsageError


def test_lars_takes_the_steps_of_its_formula():
    """w <- w - lr v with v <- 0.9 v + 0.001 |w| / |g| g for weights; momentum SGD for biases; no decay."""
    generator = torch.Generator().manual_seed(0)
    classifier = torch.nn.Linear(5, 3)
    expected = [p.detach().double().clone() for p in classifier.parameters()]
    velocities = [torch.zeros_like(p) for p in expected]
    optimizer = make_lars(classifier)
    for rate in (0.5, 3.0, 0.25):  # the velocity does not hold the rate
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, twin, velocity in zip(classifier.parameters(), expected, velocities):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient = parameter.grad.double()
            if twin.ndim > 1:
                gradient = 0.001 * twin.norm() / gradient.norm() * gradient
            velocity.mul_(0.9).add_(gradient)
            twin.sub_(rate * velocity)
        optimizer.step()
        for parameter, twin in zip(classifier.parameters(), expected):
            torch.testing.assert_close(parameter.data, twin.float(), rtol=1e-6, atol=1e-7)


def test_lars_scales_nothing_where_a_norm_is_zero():
    classifier = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(classifier.weight)
    optimizer = make_lars(classifier)
    optimizer.param_groups[0]["lr"] = 1.0
    classifier.weight.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(classifier.weight.data, -torch.ones(2, 2))
    classifier.weight.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(classifier.weight.data, torch.full((2, 2), -1.9))


def test_a_warm_up_that_takes_all_epochs_is_noted():
    assert warmup_note(5, 100) == []
    assert warmup_note(5, 2)[0].startswith("the warm-up of 5 epochs takes up all 2")


@pytest.mark.parametrize("penalty", [1e-3, 0.3])
def test_lbfgs_finds_the_optimum_that_scipy_finds(penalty):
    generator = np.random.default_rng(0)
    N, C, num_classes = 60, 5, 3
    features = generator.normal(size=(N, C))
    labels = generator.integers(num_classes, size=N)

    def objective(vector):
        weight, bias = vector[: num_classes * C].reshape(num_classes, C), vector[num_classes * C :]
        logits = features @ weight.T + bias
        losses = logsumexp(logits, axis=1) - logits[np.arange(N), labels]
        return losses.mean() + penalty / 2 * (weight**2).sum()

    best = scipy.optimize.minimize(
        objective, np.zeros(num_classes * (C + 1)), options={"gtol": 1e-7}
    )
    weight, bias, gradient = logistic_regression(
        torch.from_numpy(features),
        torch.from_numpy(labels),
        num_classes,
        penalty,
        tolerance=1e-8,
    )
    found = np.concatenate([weight.numpy().ravel(), bias.numpy()])
    assert objective(found) <= best.fun + 1e-10
    np.testing.assert_allclose(weight.numpy().ravel(), best.x[: num_classes * C], atol=1e-4)
    # The same gradient by central differences: none is left.
    step = 1e-5
    differences = [
        (objective(found + step * unit) - objective(found - step * unit)) / (2 * step)
        for unit in np.eye(len(found))
    ]
    assert np.abs(differences).max() < 1e-6
    assert gradient < 1e-6


def test_classifier_normalizes_without_parameters_of_its_own():
    classifier = batchnorm_linear(8, 3, seed=0)
    assert [tuple(p.shape) for p in classifier.parameters()] == [(3, 8), (3,)]
    assert classifier[0].eps == 1e-6
    assert torch.equal(classifier[1].weight, batchnorm_linear(8, 3, seed=0)[1].weight)


def test_accuracy_counts_the_first_and_the_first_five():
    logits = torch.tensor([[9.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    assert accuracy(logits, torch.tensor([0, 0, 4])) == {"top1": 1 / 3, "top5": 2 / 3}
    assert accuracy(logits[:, :4], torch.tensor([0, 0, 0])) == {"top1": 2 / 3}


def test_lbfgs_probe_classifies_and_reports_its_penalty_and_gradient(pictures, tiny, tmp_path):
    results = probe(tiny, *pictures, tmp_path, solver="lbfgs")
    assert results.metrics["top1"] > 0.8
    assert results.settings["penalty"] in (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    assert results.settings["converged"]
    assert results.settings["gradient"] < 1e-5
    assert results.data["train"] | {"name": "", "fingerprint": ""} == {
        "name": "",
        "fingerprint": "",
        "images": 49,
        "skipped": 1,
    }
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == results.metrics
    given = probe(tiny, *pictures, solver="lbfgs", penalty=0.01)
    assert given.settings["penalty"] == 0.01


def test_lars_probe_learns(pictures, tiny, tmp_path):
    options = {"epochs": 30, "batch_size": 10, "warmup_epochs": 3, "lr": 6.0}
    results = probe(tiny, *pictures, tmp_path, **options, workers=1)
    assert results.notes == []
    assert results.history[-1]["loss"] < 0.7 * results.history[0]["loss"]
    assert results.metrics["top1"] > 0.6
    assert results.data["train"]["skipped"] == 1


def test_a_recipe_that_cannot_train_on_so_few_images_is_said(pictures, tiny):
    results = probe(tiny, *pictures, epochs=1, warmup_epochs=0, workers=0)
    assert results.settings["lr"] == pytest.approx(0.1 * 50 / 256)
    assert results.notes[0] == "batch of 50: the training images are fewer than 16384"
    assert "leaves it untrained: give --epochs" in results.notes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "sgd"}, "--solver '?sgd'?: expected one of lars, lbfgs"),
        ({"seed": 2**70}, "--seed 1180591620717411303424: expected a whole number"),
        ({"epochs": 0}, "--epochs 0: expected a whole number"),
        ({"solver": "lbfgs", "penalty": -1.0}, "--penalty -1.0: expected a number"),
    ],
)
def test_mistakes_in_the_call_are_named(pictures, tiny, options, message):
    with pytest.raises(UsageError, match=message):
        probe(tiny, *pictures, **options)
