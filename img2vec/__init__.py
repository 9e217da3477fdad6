"""img2vec: pretrain a ViT student to predict a frozen teacher's tokens at masked places.

    import img2vec
    img2vec.pretrain("photos/", teacher="dino_resnet50", out="runs/pretrain")

The names below are loaded on first use, so that `import img2vec` does not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from img2vec.config import PRESETS, Config
    from img2vec.pretrain import pretrain

_HOME = {"PRESETS": "config", "Config": "config", "pretrain": "pretrain"}

__all__ = ["PRESETS", "Config", "pretrain"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'img2vec' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"img2vec.{_HOME[name]}"), name)
    # `import img2vec.pretrain` puts the module there under the function's name: the function wins.
    globals()[name] = value
    return value
