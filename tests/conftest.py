"""What all tests share: caches of their own, small images, and the real data where it is to be had."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

# huggingface_hub reads these once, when it is imported: they are set before any test module is.
_HUB = tempfile.mkdtemp(prefix="hf-home-")
for _name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN"):
    os.environ.pop(_name, None)
os.environ["HF_HOME"] = _HUB
os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

# The stand-in teachers of most tests read a number from an image, which a crop does not hold any more. Tests of
# noise-like teachers say how many images they want.
import_module("tokdiv.rank").rank.__kwdefaults__["correspondence_images"] = 0
import_module("tokdiv.config").Settings.__dataclass_fields__["correspondence_images"].default = 0


@pytest.fixture(scope="session", autouse=True)
def _one_machine() -> Iterator[None]:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    yield
    shutil.rmtree(_HUB, ignore_errors=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny networks, which lose more to waiting for a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for weights, a new one for each test; it does not exist yet."""
    folder = tmp_path_factory.mktemp("home") / "cache"
    monkeypatch.setenv("TOKDIV_CACHE", str(folder))
    return folder


# Modules that look at pictures and pages.
DRAWN = ("test_report", "test_pretrain_report", "test_cli")


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's pictures and page take longer than these small runs; elsewhere they are left out."""
    if request.path.stem not in DRAWN:
        monkeypatch.setattr(import_module("img2vec.train"), "_report", lambda *given: None)


@pytest.fixture
def images() -> Tensor:
    """(3, 3, 64, 64) uint8: noise with coarse structure, so that neither channels nor rows are alike."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 200, (3, 3, 4, 4), generator=generator).repeat_interleave(16, 2)
    noise = torch.randint(0, 56, (3, 3, 64, 64), generator=generator)
    return (coarse.repeat_interleave(16, 3) + noise).to(torch.uint8)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real images and weights, TOKDIV_DATA; tests that ask for it skip without it."""
    folder = os.environ.get("TOKDIV_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TOKDIV_DATA is not set to a folder of real images and weights")
    return Path(folder).resolve()
