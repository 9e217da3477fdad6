"""Real photographs through real weights: the certificate against the order over all images."""

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import tokdiv
from tokdiv.certify import certify_order, look_schedule

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from precision import real_teachers

pytestmark = [
    pytest.mark.skipif("TOKDIV_DATA" not in os.environ, reason="TOKDIV_DATA is not set"),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Similarity of every image of imagenet_1000, in the seeded order, under the six networks."""
    data = Path(os.environ["TOKDIV_DATA"])
    run = tmp_path_factory.mktemp("real") / "run"
    ranking = tokdiv.rank(data / "imagenet_1000", real_teachers(data), run, certify="none")
    assert ranking.data["images"] == 1000
    return pd.read_parquet(run / "scores.parquet").drop(columns=["position", "key"])


def first_certified(scores, lower):
    for look in look_schedule(len(scores)):
        certificate = certify_order(scores[:look], population=len(scores), lower=lower)
        if certificate.certified:
            return look, certificate
    raise AssertionError("certified at the latest when every image is seen")


def test_four_teachers_are_ordered_correctly_from_at_most_40_percent(scores):
    names = ["resnet18", "vit_tiny", "mobilenet_ptq", "mobilenet_bird"]
    values = scores[names].to_numpy(np.float64)
    look, certificate = first_certified(values, lower=-1 / 48)
    assert look <= 400
    assert list(certificate.order) == list(np.argsort(values.mean(axis=0)))


def test_no_decided_pair_of_six_teachers_contradicts_the_order_over_all(scores):
    values = scores.to_numpy(np.float64)
    means = values.mean(axis=0)
    for look in look_schedule(len(values)):
        certificate = certify_order(values[:look], population=len(values), lower=-1 / 48)
        for pair in certificate.pairs:
            if pair.state == "decided":
                assert means[pair.first] < means[pair.second]
            elif pair.state == "tie":
                assert abs(means[pair.first] - means[pair.second]) < 0.002
            assert pair.low - 1e-9 <= means[pair.second] - means[pair.first] <= pair.high + 1e-9
    assert certificate.certified


def test_pixels_are_more_diverse_than_every_network(scores):
    data = Path(os.environ["TOKDIV_DATA"])
    ranking = tokdiv.rank(data / "imagenet_1000", ["pixels"], max_images=300)
    assert ranking["pixels"].mean_similarity == pytest.approx(0.22, abs=0.01)
    assert all(ranking["pixels"].mean_similarity < scores.mean())
    assert len(list(itertools.combinations(scores.columns, 2))) == 15
