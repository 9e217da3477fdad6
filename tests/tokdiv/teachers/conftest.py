"""Fixtures of the teachers' tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_networks import Server, network


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    yield served
    served.stop()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


@pytest.fixture(scope="session")
def networks() -> dict[str, torch.nn.Module]:
    return {
        "test_vit": network("test_vit", img_size=64),
        "test_resnet": network("test_resnet"),
        "test_convnext": network("test_convnext"),
    }
