"""k-NN accuracy of the student during pretraining, on DATA's own classes."""

import logging
from collections.abc import Callable

import numpy as np
import torch

from img2vec.config import Config
from img2vec.evaluate.features import NoFeatures, extract_features
from img2vec.evaluate.knn import usable_neighbors, weighted_knn_hits
from img2vec.evaluate.labeled import split_labeled
from img2vec.model import Img2Vec
from tokdiv.data.loader import Source
from tokdiv.errors import UsageError

log = logging.getLogger(__name__)

KNN_IMAGES = 10_000  # at most this many training images, and a fifth as many validation images
KNN_K = 20


def prepare_knn(
    source: Source, config: Config
) -> Callable[[Img2Vec, torch.device], float | None] | None:
    """A function that measures the student by k-NN on DATA's own classes; None where DATA has none."""
    if not config.knn_every or not source.permutable or source.labels is None:
        return None
    try:
        train, val = split_labeled(source, 0.2, config.seed)
    except UsageError as error:
        log.warning("no k-NN during the run: %s", error)
        return None
    if train.num_classes < 2 or not len(val):
        return None
    generator = np.random.default_rng(config.seed)
    train, val = (
        part.take(np.sort(generator.permutation(len(part))[:most]))
        for part, most in ((train, KNN_IMAGES), (val, KNN_IMAGES // 5))
    )

    def knn_accuracy(model: Img2Vec, device: torch.device) -> float | None:
        try:
            bank, queries = (
                extract_features(
                    model.tokens,
                    part,
                    config.image_size,
                    batch_size=config.batch_size,
                    workers=config.workers,
                    device=device,
                    description="k-NN",
                )
                for part in (train, val)
            )
        except NoFeatures as error:
            log.warning("no k-NN accuracy: %s", error)
            return None
        (k,) = usable_neighbors([KNN_K], len(bank.labels))
        hits = weighted_knn_hits(
            bank.features,
            bank.labels,
            queries.features,
            queries.labels,
            num_classes=train.num_classes,
            k=[k],
        )
        return hits[k][0] / len(queries.labels)

    return knn_accuracy
