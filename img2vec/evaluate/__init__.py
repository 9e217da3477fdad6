"""Evaluate a student, a teacher or any timm model alike: k-NN, linear probe, fine-tuning.

All three take a model (OUT of a pretraining, a checkpoint, an exported folder, a SPEC, or a
`tokdiv.Teacher`) and two data sets with classes. The feature of an image is the mean of its tokens as a
teacher gives them: a ViT's patch tokens after its final norm, the last feature map of a ConvNet.

Under torchrun, every process makes the same call after `torch.distributed` is initialized. Each image is
counted once: process r takes the positions r, r + world, ..., without padding.
"""

from typing import TYPE_CHECKING

from tokdiv.lazy import lazy_names

if TYPE_CHECKING:
    from img2vec.evaluate.detect import detect
    from img2vec.evaluate.detector import load_detector
    from img2vec.evaluate.encoder import load_encoder
    from img2vec.evaluate.features import Features, extract_features
    from img2vec.evaluate.finetune import finetune
    from img2vec.evaluate.knn import knn
    from img2vec.evaluate.labeled import LabeledData, open_labeled, split_labeled
    from img2vec.evaluate.probe import probe
    from img2vec.evaluate.results import Results
    from img2vec.evaluate.segment import segment

_HOMES = {
    "Features": "features",
    "LabeledData": "labeled",
    "Results": "results",
    "detect": "detect",
    "extract_features": "features",
    "finetune": "finetune",
    "knn": "knn",
    "load_detector": "detector",
    "load_encoder": "encoder",
    "open_labeled": "labeled",
    "probe": "probe",
    "segment": "segment",
    "split_labeled": "labeled",
}

__all__ = [
    "Features",
    "LabeledData",
    "Results",
    "detect",
    "extract_features",
    "finetune",
    "knn",
    "load_detector",
    "load_encoder",
    "open_labeled",
    "probe",
    "segment",
    "split_labeled",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
