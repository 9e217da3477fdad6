"""Strict loading: what does not fit is named, with the architecture that it would fit."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_networks import bare_tokens, load, network, saved
from torch import Tensor

from tokdiv.errors import UsageError
from tokdiv.teachers.fit import likely_architecture

pytestmark = pytest.mark.usefixtures("one_thread")


def misfit(architecture: str, tensors: dict[str, Tensor], folder: Path, **fields: Any) -> str:
    path = saved(tensors, folder / "w.pth")
    with pytest.raises(UsageError) as caught:
        load(architecture, path, **fields)
    message = str(caught.value)
    assert message.startswith(f"'{path}' does not fit {architecture}: ") and "\n" not in message
    return message


def test_missing_keys_are_listed_the_first_few(networks, tmp_path: Path):
    tensors = dict(networks["test_vit"].state_dict())
    del tensors["cls_token"]
    assert "missing cls_token" in misfit("test_vit", tensors, tmp_path)
    few = {k: v for k, v in tensors.items() if "blocks" not in k}
    message = misfit("test_vit", few, tmp_path)
    assert re.search(r"missing cls_token, (\S+, ){2}\S+ and \d+ more", message)


def test_unexpected_keys_are_listed(networks, tmp_path: Path):
    tensors = networks["test_resnet"].state_dict() | {"extra.weight": torch.ones(2)}
    message = misfit("test_resnet", tensors, tmp_path)
    assert "unexpected extra.weight" in message and "missing" not in message


def test_a_misshapen_key_is_given_with_both_shapes(networks, tmp_path: Path):
    tensors = dict(networks["test_resnet"].state_dict())
    tensors["bn1.weight"] = torch.ones(3)
    wanted = networks["test_resnet"].bn1.weight.shape[0]
    message = misfit("test_resnet", tensors, tmp_path)
    assert f"misshapen bn1.weight (found 3, expected {wanted})" in message


@pytest.mark.parametrize(
    "architecture",
    [
        *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
        *("vit_small_patch8_224", "vit_base_patch32_224", "vit_huge_patch14_224"),
        *("vit_base_patch14_dinov2", "vit_large_patch14_reg4_dinov2", "vit_small_patch16_dinov3"),
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"),
        *(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
        *("convnextv2_tiny", "mobilenetv2_100", "mobilenetv3_large_100", "efficientnet_b0"),
    ],
)
def test_a_common_architecture_is_known_by_its_shapes(architecture: str):
    with torch.device("meta"):
        tensors = timm.create_model(architecture).state_dict()
    assert likely_architecture(tensors) == architecture


@pytest.mark.parametrize(
    "architecture", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"]
)
def test_an_uncommon_architecture_is_not_guessed(networks, architecture: str):
    with torch.device("meta"):
        tensors = timm.create_model(architecture).state_dict()
    assert likely_architecture(tensors) is None


def test_another_network_s_weights_are_told_where_they_fit(tmp_path: Path):
    tensors = timm.create_model("vit_tiny_patch16_224").half().state_dict()
    message = misfit("vit_small_patch16_224", tensors, tmp_path, arguments={"depth": 1})
    assert "misshapen patch_embed.proj.weight" in message
    assert message.endswith("; it would fit vit_tiny_patch16_224")


def test_another_patch_size_is_refused_rather_than_resampled(tmp_path: Path):
    tensors = timm.create_model("vit_tiny_patch16_224", patch_size=8, depth=1).state_dict()
    message = misfit("vit_tiny_patch16_224", tensors, tmp_path, arguments={"depth": 1})
    assert "misshapen patch_embed.proj.weight (found 192x3x8x8, expected 192x3x16x16)" in message


def test_classifiers_and_counters_are_neither_loaded_nor_missed(networks, images, tmp_path: Path):
    tensors = dict(networks["test_resnet"].state_dict())
    assert "fc.weight" in tensors
    expected = load("test_resnet", saved(tensors, tmp_path / "a.pth"))(images)
    bare = {
        k: v
        for k, v in tensors.items()
        if not k.startswith("fc.") and not k.endswith("num_batches_tracked")
    }
    teacher = load("test_resnet", saved(bare, tmp_path / "b.pth"))
    assert torch.equal(teacher(images), expected)
    assert not any(key.startswith("fc.") for key, _ in teacher.module.named_parameters())


def test_another_number_of_classes_does_not_matter(networks, images, tmp_path: Path):
    tensors = networks["test_resnet"].state_dict()
    wide = tensors | {"fc.weight": torch.ones(7, 3), "fc.bias": torch.ones(7)}
    first, second = saved(tensors, tmp_path / "a.pth"), saved(wide, tmp_path / "b.pth")
    assert torch.equal(load("test_resnet", first)(images), load("test_resnet", second)(images))


@pytest.mark.parametrize("size", [32, 96])
def test_position_embeddings_are_resampled_as_timm_does(networks, tmp_path: Path, size: int):
    path = saved(networks["test_vit"].state_dict(), tmp_path / "w.pth")
    resized = network("test_vit", img_size=64)
    resized.set_input_size(img_size=(size, size))
    view = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    teacher = load("test_vit", path, size=size)
    assert teacher.grid == (size // 16, size // 16)
    torch.testing.assert_close(teacher(view), bare_tokens(resized, view), rtol=1e-4, atol=1e-4)
