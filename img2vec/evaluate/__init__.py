"""Measure a student, or any teacher with the same ruler: k-NN, linear probe, fine-tuning.

All three take a model (OUT of a pretraining, an exported folder, a checkpoint, a SPEC of tokdiv, or a
`tokdiv.Teacher`) and two data sets with classes. The features of an image are the mean of its tokens as a
teacher gives them: a ViT's patch tokens after its final norm, the last feature map of a ConvNet.

On many processes each calls with the same arguments, after `torch.distributed` is initialized. Every
image is counted once: process r takes the positions r, r + world, ..., without padding.
"""

from img2vec.evaluate.encoder import load_encoder
from img2vec.evaluate.features import Features, extract_features
from img2vec.evaluate.finetune import finetune
from img2vec.evaluate.knn import knn, weighted_knn
from img2vec.evaluate.labeled import LabeledData, open_labeled, split_labeled
from img2vec.evaluate.probe import probe
from img2vec.evaluate.results import Results

__all__ = [
    "Features",
    "LabeledData",
    "Results",
    "extract_features",
    "finetune",
    "knn",
    "load_encoder",
    "open_labeled",
    "probe",
    "split_labeled",
    "weighted_knn",
]
