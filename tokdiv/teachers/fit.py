"""Find a timm network's weights in a checkpoint and load them strictly, or say what does not fit."""

import contextlib
import io
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokdiv.errors import UsageError, first_line
from tokdiv.teachers.checkpoint import StateDict
from tokdiv.teachers.layouts import AVERAGED, HEADS, OPTIMIZED, to_timm
from tokdiv.teachers.spec import TeacherSpec

log = logging.getLogger(__name__)

PATCH_EMBED = "patch_embed.proj.weight"
DEPTH = 8  # of nested dicts in a checkpoint


@dataclass(frozen=True)
class Network:
    """Tensors of a checkpoint that are those of one network.

    Attributes:
        prefix: of their keys in the file, as "state_dict.backbone."; "" for all of them.
        found: the tensors by the file's names, without the prefix.
        tensors: by timm's names, in float32, position embeddings resampled to the view's grid.
        score: number of the model's tensors that they have, of the right shape.
        error: why they cannot be converted.
        rivals: prefixes of other networks in the file that could as well be meant.
    """

    prefix: str
    found: StateDict
    tensors: StateDict
    score: float
    error: str | None = None
    rivals: tuple[str, ...] = ()


def find_network(checkpoint: Any, model: nn.Module, spec: TeacherSpec, path: Path) -> Network:
    """The network in a checkpoint that is an architecture's, wherever it is and whatever its keys' prefix.

    Of several copies, the moving average, momentum network or teacher is taken, which is the one that authors
    publish; `use_ema=False` in the spec takes the other.

    Args:
        checkpoint: what `read_checkpoint` gave.
        model: the architecture with all its blocks.

    Raises:
        UsageError: no state dict in it, or a network that only seems to be the architecture's.
    """
    tensors = dict(_flat(checkpoint))
    if not tensors:
        keys = (
            f"a dict with the keys {some(list(checkpoint))}" if isinstance(checkpoint, dict) else ""
        )
        raise UsageError(f"'{path}' holds no state dict: found {keys or type(checkpoint).__name__}")
    networks = _networks(tensors, model)
    network = _chosen(networks, _ranks(networks, checkpoint), spec, path)
    if network.error:
        raise misfit(spec, path, network, [f"its keys cannot be converted ({network.error})"])
    _check_patch(network, model, spec, path)
    _check_heads(network, model, spec, path)
    return network


def _flat(
    content: Any, prefix: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, with the path of their keys; a dict that occurs twice counts once."""
    seen = set() if seen is None else seen
    if not isinstance(content, dict) or id(content) in seen or prefix.count("\0") >= DEPTH:
        return
    seen.add(id(content))
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            yield f"{prefix}{key}".replace("\0", "."), value
        elif isinstance(key, str):
            yield from _flat(value, f"{prefix}{key}\0", seen)


def _networks(tensors: StateDict, model: nn.Module) -> list[Network]:
    """The parts of a checkpoint that hold the model's tensors, the best first; at least one."""
    counts = Counter(key[: dot + 1] for key in tensors for dot in _dots(key))
    smallest = min(len(model.state_dict()) // 4, len(tensors) // 2)
    prefixes = [prefix for prefix, count in counts.items() if count >= max(1, smallest)]
    prefixes.sort(key=lambda prefix: prefix.count("."), reverse=True)  # the innermost first
    tried = {prefix: _network(prefix, tensors, model) for prefix in prefixes}
    best = max(network.score for network in tried.values())
    if best == 0:
        most = max(counts.values())
        return [tried[next(prefix for prefix in prefixes if counts[prefix] == most)]]
    networks: list[Network] = []
    for prefix in prefixes:
        network = tried[prefix]
        if network.score >= best / 2 and any(n.prefix.startswith(prefix) for n in networks):
            # What is left around inner networks may be another one.
            inner = tuple(n.prefix for n in networks)
            rest = {k: v for k, v in tensors.items() if not k.startswith(inner)}
            network = _network(prefix, rest, model)
        if network.score >= best / 2:
            networks.append(network)
    return sorted(networks, key=lambda network: -network.score)


def _dots(key: str) -> list[int]:
    """Where the prefixes of a key end: at -1 the empty one, and at its dots."""
    return [-1, *(match.start() for match in re.finditer(r"\.", key))]


def _network(prefix: str, tensors: StateDict, model: nn.Module) -> Network:
    """The tensors with a prefix as a network, with its score."""
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    expected, error = model.state_dict(), None
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in found.items()}
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        tensors = to_timm(tensors, model)
        if convert is not None:
            # Heads and mask tokens are still there: by them the converters tell authors' formats apart.
            with contextlib.redirect_stdout(io.StringIO()):
                tensors = convert(dict(tensors), model)
    except Exception as failure:
        error = first_line(failure)
    named = [key for key in expected if isinstance(tensors.get(key), Tensor)]
    fitting = sum(tensors[key].shape == expected[key].shape for key in named)
    return Network(prefix, found, tensors, fitting + len(named) / 1000, error)


def _ranks(networks: Sequence[Network], checkpoint: Any) -> list[int]:
    """2 for a network that is named as an average of another one, 0 for one named as optimized, else 1."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    # mmengine swaps the two when it saves: `ema_state_dict` then holds the weights that were optimized.
    swapped = isinstance(meta, dict) and "mmengine_version" in meta
    ranks = []
    for network in networks:
        words = network.prefix.lower().split(".")
        if swapped and words[0] in ("state_dict", "ema_state_dict"):
            ranks.append(2 if words[0] == "state_dict" else 0)
        elif any(map(OPTIMIZED.search, words)):
            ranks.append(0)
        else:
            ranks.append(2 if any(map(AVERAGED.search, words)) else 1)
    return ranks


def _chosen(
    networks: Sequence[Network], ranks: Sequence[int], spec: TeacherSpec, path: Path
) -> Network:
    """The network to load, of those found in a file."""
    wanted = min(ranks) if spec.use_ema is False else max(ranks)
    if spec.use_ema and wanted < 2 and wanted == min(ranks):
        raise UsageError(
            f"{spec.name}: weights=ema: '{path}' holds no moving average, momentum network or teacher"
        )
    chosen, *others = [network for network, rank in zip(networks, ranks) if rank == wanted]
    rivals = tuple(other.prefix for other in others if not _equal(chosen, other))
    left = [network for network, rank in zip(networks, ranks) if rank != wanted]
    if left:
        kind = ("the optimized network", "the plain network", "the averaged network")[wanted]
        other = "ema" if spec.use_ema is False else "raw"
        log.info(
            "%s: took '%s' of %s, %s; :weights=%s takes '%s'",
            *(spec.name, chosen.prefix[:-1], path.name, kind, other, left[0].prefix[:-1]),
        )
    return replace(chosen, rivals=rivals)


def _equal(first: Network, second: Network) -> bool:
    return first.found.keys() == second.found.keys() and all(
        torch.equal(value, second.found[key]) for key, value in first.found.items()
    )


def _check_patch(network: Network, model: nn.Module, spec: TeacherSpec, path: Path) -> None:
    """Refuse another patch size, which timm would resample silently: such a network is another teacher."""
    wanted = model.state_dict().get(PATCH_EMBED)
    if wanted is None or wanted.ndim != 4:
        return
    for key, value in network.found.items():
        embeds = value.ndim == 4 and value.shape[:2] == wanted.shape[:2]
        if (embeds or key == PATCH_EMBED) and value.ndim == 4 and value.shape != wanted.shape:
            raise misfit(spec, path, network, [f"misshapen {key} ({_shapes(value, wanted)})"])


def _check_heads(network: Network, model: nn.Module, spec: TeacherSpec, path: Path) -> None:
    """Refuse MoCo v3's ViT-S where the model has 6 attention heads: it has 12, which no shape shows."""
    blocks = list(getattr(model, "blocks", []))
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None
    token = network.tensors.get("cls_token")
    if (
        re.search(r"(^|\.)(momentum|base)_encoder\.", network.prefix)
        and (token is not None and token.shape[-1] == 384)
        and (heads not in (None, 12) and "num_heads" not in spec.arguments)
    ):
        raise UsageError(
            f"{spec.name}: '{path}' is a ViT-S of MoCo v3, which has 12 attention heads, and "
            f"{spec.architecture} has {heads}: write :num_heads=12 (or :num_heads={heads} if yours has {heads})"
        )


def load_strictly(
    model: nn.Module, network: Network, uncut: set[str], spec: TeacherSpec, path: Path
) -> None:
    """Load a network into a model; anything missing, unexpected or misshapen is an error.

    Left out: heads, mask tokens, decoders, and blocks after the chosen one. Not missed: BatchNorm's counters,
    which have no effect in eval mode.

    Args:
        uncut: keys of the architecture with all its blocks.
    """
    wanted, tensors = model.state_dict(), network.tensors
    missing = [k for k in wanted if k not in tensors and not k.endswith("num_batches_tracked")]
    misshapen = [k for k in wanted if k in tensors and tensors[k].shape != wanted[k].shape]
    classifier = getattr(model, "default_cfg", {}).get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    left_out = (*HEADS, *(f"{name}." for name in classifiers))
    if "fc_norm.weight" in uncut and "norm.weight" in tensors and "norm.weight" not in uncut:
        left_out = (*left_out, "norm.")
        log.warning(
            "%s: the final norm in '%s' is not applied: %s has one after pooling alone (fc_norm)",
            *(spec.name, path, spec.architecture),
        )
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
        raise misfit(spec, path, network, problems)
    if network.rivals:
        names = some([f"'{prefix[:-1]}'" for prefix in (network.prefix, *network.rivals)])
        raise UsageError(
            f"'{path}' holds several networks that fit {spec.architecture}: {names}; save one of them alone"
        )
    model.load_state_dict({k: v for k, v in tensors.items() if k in wanted}, strict=False)


def some(names: Sequence[object], limit: int = 4) -> str:
    """The first few of a list of names, and how many more there are."""
    listed = ", ".join(str(name) for name in names[:limit])
    return listed + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _shapes(found: Tensor, wanted: Tensor) -> str:
    return f"found {'x'.join(map(str, found.shape))}, expected {'x'.join(map(str, wanted.shape))}"


def misfit(spec: TeacherSpec, path: Path, network: Network, problems: list[str]) -> UsageError:
    """The error for weights that do not fit, with the architecture that they would fit."""
    likely = likely_architecture(network.tensors)
    hint = f"; it would fit {likely}" if likely and likely != spec.architecture else ""
    if re.search(r"-\d{5}-of-\d{5}\.", path.name):
        hint = "; it is one of several parts: name the .index.json beside it"
    elif any(problem.startswith("unexpected") and "_bias" in problem for problem in problems):
        qkvb = spec.architecture.replace("dinov3", "dinov3_qkvb")
        hint = f"; with biases it is {qkvb}" if "dinov3" in spec.architecture else hint
    return UsageError(f"'{path}' does not fit {spec.architecture}: {'; '.join(problems)}{hint}")


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
