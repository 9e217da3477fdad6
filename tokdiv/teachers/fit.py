"""Load a state dict into a timm network strictly, or say what does not fit and which network it would fit."""

import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from tokdiv.errors import UsageError
from tokdiv.teachers.weights import StateDict

# What pretraining and classification leave behind a backbone; never part of the tokens.
HEADS = (
    "head.",
    "head_dist.",
    "fc.",
    "classifier.",
    "projector.",
    "predictor.",
    "prototypes.",
    "decoder_",
)
MASK_TOKENS = ("mask_token", "masked_embed")

PATCH_EMBED = "patch_embed.proj.weight"


def converted(model: nn.Module, found: StateDict, architecture: str, path: Path) -> StateDict:
    """Keys and shapes as timm has them, in float32; position embeddings are resampled to the view's grid."""
    wanted = model.state_dict()
    if PATCH_EMBED in found and PATCH_EMBED in wanted:
        patch, expected = found[PATCH_EMBED], wanted[PATCH_EMBED]
        if patch.ndim == 4 and patch.shape != expected.shape:
            # timm would resample another patch size silently; such a network is another teacher.
            problem = f"misshapen {PATCH_EMBED} ({_shapes(patch, expected)})"
            raise misfit(architecture, path, found, [problem])
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in found.items()}
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        # Heads and mask tokens are still there: by them the converters tell authors' formats apart.
        return convert(tensors, model)
    except Exception as error:
        problem = f"timm cannot convert its keys ({error})"
        raise misfit(architecture, path, found, [problem]) from None


def load_strictly(
    model: nn.Module,
    tensors: StateDict,
    found: StateDict,
    uncut: set[str],
    architecture: str,
    path: Path,
) -> None:
    """Load converted tensors into a model; anything missing, unexpected or misshapen is an error.

    Left out: heads, mask tokens, decoders, and blocks after the chosen one. Not missed: BatchNorm's counters,
    which have no effect in eval mode.

    Args:
        found: the file's own keys, for the message.
        uncut: keys of the architecture with all its blocks.
    """
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in tensors and not k.endswith("num_batches_tracked")]
    misshapen = [k for k in wanted if k in tensors and tensors[k].shape != wanted[k].shape]
    classifier = getattr(model, "default_cfg", {}).get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    left_out = (*HEADS, *MASK_TOKENS, *(f"{name}." for name in classifiers))
    unexpected = [k for k in tensors if k not in uncut and not k.startswith(left_out)]
    problems = []
    if missing:
        problems.append(f"missing {some(missing)}")
    if unexpected:
        problems.append(f"unexpected {some(unexpected)}")
    if misshapen:
        first = misshapen[0]
        more = f" and {len(misshapen) - 1} more" if len(misshapen) > 1 else ""
        problems.append(f"misshapen {first} ({_shapes(tensors[first], wanted[first])}){more}")
    if problems:
        raise misfit(architecture, path, found, problems)
    model.load_state_dict({k: v for k, v in tensors.items() if k in wanted}, strict=False)


def some(names: Sequence[object], limit: int = 4) -> str:
    """The first few of a list of names, and how many more there are."""
    listed = ", ".join(str(name) for name in names[:limit])
    return listed + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _shapes(found: Tensor, wanted: Tensor) -> str:
    return f"found {'x'.join(map(str, found.shape))}, expected {'x'.join(map(str, wanted.shape))}"


def misfit(architecture: str, path: Path, found: StateDict, problems: list[str]) -> UsageError:
    """The error for weights that do not fit, with the architecture that they would fit."""
    likely = likely_architecture(found)
    hint = f"; it would fit {likely}" if likely and likely != architecture else ""
    return UsageError(f"'{path}' does not fit {architecture}: {'; '.join(problems)}{hint}")


# Common architectures by what shapes show.
VIT_SIZES = {
    (192, 12): "tiny",
    (384, 12): "small",
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
}
RESNETS = {  # layers of a stage, and whether its blocks have three convolutions
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
CONVNEXTS = {(96, 9): "tiny", (96, 27): "small", (128, 27): "base", (192, 27): "large"}
MOBILE = {  # channels of the stem and of the last convolution, and whether there is squeeze-and-excitation
    (32, 1280, False): "mobilenetv2_100",
    (32, 1280, True): "efficientnet_b0",
    (16, 1280, True): "mobilenetv3_large_100",
}


def likely_architecture(tensors: StateDict) -> str | None:
    """The common timm architecture that a state dict's keys and shapes are those of; None if unknown."""

    def count(prefix: str) -> int:
        """Number of numbered children, as of `blocks.`."""
        return len({k[len(prefix) :].partition(".")[0] for k in tensors if k.startswith(prefix)})

    def width(key: str) -> int:
        return tensors[key].shape[0] if key in tensors and tensors[key].ndim else 0

    if PATCH_EMBED in tensors and "blocks.0.attn.qkv.weight" in tensors:
        size = VIT_SIZES.get((width(PATCH_EMBED), count("blocks.")))
        patch = tensors[PATCH_EMBED].shape[-1]
        if size and "blocks.0.ls1.gamma" in tensors:
            registers = "_reg4" if {"reg_token", "register_tokens"} & tensors.keys() else ""
            return f"vit_{size}_patch{patch}{registers}_dinov2"
        if size and "blocks.0.gamma_1" in tensors and "pos_embed" not in tensors:
            return f"vit_{size}_patch{patch}_dinov3"
        return size and f"vit_{size}_patch{patch}_224"
    if "layer1.0.conv1.weight" in tensors:
        layers = tuple(count(f"layer{n}.") for n in (1, 2, 3, 4))
        wide = "wide_" if width("layer1.0.conv1.weight") == 128 else ""
        name = RESNETS.get((layers, "layer1.0.conv3.weight" in tensors))  # type: ignore[arg-type]
        return name and (f"{wide}{name}_2" if wide else name)
    if "stem.0.weight" in tensors and "stages.2.blocks.0.conv_dw.weight" in tensors:
        size = CONVNEXTS.get((width("stem.0.weight"), count("stages.2.blocks.")))
        version = "v2" if "stages.0.blocks.0.mlp.grn.weight" in tensors else ""
        return size and f"convnext{version}_{size}"
    if "conv_stem.weight" in tensors:
        excitation = any(".se." in key for key in tensors)
        return MOBILE.get((width("conv_stem.weight"), width("conv_head.weight"), excitation))
    return None
