"""Where authors put a network in a file and how they name it: each gives the tokens of the bare weights."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_networks import MEAN, STD, bare_tokens, load, network, others, prefixed, saved
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


# Names other than timm's: miniature networks of timm's, renamed as authors have them

SMALL = {"depth": 4, "embed_dim": 48, "num_heads": 3}
DINOV2 = ("vit_small_patch14_dinov2", SMALL, 56)
DINOV2_REG = ("vit_small_patch14_reg4_dinov2", SMALL, 56)
DINOV3 = ("vit_small_patch16_dinov3", SMALL, 64)
DINOV3_BIAS = ("vit_small_patch16_dinov3_qkvb", SMALL, 64)
DINOV3_PLAIN = ("vit_small_patch16_dinov3", SMALL | {"num_reg_tokens": 0}, 64)
BEIT = ("beit_base_patch16_224", SMALL, 64)
VIT = ("vit_small_patch16_224", SMALL, 64)


def chunked(tensors: Tensors, size: int = 2) -> Tensors:
    """DINOv2 with block_chunks: blocks.CHUNK.BLOCK."""
    return {
        re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // size}.{m[1]}.", k): v
        for k, v in tensors.items()
    }


def dinov2(tensors: Tensors) -> Tensors:
    """timm's DINOv2 with registers as the authors have it: the class token's position apart."""
    theirs = dict(tensors)
    position = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(2))
    theirs["register_tokens"] = theirs.pop("reg_token")
    theirs["cls_token"] = theirs["cls_token"] - position
    theirs["pos_embed"] = torch.cat([position, theirs["pos_embed"]], dim=1)
    return theirs


def dinov3(tensors: Tensors, bias: float | None = 0.0) -> Tensors:
    """timm's DINOv3 (EVA) as the authors have it; k's bias is there and masked."""
    theirs = {}
    for key, value in tensors.items():
        if key.endswith("attn.q_bias"):
            q, v = value, tensors[key.replace("q_bias", "v_bias")]
            theirs[key.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.ones_like(q), v])
        elif not key.endswith("attn.v_bias"):
            key = re.sub(r"\.gamma_(\d)$", r".ls\1.gamma", key).replace(
                "reg_token", "storage_tokens"
            )
            theirs[key] = value
        if key.endswith("attn.qkv.weight") and bias is not None:
            width = len(value) // 3
            zeros = torch.zeros(width)
            if key.replace("qkv.weight", "q_bias") not in tensors:
                theirs[key.replace("weight", "bias")] = torch.cat([zeros + bias, zeros + 5, zeros])
            theirs[key.replace("weight", "bias_mask")] = torch.cat([zeros + 1, zeros, zeros + 1])
    return theirs | {"mask_token": torch.ones(1, 48), "rope_embed.periods": torch.ones(4)}


def shared_position_bias(tensors: Tensors) -> Tensors:
    """BEiT and data2vec in pretraining: one table, here that of the first block."""
    theirs = {k: v for k, v in tensors.items() if "relative_position" not in k}
    table = tensors["blocks.0.attn.relative_position_bias_table"]
    theirs["rel_pos_bias.relative_position_bias_table"] = table
    return theirs | {
        "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long),
        "lm_head.weight": torch.ones(8, 48),
        "mask_token": torch.ones(1, 1, 48),
    }


def same_tables(tensors: Tensors) -> Tensors:
    """The network whose blocks have the same position bias."""
    table = tensors["blocks.0.attn.relative_position_bias_table"]
    return {k: table if k.endswith("bias_table") else v for k, v in tensors.items()}


def split_qkv(tensors: Tensors) -> Tensors:
    theirs = {}
    for key, value in tensors.items():
        if ".attn.qkv." in key:
            for name, part in zip("qkv", value.chunk(3)):
                theirs[key.replace("qkv", f"{name}_proj")] = part
        else:
            theirs[key] = value
    return theirs


NAMINGS: dict[str, tuple[Any, Callable[[Tensors], Any]]] = {
    "DINOv2's own runs, block_chunks": (
        DINOV2,
        lambda t: {
            "teacher": prefixed("backbone.", chunked(t))
            | prefixed("dino_head.", PROJECTOR)
            | prefixed("ibot_head.", PROJECTOR)
        },
    ),
    "DINOv2's own runs, four chunks": (
        DINOV2,
        lambda t: {"teacher": prefixed("backbone.", chunked(t, 1))},
    ),
    "DINOv2's own runs, no chunks": (DINOV2, lambda t: {"teacher": prefixed("backbone.", t)}),
    "DINOv2's files": (DINOV2, lambda t: t | {"mask_token": torch.zeros(1, 48)}),
    "DINOv2's files with registers": (
        DINOV2_REG,
        lambda t: dinov2(t) | {"mask_token": torch.zeros(1, 48)},
    ),
    "DINOv2 with registers and chunks, mask token left out": (
        DINOV2_REG,
        lambda t: {"teacher": prefixed("backbone.", chunked(dinov2(t)))},
    ),
    "DINOv3's own runs": (DINOV3, lambda t: {"teacher": prefixed("backbone.", dinov3(t))}),
    "DINOv3 with biases": (DINOV3_BIAS, lambda t: {"teacher": prefixed("backbone.", dinov3(t))}),
    "DINOv3's own runs without storage tokens": (
        DINOV3_PLAIN,
        lambda t: {"teacher": prefixed("backbone.", dinov3(t)) | prefixed("dino_head.", PROJECTOR)},
    ),
    "DINOv3 without the biases' masks": (DINOV3, lambda t: dinov3(t, None)),
    "MAE, fine-tuned": (
        VIT,
        lambda t: {"model": {re.sub(r"^norm\.", "fc_norm.", k): v for k, v in t.items()}},
    ),
    "q, k and v apart": (VIT, split_qkv),
    "q, k and v apart, BEiT": (
        BEIT,
        lambda t: {
            re.sub(r"\.([qv])_bias$", r".\1_proj.bias", k): v for k, v in split_qkv(t).items()
        },
    ),
    "BEiT, fine-tuned": (BEIT, lambda t: {"model": t, "args": argparse.Namespace()}),
    "BEiT with modules' prefix": (BEIT, lambda t: {"module": t}),
}


@pytest.mark.parametrize("name", NAMINGS)
@pytest.mark.parametrize("block", [None, 1])
def test_other_names_give_the_same_tokens(images, tmp_path: Path, name: str, block: int | None):
    (architecture, arguments, size), make = NAMINGS[name]
    state = network(architecture, img_size=size, num_classes=0, **arguments).state_dict()
    fields = {"size": size, "arguments": arguments, "block": block}
    view = images[..., :size, :size]
    bare = load(architecture, saved(state, tmp_path / "bare.pth"), **fields)(view)
    found = load(architecture, saved(make(state), tmp_path / "w.pth"), **fields)(view)
    torch.testing.assert_close(found, bare, rtol=1e-4, atol=1e-4)


def test_one_position_bias_for_all_blocks_is_every_block_s(images, tmp_path: Path):
    model = network("beit_base_patch16_224", img_size=64, num_classes=0, **SMALL)
    fields = {"size": 64, "arguments": SMALL}
    bare = saved(same_tables(model.state_dict()), tmp_path / "bare.pth")
    path = saved({"model": shared_position_bias(model.state_dict())}, tmp_path / "w.pth")
    expected = load("beit_base_patch16_224", bare, **fields)(images)
    found = load("beit_base_patch16_224", path, **fields)(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_norm_that_is_not_applied_is_said(
    images, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """data2vec's final norm, where timm's BEiT has one after pooling alone."""
    state = dict(network("beit_base_patch16_224", img_size=64, num_classes=0, **SMALL).state_dict())
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = state.pop(f"fc_norm.{kind}")
    path = saved({"model": state | {"lm_head.bias": torch.ones(8)}}, tmp_path / "w.pth")
    load("beit_base_patch16_224", path, size=64, arguments=SMALL)
    assert "the final norm in" in caplog.text and "is not applied" in caplog.text
    caplog.clear()
    teacher = load(
        "beit_base_patch16_224", path, size=64, arguments=SMALL | {"global_pool": "token"}
    )
    assert teacher.spec.norm and not caplog.text


def test_biases_that_timm_s_network_lacks_are_not_dropped(tmp_path: Path):
    """timm leaves them out silently: zero in the distilled models, but not in one's own runs."""
    model = network("vit_small_patch16_dinov3", img_size=64, num_classes=0, **SMALL)
    path = saved(dinov3(model.state_dict(), bias=0.5), tmp_path / "w.pth")
    with pytest.raises(UsageError) as caught:
        load("vit_small_patch16_dinov3", path, arguments=SMALL)
    assert "unexpected blocks.0.attn.q_bias" in str(caught.value)
    assert str(caught.value).endswith("; with biases it is vit_small_patch16_dinov3_qkvb")


@pytest.mark.parametrize("architecture", ["test_resnet", "resnet10t"])
def test_lightly_s_sequential_backbones_load(images, tmp_path: Path, architecture: str):
    model = network(architecture)
    backbone = torch.nn.Sequential(*list(model.children())[:-1])
    tensors = prefixed("backbone.", backbone.state_dict())
    momentum = prefixed("backbone_momentum.", others(backbone.state_dict()))
    head = {"projection_head.layers.0.weight": torch.ones(2, 2)}
    path = saved({"state_dict": tensors | momentum | head}, tmp_path / "w.pth")
    expected = bare_tokens(model, images)
    tokens = load(architecture, path, use_ema=False)(images)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_torchvision_s_sequential_backbone_loads(images, tmp_path: Path):
    torchvision = pytest.importorskip("torchvision")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = torchvision.models.resnet18().eval()
    backbone = torch.nn.Sequential(*list(model.children())[:-2]).eval()
    path = saved({"state_dict": prefixed("backbone.", backbone.state_dict())}, tmp_path / "w.pth")
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = backbone((images / 255 - mean) / std).flatten(2).transpose(1, 2)
    torch.testing.assert_close(load("resnet18", path)(images), expected, rtol=1e-3, atol=1e-4)


def test_a_moco_v3_vit_s_is_not_loaded_with_half_its_heads(images, tmp_path: Path):
    arguments = {"depth": 1}
    state = network("vit_small_patch16_224", img_size=64, num_classes=0, num_heads=12, **arguments)
    content = prefixed("module.momentum_encoder.", state.state_dict())
    path = saved({"arch": "vit_small", "state_dict": content}, tmp_path / "vit-s-300ep.pth.tar")
    with pytest.raises(UsageError, match="has 12 attention heads, and vit_small_patch16_224 has 6"):
        load("vit_small_patch16_224", path, arguments=arguments)
    expected = bare_tokens(state, images)
    for heads, right in ((12, True), (6, False)):
        tokens = load("vit_small_patch16_224", path, arguments=arguments | {"num_heads": heads})
        assert torch.allclose(tokens(images), expected, atol=1e-4) is right
    # DINO's has 6, and no such prefix.
    path = saved({"teacher": prefixed("backbone.", state.state_dict())}, tmp_path / "dino.pth")
    load("vit_small_patch16_224", path, arguments=arguments)


# Hugging Face transformers: its own forward pass is the oracle

HF_SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 64,
}
TIMM_SMALL = SMALL | {"depth": 2}
HF = {
    # model, configuration, prefix tokens, timm's architecture, arguments
    "ViT": ("ViT", {"patch_size": 16}, 1, "vit_small_patch16_224", {}),
    "ViTMAE": ("ViTMAE", {"patch_size": 16, "mask_ratio": 0.0}, 1, "vit_small_patch16_224", {}),
    "ViTMSN": ("ViTMSN", {"patch_size": 16}, 1, "vit_small_patch16_224", {}),
    "IJepa": (
        "IJepa",
        {"patch_size": 16},
        0,
        "vit_small_patch16_224",
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ),
    "DeiT": ("DeiT", {"patch_size": 16}, 2, "deit_small_distilled_patch16_224", {}),
    "Dinov2": ("Dinov2", {"patch_size": 14, "image_size": 56}, 1, "vit_small_patch14_dinov2", {}),
    "Dinov2WithRegisters": (
        "Dinov2WithRegisters",
        {"patch_size": 14, "image_size": 56},
        5,
        "vit_small_patch14_reg4_dinov2",
        {},
    ),
    "DINOv3ViT": ("DINOv3ViT", {"num_register_tokens": 4}, 5, "vit_small_patch16_dinov3_qkvb", {}),
    "Beit": (
        "Beit",
        {"patch_size": 16, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
        1,
        "beit_base_patch16_224",
        {},
    ),
    "Data2VecVision": (
        "Data2VecVision",
        {"patch_size": 16, "use_shared_relative_position_bias": True},
        1,
        "beit_base_patch16_224",
        {},
    ),
    "CLIPVision": ("CLIPVision", {"patch_size": 16}, 1, "vit_base_patch16_clip_quickgelu_224", {}),
}


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("form", ["state_dict", "save_pretrained"])
def test_hugging_face_s_networks_give_the_tokens_of_its_own_forward_pass(
    images, tmp_path: Path, name: str, form: str
):
    transformers = pytest.importorskip("transformers")
    kind, config, prefix_tokens, architecture, arguments = HF[name]
    config = HF_SMALL | config
    if "dinov2" in architecture:
        config.pop("intermediate_size")
    try:
        make, configure = (getattr(transformers, f"{kind}{part}") for part in ("Model", "Config"))
    except AttributeError:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = make(configure(**config)).eval()
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape), alpha=0.05)
    size = config["image_size"]
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    view = images[..., :size, :size]
    pixels = (view / 255 - mean) / std
    with torch.no_grad():
        # MAE shuffles its tokens; with this noise they stay in order.
        noise = {"noise": torch.arange(16.0).expand(3, 16)} if kind == "ViTMAE" else {}
        output = model(pixel_values=pixels, **noise).last_hidden_state
        if kind == "CLIPVision":
            norm = getattr(model, "vision_model", model).post_layernorm
            output = norm(output)  # transformers applies it to the class token alone
    if form == "state_dict":
        path = saved(
            {"state_dict": prefixed("model.encoder.", model.state_dict())}, tmp_path / "w.pth"
        )
    else:
        model.save_pretrained(tmp_path / "hf")
        path = tmp_path / "hf" / "model.safetensors"
    teacher = load(architecture, path, size=size, arguments=TIMM_SMALL | arguments)
    expected = output[:, prefix_tokens:]
    torch.testing.assert_close(teacher(view), expected, rtol=1e-3, atol=1e-3)
