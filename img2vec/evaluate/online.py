"""How good is the student now? k-NN accuracy on the data's own classes, while it is being pretrained."""

from collections.abc import Callable

import numpy as np
import torch

from img2vec.config import Config
from img2vec.evaluate.features import extract_features
from img2vec.evaluate.knn import weighted_knn
from img2vec.evaluate.labeled import split_labeled
from img2vec.model import Img2Vec
from tokdiv.data.loader import Source
from tokdiv.errors import RunError, UsageError

KNN_IMAGES = 10_000  # at most so many images to learn from, and a fifth to measure on
KNN_NEIGHBOURS = 20


def prepare_knn(
    source: Source, config: Config, say: Callable[[str], None]
) -> Callable[[Img2Vec, torch.device], float | None] | None:
    """A function that measures the student by k-NN on DATA's own classes; None where it has none."""
    if not config.knn_every or not source.permutable or source.labels is None:
        return None
    try:
        learn, measure = split_labeled(source, 0.2, config.seed)
    except UsageError as error:
        say(f"remark: no online k-NN: {error}")
        return None
    if learn.num_classes < 2 or not len(measure.labels):
        return None
    generator = np.random.default_rng(config.seed)
    learn, measure = (
        part.take(np.sort(generator.permutation(len(part.labels))[:most]))
        for part, most in ((learn, KNN_IMAGES), (measure, KNN_IMAGES // 5))
    )

    def measured(model: Img2Vec, device: torch.device) -> float | None:
        try:
            of_learn, of_measure = (
                extract_features(
                    model.tokens,
                    part,
                    config.image_size,
                    batch_size=config.batch_size,
                    workers=config.workers,
                    device=device,
                    description="k-NN",
                )
                for part in (learn, measure)
            )
        except RunError as error:
            say(f"remark: no k-NN accuracy: {error}")
            return None
        accuracies = weighted_knn(
            of_learn.features,
            of_learn.labels,
            of_measure.features,
            of_measure.labels,
            k=[KNN_NEIGHBOURS],
        )
        return float(next(iter(accuracies.values())))

    return measured
