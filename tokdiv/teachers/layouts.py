"""Checkpoint layouts: how authors name a network's tensors, and how these become timm's names.

Where the network is within a file, `tokdiv.teachers.fit` finds out by itself: any containers and prefixes will do.
A new layout is one entry of LAYOUTS.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tokdiv.teachers.checkpoint import StateDict

# Of several copies of a network in a file: words in the names of those that are published (an average of the
# weights during training, or the teacher of a student), and of those that were optimized.
AVERAGED = re.compile(
    r"(?<!gram)(^|_)(ema|momentum|teacher|target|k|key|avg|averag(ed|ing|e)|swa|slow|shadow)(_|\d*$)"
)
OPTIMIZED = re.compile(r"(^|_)(student|online|raw|current|q|query|base_encoder|anchor)(_|\d*$)")

# What pretraining and classification leave beside a backbone; never part of the tokens.
HEADS = (
    *(
        "head.",
        "head_dist.",
        "fc.",
        "classifier.",
        "pooler.",
        "lm_head.",
        "dino_head.",
        "ibot_head.",
    ),
    *("projector.", "projection_head.", "predictor.", "prototypes.", "decoder.", "decoder_"),
    *("mask_token", "masked_embed", "queue", "n_averaged"),
)


@dataclass(frozen=True)
class Layout:
    """A way to name tensors, other than timm's.

    Attributes:
        name: whose habit it is.
        pattern: of a key that only this layout has. It applies where a key matches and none of timm's does.
        convert: from its tensors to timm's, for a model; or renames, as (pattern, replacement) pairs that apply
            one after the other to each key. A key that becomes empty is dropped.
    """

    name: str
    pattern: str
    convert: Callable[[StateDict, nn.Module], StateDict] | tuple[tuple[str, str], ...]


def to_timm(tensors: StateDict, model: nn.Module) -> StateDict:
    """A network's tensors by timm's names, as far as the layouts below go."""
    expected = model.state_dict().keys()
    for layout in LAYOUTS:
        pattern = re.compile(layout.pattern)
        if not any(map(pattern.search, tensors)) or any(map(pattern.search, expected)):
            continue
        if callable(layout.convert):
            tensors = layout.convert(dict(tensors), model)
        else:
            tensors = _renamed(tensors, layout.convert)
    return tensors


def _renamed(tensors: StateDict, renames: tuple[tuple[str, str], ...]) -> StateDict:
    renamed = {}
    for key, value in tensors.items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        if key:
            renamed[key] = value
    return renamed


def _children(tensors: StateDict, model: nn.Module) -> StateDict:
    """`nn.Sequential(*list(model.children())[:-1])`, in which children lose their names."""
    names = [name for name, _ in model.named_children()]
    renamed = {}
    for key, value in tensors.items():
        number, _, rest = key.partition(".")
        known = number.isdecimal() and int(number) < len(names)
        renamed[f"{names[int(number)]}.{rest}" if known else key] = value
    return renamed


def _registers(tensors: StateDict, model: nn.Module) -> StateDict:
    """Register tokens; timm adds the position of the class token to that token itself."""
    tensors["reg_token"] = tensors.pop("register_tokens")
    tensors.pop("mask_token", None)
    if getattr(model, "no_embed_class", False) and {"pos_embed", "cls_token"} <= tensors.keys():
        position = tensors["pos_embed"]
        tensors["cls_token"] = tensors["cls_token"] + position[:, :1]
        tensors["pos_embed"] = position[:, 1:]
    return tensors


def _fused(tensors: StateDict, model: nn.Module) -> StateDict:
    """q, k and v in one matrix; a bias that timm's network lacks is left out only where it is zero."""
    expected = model.state_dict().keys()
    bases = [
        key.removesuffix("q_proj.weight") for key in tensors if key.endswith("attn.q_proj.weight")
    ]
    for base in bases:
        weights = [tensors.pop(f"{base}{n}_proj.weight") for n in "qkv"]
        tensors[f"{base}qkv.weight"] = torch.cat(weights)
        zero = weights[0].new_zeros(len(weights[0]))
        biases = [tensors.pop(f"{base}{n}_proj.bias", zero) for n in "qkv"]
        if f"{base}qkv.bias" in expected:
            tensors[f"{base}qkv.bias"] = torch.cat(biases)
        else:
            tensors |= _separate_biases(base, biases, f"{base}q_bias" in expected)
    return tensors


def _separate_biases(base: str, biases: list[torch.Tensor], wanted: bool) -> StateDict:
    """Biases of q, k and v by the names of timm's BEiT and EVA; those that it lacks where they are not zero."""
    named = {f"{base}{n}_bias": bias for n, bias in zip("qkv", biases)}
    return {
        key: bias
        for key, bias in named.items()
        if (wanted and not key.endswith("k_bias")) or bias.any()
    }


def _dinov3(tensors: StateDict, model: nn.Module) -> StateDict:
    """DINOv3's own names. The bias of the keys is masked, the distilled models' others are zero."""
    wanted = "blocks.0.attn.q_bias" in model.state_dict()
    converted: StateDict = {}
    for key, value in tensors.items():
        if re.search(r"^rope_embed\.|\.bias_mask$|^mask_token$|^local_cls_norm\.", key):
            continue
        if key.endswith("attn.qkv.bias"):
            q, k, v = value.chunk(3)
            biases = [q, torch.zeros_like(k), v]
            converted |= _separate_biases(key.removesuffix("qkv.bias"), biases, wanted)
            continue
        key = re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", key)
        converted[key.replace("storage_tokens", "reg_token")] = value
    return converted


def _position_bias(tensors: StateDict, model: nn.Module) -> StateDict:
    """One relative position bias for all blocks, as BEiT and data2vec pretrain; timm has one a block."""
    shared = tensors.pop("rel_pos_bias.relative_position_bias_table")
    tensors.pop("rel_pos_bias.relative_position_index", None)
    for key in model.state_dict():
        if key.endswith("attn.relative_position_bias_table"):
            tensors[key] = shared
    return tensors


def _pooled_norm(tensors: StateDict, model: nn.Module) -> StateDict:
    """The final norm of a network that was fine-tuned with average pooling, where timm has it before pooling."""
    for kind in ("weight", "bias"):
        key = f"norm.{kind}"
        if key in model.state_dict() and key not in tensors and f"fc_{key}" in tensors:
            tensors[f"norm.{kind}"] = tensors.pop(f"fc_norm.{kind}")
    return tensors


def _clip(tensors: StateDict, model: nn.Module) -> StateDict:
    """CLIP and SigLIP of Hugging Face transformers."""
    tensors = _renamed(
        tensors,
        (
            (r"^embeddings\.class_embedding$", "cls_token"),
            (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
            (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
            (r"^embeddings\.position_ids$", ""),
            (r"^pre_layrnorm\.", "norm_pre."),
            (r"^post_layernorm\.", "norm."),
            (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
            (r"\.self_attn\.([qkv]_proj)\.", r".attn.\1."),
            (r"\.self_attn\.out_proj\.", ".attn.proj."),
            (r"\.layer_norm(\d)\.", r".norm\1."),
        ),
    )
    for key in ("cls_token", "pos_embed"):
        if key in tensors:
            tensors[key] = tensors[key].reshape(1, -1, tensors[key].shape[-1])
    return tensors


LAYOUTS = (
    Layout(
        "wrappers within the keys: torch.compile, DataParallel, FSDP, activation checkpointing",
        r"(^|\.)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.",
        ((r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", ""),),
    ),
    Layout("lightly, SimCLR: nn.Sequential of a network's children", r"^\d+\.", _children),
    Layout(
        "Hugging Face transformers: ViT, ViTMAE, DeiT, I-JEPA, MSN, DINOv2, DINOv3, BEiT, data2vec",
        r"^embeddings\.patch_embeddings\.",
        (
            (r"^embeddings\.(mask_token|position_ids)$", ""),
            (r"^embeddings\.position_embeddings$", "pos_embed"),
            (r"^embeddings\.distillation_token$", "dist_token"),
            (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
            (r"^embeddings\.", ""),
            (r"^((encoder|model)\.)?layers?\.(\d+)\.", r"blocks.\3."),
            (r"^(encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
            (r"^(blocks\.\d+)\.relative_position_bias\.", r"\1.attn."),
            (r"^rope_embeddings\..*", ""),
            (r"\.attention\.(attention\.)?query\.", ".attn.q_proj."),
            (r"\.attention\.(attention\.)?key\.", ".attn.k_proj."),
            (r"\.attention\.(attention\.)?value\.", ".attn.v_proj."),
            (
                r"\.attention\.(attention\.)?(relative_position_bias\.)?(?=relative_position)",
                ".attn.",
            ),
            (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
            (r"\.attention\.([qkv]_proj)\.", r".attn.\1."),
            (r"\.intermediate\.dense\.|\.mlp\.weights_in\.", ".mlp.fc1."),
            (r"\.output\.dense\.|\.mlp\.weights_out\.|\.mlp\.down_proj\.", ".mlp.fc2."),
            (r"\.mlp\.up_proj\.", ".mlp.fc1."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"^layernorm\.", "norm."),
            (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
            (r"\.lambda_(\d)$", r".gamma_\1"),
        ),
    ),
    Layout("Hugging Face transformers: CLIP, SigLIP", r"^embeddings\.patch_embedding\.", _clip),
    Layout(
        "DINOv2's own runs: blocks.CHUNK.BLOCK",
        r"^blocks\.\d+\.\d+\.",
        ((r"^blocks\.\d+\.(?=\d+\.)", "blocks."),),
    ),
    Layout("DINOv2 with registers", r"^register_tokens$", _registers),
    Layout("DINOv3's own runs", r"^storage_tokens$|^rope_embed\.|\.attn\.qkv\.bias_mask$", _dinov3),
    Layout("layer scale of EVA and BEiT", r"\.ls1\.gamma$", ((r"\.ls(\d)\.gamma$", r".gamma_\1"),)),
    Layout("q, k and v apart", r"\.attn\.q_proj\.", _fused),
    Layout("BEiT, data2vec: one position bias for all blocks", r"^rel_pos_bias\.", _position_bias),
    Layout("MAE, fine-tuned: fc_norm", r"^fc_norm\.", _pooled_norm),
)
