"""Weighted k-NN against a brute-force twin, and the command's files and messages."""

import csv
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from img2vec.evaluate import extract_features, knn, load_encoder, open_labeled
from img2vec.evaluate.knn import usable_neighbors, weighted_knn_hits
from tokdiv.errors import RunError, UsageError


def brute_force(train, train_labels, test, test_labels, num_classes, k, temperature):
    """Image by image and neighbor by neighbor, in float64: (right at first, right among five)."""
    first = five = 0
    for feature, label in zip(test.astype(np.float64), test_labels):
        similarities = []
        for other in train.astype(np.float64):
            norm = math.sqrt(feature @ feature) * math.sqrt(other @ other)
            similarities.append(feature @ other / norm)
        votes = [0.0] * num_classes
        for row in sorted(range(len(train)), key=lambda row: -similarities[row])[:k]:
            votes[train_labels[row]] += math.exp(similarities[row] / temperature)
        ranked = sorted(range(num_classes), key=lambda number: -votes[number])[:5]
        ranked = [number for number in ranked if votes[number] > 0]
        first += ranked[0] == label
        five += label in ranked
    return first, five


def some_features(num_train=90, num_test=40, dim=12, num_classes=7, seed=0):
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(num_classes, dim))
    labels = generator.integers(num_classes, size=num_train + num_test)
    features = centers[labels] + 1.5 * generator.normal(size=(num_train + num_test, dim))
    features *= generator.uniform(
        0.1, 10, size=(num_train + num_test, 1)
    )  # lengths must not matter
    return features[:num_train], labels[:num_train], features[num_train:], labels[num_train:]


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("chunk", [2**26, 200])
def test_votes_equal_those_of_brute_force(monkeypatch, temperature, chunk):
    monkeypatch.setattr(sys.modules["img2vec.evaluate.knn"], "MAX_SIMILARITIES", chunk)
    train, train_labels, test, test_labels = some_features()
    hits = weighted_knn_hits(
        *map(torch.from_numpy, (train, train_labels, test, test_labels)),
        num_classes=7,
        k=[1, 5, 10, 90],
        temperature=temperature,
        device="cpu",
    )
    for k, found in hits.items():
        assert found == brute_force(train, train_labels, test, test_labels, 7, k, temperature)
    assert 0 < hits[10][0] < len(test)  # neither trivially wrong nor right


def test_a_low_temperature_makes_it_the_nearest_neighbor():
    train, train_labels, test, test_labels = map(torch.from_numpy, some_features())
    found = weighted_knn_hits(
        train, train_labels, test, test_labels, num_classes=7, k=[1, 50], temperature=1e-5
    )
    assert found[1][0] == found[50][0]


def test_a_k_above_the_number_of_training_images_is_left_out():
    assert usable_neighbors((10, 20, 100, 200), 50) == [10, 20]
    assert usable_neighbors((10, 20), 7) == [7]


def test_command_classifies_each_usable_image_once_and_writes_its_files(pictures, tiny, tmp_path):
    results = knn(tiny, *pictures, tmp_path / "knn", k=(5, 20, 200), batch_size=7, workers=2)
    assert results.data["train"]["images"] == 49
    assert results.data["train"]["skipped"] == 1
    assert results.data["val"]["images"] == 23
    assert results.data["val"]["skipped"] == 1
    assert list(results.metrics) == ["top1_k5", "top5_k5", "top1_k20", "top5_k20"]
    assert results.metrics["top1_k5"] > 0.5  # colors are seen by an untrained ViT as well
    assert "k = 200 left out: there are 49" in results.notes[0]

    stored = json.loads((tmp_path / "knn" / "results.json").read_text())
    assert stored["metrics"] == results.metrics
    assert stored["data"]["classes"] == 6
    with (tmp_path / "knn" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"]: float(row["value"]) for row in rows} == results.metrics
    assert rows[0]["val_images"] == "23"
    assert rows[0]["feature"] == "mean"
    table = results.table()
    assert "top1_k5" in table
    assert "2 unusable" in table
    assert "left out" in table


def test_command_agrees_with_brute_force_on_the_teachers_tokens(pictures, tiny):
    results = knn(tiny, *pictures, k=(10,), dtype="float32")
    encoder = load_encoder(tiny, dtype="float32")
    train, val = (extract_features(encoder, data, encoder.size) for data in open_labeled(*pictures))
    first, five = brute_force(
        *(part.numpy() for part in (train.features, train.labels, val.features, val.labels)),
        6,
        10,
        0.07,
    )
    assert results.metrics == {"top1_k10": first / 23, "top5_k10": five / 23}


def test_features_are_the_mean_of_the_tokens_of_each_view(pictures, tiny):
    from tokdiv.data.loader import center_view, decode_image

    encoder = load_encoder(tiny, dtype="float32")
    _, val = open_labeled(*pictures)
    found = extract_features(encoder, val, 32, batch_size=5)
    assert found.skipped == 1
    for feature, label, row in zip(found.features, found.labels, found.positions):
        index = int(val.indices[row])
        view = center_view(decode_image(val.source.read(index)), 32)
        torch.testing.assert_close(feature, encoder(view[None])[0].mean(dim=0))
        assert val.source.key(index).startswith(val.classes[label] + "/")


def test_handcrafted_features_are_measured_alike(pictures):
    assert knn("pixels", *pictures, k=(5,), image_size=32).metrics["top1_k5"] > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": (0,)}, "--k (0,): expected one or more of: a whole number"),
        ({"k": ()}, "--k ()"),
        ({"temperature": 0.0}, "--temperature 0.0: expected a number"),
        ({"feature": "max"}, "--feature max: expected one of mean, cls"),
        ({"device": "gpu"}, "--device gpu: expected"),
        ({"dtype": "half"}, "--dtype half: expected auto, float32"),
    ],
)
def test_mistakes_in_the_call_are_named(pictures, tiny, options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        knn(tiny, *pictures, **options)


def test_features_that_are_not_finite_stop_the_run(pictures):
    def broken(images):
        return torch.full((len(images), 1, 4), math.nan)

    train, _ = open_labeled(*pictures)
    with pytest.raises(RunError, match="not finite"):
        extract_features(broken, train, 32)


@pytest.mark.skipif("TOKDIV_DATA" not in os.environ, reason="needs the real images (TOKDIV_DATA)")
def test_trained_weights_beat_untrained_ones_on_real_photographs(tmp_path):
    data = Path(os.environ["TOKDIV_DATA"])
    weights = data / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    for part in ("train", "val"):
        for folder in sorted((data / "caltech40" / part).iterdir())[4:14]:
            (tmp_path / part / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:15]:
                (tmp_path / part / folder.name / image.name).symlink_to(image)
    found = {
        name: knn(
            f"timm:vit_tiny_patch16_224@{source}:mean=0.5:std=0.5",
            str(tmp_path / "train"),
            str(tmp_path / "val"),
            k=(10,),
            image_size=112,
        ).metrics["top1_k10"]
        for name, source in (("trained", weights), ("untrained", "random"))
    }
    assert found["trained"] > 0.75
    assert found["trained"] > found["untrained"] + 0.3
