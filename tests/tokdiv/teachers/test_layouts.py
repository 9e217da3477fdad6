"""Where authors put a network in a file and how they name it: each gives the tokens of the bare weights."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_networks import bare_tokens, load, network, others, prefixed, saved
from torch import Tensor

from tokdiv import TeacherSpec, load_teacher, parse_specs
from tokdiv.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, Tensor]

PROJECTOR = {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
HEADS = {"fc.0.weight": torch.ones(2, 2), "fc.2.bias": torch.ones(2)}
SWAV = {
    "projection_head.0.weight": torch.ones(2, 2),
    "projection_head.1.running_mean": torch.ones(2),
    "prototypes.prototypes0.weight": torch.ones(2, 2),
}


def side_by_side(first: str, second: str) -> Callable[[Tensors], dict[str, Any]]:
    """A state dict of the optimized network under one prefix, and the published one under another."""
    return lambda t: {"state_dict": prefixed(first, others(t)) | prefixed(second, t)}


# One network in the file, whatever is around it
WRAPPERS: dict[str, Callable[[Tensors], Any]] = {
    "bare": lambda t: t,
    "model": lambda t: {"model": t, "epoch": 3, "optimizer": {"state": {}}},
    "state_dict": lambda t: {"state_dict": t},
    "model_state_dict": lambda t: {"model_state_dict": t},
    "net, weights, params": lambda t: {"net": {"weights": {"params": t}}},
    "hiera": lambda t: {"epoch": 1, "model_state": t},
    "data parallel": lambda t: prefixed("module.", t),
    "compiled": lambda t: prefixed("_orig_mod.", t),
    "compiled, then data parallel": lambda t: {"model": prefixed("module._orig_mod.", t)},
    "data parallel, then compiled": lambda t: {"model": prefixed("_orig_mod.module.", t)},
    "a compiled backbone in a Lightning module": lambda t: {
        "state_dict": prefixed("model.backbone._orig_mod.", t)
    },
    "compiled blocks": lambda t: {
        re.sub(r"^(blocks\.\d+|layer\d)\.", r"\1._orig_mod.", k): v for k, v in t.items()
    },
    "FSDP and checkpointing": lambda t: {
        "_fsdp_wrapped_module."
        + re.sub(r"^(blocks\.\d+|layer\d)\.", r"\1._checkpoint_wrapped_module.", k): v
        for k, v in t.items()
    },
    "DeepSpeed": lambda t: {"module": t, "buffer_names": [], "ds_version": "0.1"},
    "SWA's AveragedModel": lambda t: prefixed("module.", t) | {"n_averaged": torch.tensor(5)},
    "encoder and decoder": lambda t: {
        "model": prefixed("encoder.", t) | {"decoder.weight": torch.ones(2)}
    },
    "lightning": lambda t: {"state_dict": prefixed("model.backbone.", t), "callbacks": {}},
    "an odd prefix": lambda t: {"state_dict": prefixed("learner.vision_tower.net.", t)},
    "a loss with state": lambda t: {
        "state_dict": prefixed("backbone.", t) | {"criterion.center": torch.zeros(1, 2)}
    },
    "mmpretrain": lambda t: {"meta": {"epoch": 1}, "state_dict": prefixed("backbone.", t)},
    "MoCo v1, v2, without its keys' encoder": lambda t: {
        "epoch": 200,
        "arch": "resnet50",
        "state_dict": prefixed("module.encoder_q.", t | HEADS),
    },
    "MoCo v3 without momentum": lambda t: {"state_dict": prefixed("module.base_encoder.", t)},
    "SwAV, DeepCluster v2": lambda t: prefixed("module.", t | SWAV),
    "vissl": lambda t: {
        "phase_idx": 799,
        "classy_state_dict": {
            "base_model": {"model": {"trunk": prefixed("_feature_blocks.", t), "heads": {}}},
            "optimizer": {},
        },
    },
    "mae": lambda t: {
        "model": t
        | {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 17, 8)}
        | {"decoder_blocks.0.norm1.weight": torch.ones(8), "decoder_pred.weight": torch.ones(8, 8)}
    },
    "SimMIM": lambda t: {"model": prefixed("encoder.", t) | {"decoder.0.weight": torch.ones(2)}},
    "ibot": lambda t: {"state_dict": t | {"masked_embed": torch.ones(1, 8)}},
    "an optimizer that names its parameters": lambda t: {
        "model": prefixed("encoder.", t),
        "optimizer": {"state": {f"encoder.{k}": {"exp_avg": v + 1} for k, v in t.items()}},
    },
    "one network under two names": lambda t: {"model": t, "model_without_ddp": dict(t)},
}

# Two copies: the average, momentum network or teacher is the one that authors publish
AVERAGES: dict[str, Callable[[Tensors], Any]] = {
    "timm": lambda t: {"arch": "x", "state_dict": others(t), "state_dict_ema": t},
    "timm, compiled": lambda t: {
        "state_dict": prefixed("_orig_mod.", others(t)),
        "state_dict_ema": prefixed("module.", t),
    },
    "DeiT, BEiT, ConvNeXt": lambda t: {"model": others(t), "model_ema": t, "epoch": 1},
    "MoCo v1, v2": side_by_side("module.encoder_q.", "module.encoder_k."),
    "MoCo v3": lambda t: {
        "state_dict": prefixed("module.base_encoder.", others(t))
        | prefixed("module.momentum_encoder.", t)
        | {"module.momentum_encoder.head.0.weight": torch.ones(2, 2)}
        | {"module.predictor.0.weight": torch.ones(2, 2)},
    },
    "DINO": lambda t: {
        "student": prefixed("module.backbone.", others(t)),
        "teacher": prefixed("backbone.", t) | PROJECTOR,
        "args": argparse.Namespace(arch="vit"),
        "dino_loss": {"center": torch.zeros(1, 2)},
        "epoch": 1,
    },
    "teacher and student keys": side_by_side("student.backbone.", "teacher.backbone."),
    "DINOv2, DINOv3, in one dict": lambda t: {
        "model": prefixed("student.backbone.", others(t))
        | prefixed("teacher.backbone.", t)
        | prefixed("model_ema.backbone.", t)
        | prefixed("gram_teacher.backbone.", others(others(t)))
    },
    "solo-learn": lambda t: {
        "state_dict": prefixed("backbone.", others(t))
        | prefixed("momentum_backbone.", t)
        | {"projector.0.weight": torch.ones(2, 2), "classifier.weight": torch.ones(2, 2)}
    },
    "lightly": side_by_side("backbone.", "backbone_momentum."),
    "lightly, DINO": side_by_side("student_backbone.", "teacher_backbone."),
    "lightly, MSN": side_by_side("anchor_backbone.", "backbone."),
    "BYOL": lambda t: (
        prefixed("net.", others(t))
        | prefixed("online_encoder.net.", others(t))
        | prefixed("target_encoder.net.", t)
    ),
    "I-JEPA": lambda t: {
        "encoder": prefixed("module.", others(t)),
        "target_encoder": prefixed("module.", t),
        "predictor": prefixed("module.", PROJECTOR),
        "opt": {},
        "epoch": 1,
    },
    "PixPro": side_by_side("module.encoder.", "module.encoder_k."),
    "ema-pytorch": side_by_side("online_model.", "ema_model."),
    "mmengine's names, without its version": lambda t: {
        "meta": {"epoch": 1},
        "state_dict": prefixed("backbone.", others(t)),
        "ema_state_dict": prefixed("module.backbone.", t) | {"steps": torch.tensor(3)},
    },
    # mmengine itself swaps the two when it saves (EMAHook.before_save_checkpoint).
    "mmengine": lambda t: {
        "meta": {"epoch": 1, "mmengine_version": "0.10.5"},
        "state_dict": prefixed("backbone.", t),
        "ema_state_dict": prefixed("module.backbone.", others(t)) | {"steps": torch.tensor(3)},
    },
    "Lightning's WeightAveraging": lambda t: {
        "state_dict": prefixed("model.", t),
        "current_model_state": prefixed("model.", others(t)),
    },
}


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_are_found_in_what_authors_wrap_around_them(
    networks, images: Tensor, tmp_path: Path, architecture: str, wrapper: str
):
    model = networks[architecture]
    path = saved(WRAPPERS[wrapper](model.state_dict()), tmp_path / "w.pth")
    expected = bare_tokens(model, images)
    torch.testing.assert_close(load(architecture, path)(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet", "test_convnext"])
@pytest.mark.parametrize("wrapper", AVERAGES)
def test_of_two_copies_the_average_is_taken_or_the_one_asked_for(
    networks,
    images: Tensor,
    tmp_path: Path,
    architecture: str,
    wrapper: str,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level("INFO", "tokdiv")
    published, optimized = network(architecture), network(architecture)
    if architecture == "test_vit":
        published, optimized = (network(architecture, img_size=64) for _ in range(2))
    optimized.load_state_dict(others(published.state_dict()))
    state = published.state_dict()
    if architecture == "test_convnext":
        state = facebook_convnext(state)  # names that only timm's converter knows
    path = saved(AVERAGES[wrapper](state), tmp_path / "w.pth")
    for use_ema, model in ((None, published), (True, published), (False, optimized)):
        caplog.clear()
        teacher = load(architecture, path, use_ema=use_ema)
        expected = bare_tokens(model, images)
        torch.testing.assert_close(teacher(images), expected, rtol=1e-3, atol=1e-3)
        (message,) = caplog.messages
        assert message.startswith("t: took '") and f"of {path.name}, " in message
        assert f":weights={'ema' if use_ema is False else 'raw'} takes '" in message


def test_the_option_chooses_among_copies(networks, images: Tensor, tmp_path: Path):
    state = networks["test_resnet"].state_dict()
    path = saved({"state_dict": others(state), "state_dict_ema": state}, tmp_path / "w.pth")
    spec = f"timm:test_resnet@{path}:size=64"
    assert parse_specs([spec])[0].use_ema is None
    assert parse_specs([spec + ":weights=raw"])[0].use_ema is False
    ema, raw = load_teacher(spec + ":weights=ema"), load_teacher(spec + ":weights=raw")
    assert torch.equal(load_teacher(spec)(images), ema(images))
    assert not torch.allclose(raw(images), ema(images))
    assert raw.spec.identity() != ema.spec.identity() == load_teacher(spec).spec.identity()
    again = load_teacher(TeacherSpec.from_dict(raw.spec.to_dict()))
    assert torch.equal(again(images), raw(images))
    with pytest.raises(UsageError, match="weights = 'EMA': expected ema or raw"):
        parse_specs([spec + ":weights=EMA"])


def test_an_average_that_is_not_there_cannot_be_asked_for(networks, images, tmp_path: Path):
    path = saved({"model": networks["test_resnet"].state_dict()}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"weights=ema: '.*' holds no moving average"):
        load("test_resnet", path, use_ema=True)
    load("test_resnet", path, use_ema=False)


def test_copies_that_nothing_tells_apart_are_an_error(networks, tmp_path: Path):
    state = networks["test_resnet"].state_dict()
    path = saved({"generator": state, "critic": others(state)}, tmp_path / "w.pth")
    with pytest.raises(
        UsageError, match=r"several networks that fit test_resnet: '.*', '.*'; save"
    ):
        load("test_resnet", path)


def test_a_larger_teacher_beside_its_student_is_another_architecture(
    networks, images: Tensor, tmp_path: Path
):
    """Distillation: the teacher in the file is no copy of the student, so the student is meant."""
    teacher = network("test_vit", img_size=64, embed_dim=96, num_heads=3)
    student = networks["test_vit"]
    content = prefixed("teacher.", teacher.state_dict()) | prefixed(
        "student.", student.state_dict()
    )
    path = saved({"state_dict": content}, tmp_path / "w.pth")
    expected = bare_tokens(student, images)
    torch.testing.assert_close(load("test_vit", path)(images), expected, rtol=1e-4, atol=1e-4)


def test_nested_dicts_are_followed_so_far_and_no_further(networks, tmp_path: Path):
    content: Any = networks["test_resnet"].state_dict()
    for _ in range(50):
        content = {"model": content}
    path = saved(content, tmp_path / "w.pth")
    with pytest.raises(UsageError, match="holds no state dict: found a dict with the keys model"):
        load("test_resnet", path)
    tangle: dict[str, Any] = {}
    tangle |= {str(n): tangle for n in range(1000)} | {"w": torch.ones(2)}
    with pytest.raises(UsageError, match="does not fit test_resnet"):
        load("test_resnet", saved(tangle, tmp_path / "t.pth"))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "lr": 0.1}, "a dict with the keys epoch, lr"),
        ({"model": {}}, "a dict with the keys model"),
        ({1: torch.ones(3)}, "a dict with the keys 1"),
        ([1, 2], "list"),
        (torch.ones(3), "Tensor"),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path: Path, content: Any, found: str):
    path = saved(content, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=f"holds no state dict: found {found}"):
        load("test_resnet", path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast_to_float32(
    networks, images: Tensor, tmp_path: Path, dtype: torch.dtype
):
    model = networks["test_vit"]
    tensors = {k: v.to(dtype).contiguous() for k, v in model.state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    teacher = load("test_vit", tmp_path / "w.safetensors")
    assert {p.dtype for p in teacher.module.parameters()} == {torch.float32}
    expected = network("test_vit", img_size=64)
    expected.load_state_dict({k: v.float() for k, v in tensors.items()})
    torch.testing.assert_close(teacher(images), bare_tokens(expected, images), rtol=1e-4, atol=1e-4)


def facebook_convnext(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's keys as the authors of ConvNeXt name them."""
    renamed = {}
    for key, value in tensors.items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"^stages\.(\d+)\.blocks\.", r"stages.\1.", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        key = key.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("form", ["timm", "authors"])
@pytest.mark.parametrize("block", [None, 1])
def test_a_convnext_loads_in_both_namings_and_cut_at_a_stage(
    networks, images: Tensor, tmp_path: Path, form: str, block: int | None
):
    model = networks["test_convnext"]
    tensors = model.state_dict()
    path = saved(tensors if form == "timm" else facebook_convnext(tensors), tmp_path / "w.pth")
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        features = model.stem((images / 255 - mean) / std)
        for stage in model.stages[: None if block is None else block + 1]:
            features = stage(features)
    expected = features.flatten(2).transpose(1, 2)
    tokens = load("test_convnext", path, block=block)(images)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_dinov2_s_own_files_with_registers_load(images: Tensor, tmp_path: Path):
    arguments = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    model = network("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0, **arguments)
    theirs = dict(model.state_dict())
    own_position = torch.randn(1, 1, 32)
    theirs["register_tokens"] = theirs.pop("reg_token")
    theirs["cls_token"] = theirs["cls_token"] - own_position
    theirs["pos_embed"] = torch.cat([own_position, theirs["pos_embed"]], dim=1)
    theirs["mask_token"] = torch.zeros(1, 32)
    path = saved(theirs, tmp_path / "w.pth")
    view = images[..., :56, :56]
    tokens = load("vit_small_patch14_reg4_dinov2", path, size=56, arguments=arguments)(view)
    torch.testing.assert_close(tokens, bare_tokens(model, view), rtol=1e-4, atol=1e-4)
