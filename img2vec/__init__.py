"""img2vec: pretrain a ViT student to predict a frozen teacher's tokens at masked places.

    import img2vec
    img2vec.pretrain("photos/", teacher="dino_resnet50", out="runs/pretrain")

The names below are loaded on first use, so that `import img2vec` does not load torch.
"""

from typing import TYPE_CHECKING

from tokdiv.lazy import lazy_names

if TYPE_CHECKING:
    from img2vec.config import PRESETS, Config
    from img2vec.evaluate.detect import detect
    from img2vec.evaluate.finetune import finetune
    from img2vec.evaluate.knn import knn
    from img2vec.evaluate.probe import probe
    from img2vec.evaluate.segment import segment
    from img2vec.export import export
    from img2vec.train import pretrain

_HOMES = {
    "PRESETS": "config",
    "Config": "config",
    "detect": "evaluate.detect",
    "export": "export",
    "finetune": "evaluate.finetune",
    "knn": "evaluate.knn",
    "pretrain": "train",
    "probe": "evaluate.probe",
    "segment": "evaluate.segment",
}

__all__ = [
    "PRESETS",
    "Config",
    "detect",
    "export",
    "finetune",
    "knn",
    "pretrain",
    "probe",
    "segment",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
