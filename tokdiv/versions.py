"""The versions that a run's numbers depend on."""

import platform

import numpy as np
import timm
import torch
import torchvision

from tokdiv import __version__


def versions() -> dict[str, str]:
    """Of this package, of Python, and of the packages that compute."""
    return {
        "tokdiv": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a subclass of str, which no checkpoint may hold
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
    }
