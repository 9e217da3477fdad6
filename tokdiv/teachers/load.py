"""From a SPEC to a loaded Teacher: complete the spec, make the network, load its weights strictly."""

import dataclasses
import hashlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tokdiv.errors import UsageError
from tokdiv.teachers.architecture import create_model
from tokdiv.teachers.handcrafted import PATCH, Hog, Pixels
from tokdiv.teachers.layouts import _some, unwrap
from tokdiv.teachers.spec import (
    CUSTOM,
    HANDCRAFTED,
    TeacherSpec,
    nearest,
    parse_specs,
)
from tokdiv.teachers.teacher import DEFAULT_SIZE, DTYPES, Teacher
from tokdiv.teachers.weights import StateDict, read_checkpoint, weights_file
from tokdiv.teachers.zoo import IMAGENET_MEAN, IMAGENET_STD


def load_teacher(
    spec: str | TeacherSpec,
    *,
    image_size: int | Literal["native"] | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
) -> Teacher:
    """Load a frozen teacher.

    Args:
        spec: in the notation of `tokdiv.teachers.spec`, or a TeacherSpec, as a ranking holds it.
        image_size: side of the view in pixels, default 224; "native" for the teacher's own. A size in
            the spec goes before.
        device, dtype: as in `Teacher.prepare`.

    Raises:
        UsageError: an unknown architecture, a checkpoint that does not fit, a size it cannot take.
        RunError: weights that cannot be fetched.
    """
    if isinstance(spec, str):
        specs = parse_specs([spec])
        if len(specs) != 1:
            raise UsageError(f"'{spec}' names {len(specs)} teachers: load them one at a time")
        spec = specs[0]
    if dtype not in DTYPES:
        raise UsageError(f"dtype '{dtype}': expected one of {', '.join(DTYPES)}")
    if spec.architecture == CUSTOM:
        raise UsageError(
            f"'{spec.name}' is a module of the user's own: a spec alone cannot load it again; make it in code "
            f"with tokdiv.Teacher, or name that code with --teacher-module FILE.py:FUNCTION"
        )
    spec = complete(spec)
    native = spec.input_size or DEFAULT_SIZE
    size = spec.size or (native if image_size == "native" else image_size) or DEFAULT_SIZE
    spec = dataclasses.replace(spec, size=size)
    teacher = (
        _handcrafted(spec, size) if spec.architecture in HANDCRAFTED else _from_timm(spec, size)
    )
    return teacher.prepare(device, dtype)


def teacher_from_file(reference: str) -> Teacher:
    """Call the user's own function, FILE.py:FUNCTION, which returns a Teacher. This runs that code, and says so.

    Raises:
        UsageError: no such file or function, or it returned something else.
    """
    path, _, function = reference.rpartition(":")
    if not path or not function.isidentifier() or not Path(path).is_file():
        raise UsageError(
            f"--teacher-module {reference}: expected FILE.py:FUNCTION, with a file that exists"
        )
    # A name of its own: the file may be called like a package that it imports.
    module_spec = importlib.util.spec_from_file_location(f"teacher_module_{Path(path).stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"--teacher-module {reference}: '{path}' is no Python file")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"running your code: {reference}", file=sys.stderr)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look their module up
    sys.path.insert(
        0, str(Path(path).resolve().parent)
    )  # it may import what lies beside it, as a script
    try:
        module_spec.loader.exec_module(module)
        make = getattr(module, function, None)
        if not callable(make):
            raise UsageError(f"--teacher-module {reference}: '{path}' has no function '{function}'")
        teacher = make()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise UsageError(
            f"--teacher-module {reference} raised {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(teacher, Teacher):
        raise UsageError(
            f"--teacher-module {reference} returned {type(teacher).__name__}, not a tokdiv.Teacher"
        )
    return teacher


def state_sha256(module: torch.nn.Module) -> str:
    """A hash of a module's weights: what stands for the file of one that has none."""
    hashed = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def load_teachers(
    teachers: Sequence[str | TeacherSpec | Teacher],
    *,
    image_size: int | Literal["native"] | None = None,
) -> list[Teacher]:
    """Load several teachers, with a progress bar; Teachers made in code are taken as they are.

    Raises:
        UsageError: as `load_teacher`; also where two have the same label, or none is given.
    """
    named: list[TeacherSpec | Teacher] = []
    for teacher in teachers:
        named.extend([teacher] if isinstance(teacher, Teacher) else parse_specs([teacher]))
    parse_specs(
        [item.spec if isinstance(item, Teacher) else item for item in named]
    )  # labels are unique
    first = int(os.environ.get("RANK", 0)) == 0
    loaded = []
    for item in tqdm(named, desc="loading", unit="teacher", disable=None if first else True):
        loaded.append(
            item if isinstance(item, Teacher) else load_teacher(item, image_size=image_size)
        )
    return loaded


def complete(spec: TeacherSpec) -> TeacherSpec:
    """Fill in what only timm knows of an architecture: mean, std, native size, where its weights are.

    Raises:
        UsageError: an architecture or a tag that timm lacks.
    """
    if spec.architecture == CUSTOM:
        return spec
    if spec.architecture in HANDCRAFTED:
        mean, std = spec.mean or IMAGENET_MEAN, spec.std or IMAGENET_STD
        return dataclasses.replace(spec, mean=mean, std=std)
    import timm

    known = timm.is_model(spec.architecture)
    tagged = "." not in spec.architecture or spec.architecture in timm.list_pretrained(
        spec.architecture
    )
    if not known or not tagged:
        names = (
            timm.list_models()
            if not known
            else timm.list_pretrained(spec.architecture.split(".")[0] + ".*")
        )
        raise UsageError(
            f"{spec.name}: timm has no model '{spec.architecture}'{nearest(spec.architecture, names)}; "
            f"a network that timm lacks comes in through tokdiv.Teacher"
        )
    published = timm.get_pretrained_cfg(spec.architecture)
    fields: dict[str, Any] = {}
    if spec.weights == "timm":
        if published is None or not (published.hf_hub_id or published.url):
            tags = timm.list_pretrained(spec.architecture.split(".")[0] + ".*")
            raise UsageError(
                f"{spec.name}: timm has no weights for '{spec.architecture}' "
                f"(with weights: {_some(tags) if tags else 'none'}); write @PATH or @random"
            )
        fields["weights"] = (
            f"hf-hub:{published.hf_hub_id}" if published.hf_hub_id else published.url
        )
        fields["license"] = spec.license or published.license
    if published is not None:
        fields["mean"] = spec.mean or tuple(published.mean)
        fields["std"] = spec.std or tuple(published.std)
        fields["input_size"] = spec.input_size or published.input_size[1]
        fields["interpolation"] = published.interpolation
    else:
        fields["mean"] = spec.mean or IMAGENET_MEAN
        fields["std"] = spec.std or IMAGENET_STD
    return dataclasses.replace(spec, **fields)


def _handcrafted(spec: TeacherSpec, size: int) -> Teacher:
    if size % PATCH:
        raise UsageError(
            f"{spec.name}: {size} px is not a multiple of its patch of {PATCH} px; set :size= or --image-size"
        )
    module = Pixels() if spec.architecture == "pixels" else Hog()
    assert spec.mean is not None and spec.std is not None  # `complete` filled them in
    return Teacher(module, mean=spec.mean, std=spec.std, size=size, name=spec.name, spec=spec)


def _from_timm(spec: TeacherSpec, size: int) -> Teacher:
    """Create the architecture, cut it at the block, load its weights strictly."""
    path = None
    if spec.weights is None:
        raise UsageError(
            f"{spec.name}: no weights given; expected a path, a URL, 'timm' or 'random'"
        )
    if spec.weights != "random":
        path, digest = weights_file(spec.weights, spec.sha256)
        spec = dataclasses.replace(spec, sha256=digest)
    model = _create(spec, size)
    if not hasattr(model, "forward_intermediates"):
        raise UsageError(
            f"{spec.name}: timm's '{spec.architecture}' does not give its tokens (no forward_intermediates); "
            f"wrap it with tokdiv.Teacher(model, tokens=FUNCTION)"
        )
    blocks = len(getattr(model, "feature_info", ()))
    if spec.block is not None and spec.block >= blocks:
        raise UsageError(
            f"{spec.name}: blocks={spec.block}: {spec.architecture} has blocks 0 to {blocks - 1}"
        )
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    sides = patch if isinstance(patch, (tuple, list)) else (patch or 1,)
    if any(size % side for side in sides):
        # timm would drop the last rows and columns of pixels silently.
        raise UsageError(
            f"{spec.name}: {size} px is not a multiple of its patch of {sides[0]} px; set :size= or --image-size"
        )
    has_norm = _has_final_norm(model)
    norm = spec.norm if spec.norm is not None else (has_norm and spec.block is None)
    if norm and not has_norm:
        raise UsageError(
            f"{spec.name}: norm=true, but {spec.architecture} has no final norm for its tokens"
        )
    spec = dataclasses.replace(spec, norm=norm)
    indices: int | list[int] = 1 if spec.block is None else [spec.block]
    found: StateDict = {}
    if path is not None:
        # Converted before the cut, because timm's converters look every block up.
        found = unwrap(read_checkpoint(path), set(model.state_dict()), path)
        tensors = _converted(model, found, spec, path)
    if hasattr(model, "prune_intermediate_layers"):
        model.prune_intermediate_layers(indices, prune_norm=not norm, prune_head=True)  # type: ignore[operator]
    if path is not None:
        _load_strictly(model, tensors, found, spec, path)
    options: dict[str, Any] = {"norm": True} if norm else {}

    def tokens(module: nn.Module, images: Tensor) -> Tensor:
        return module.forward_intermediates(  # type: ignore[operator]
            images,
            indices=indices,
            output_fmt="NCHW",
            intermediates_only=True,
            stop_early=True,
            **options,
        )[0]

    assert spec.mean is not None and spec.std is not None  # `complete` filled them in
    return Teacher(
        model.float(), tokens, mean=spec.mean, std=spec.std, size=size, name=spec.name, spec=spec
    )


def _create(spec: TeacherSpec, size: int) -> nn.Module:
    """The architecture without its classifier, for views of `size` px, initialized from the spec's seed."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPUs as well.
        torch.default_generator.manual_seed(spec.seed)
        own = {"num_classes": 0}
        try:
            return create_model(spec.architecture, spec.arguments, spec.name, **own, img_size=size)
        except TypeError:  # a ConvNet takes no img_size
            torch.default_generator.manual_seed(spec.seed)
            return create_model(spec.architecture, spec.arguments, spec.name, **own)


def _has_final_norm(model: nn.Module) -> bool:
    """Whether `forward_intermediates(norm=True)` applies a final norm to spatial tokens.

    ViTs with `fc_norm` normalize only after pooling, ConvNeXt and Hiera only in their heads, PiT only its
    CLS token, and most ConvNets have none.
    """
    norm = getattr(model, "norm", None)
    takes_norm = "norm" in inspect.signature(model.forward_intermediates).parameters  # type: ignore[arg-type]
    refuses = type(model).__name__ in ("Hiera", "PoolingVisionTransformer")
    return (
        isinstance(norm, nn.Module)
        and not isinstance(norm, nn.Identity)
        and takes_norm
        and not refuses
    )


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


def _converted(model: nn.Module, found: StateDict, spec: TeacherSpec, path: Path) -> StateDict:
    """Keys and shapes as timm has them, in float32; position embeddings are resampled to the view's grid."""
    wanted = model.state_dict()
    patch = "patch_embed.proj.weight"
    if (
        patch in found
        and patch in wanted
        and found[patch].ndim == 4
        and found[patch].shape != wanted[patch].shape
    ):
        # timm would resample another patch size silently; such a network is another teacher.
        raise _misfit(
            spec, path, found, [f"misshapen {patch} ({_shapes(found[patch], wanted[patch])})"]
        )
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in found.items()}
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        # Heads and mask tokens are still there: by them the converters tell authors' formats apart.
        return convert(tensors, model)
    except Exception as error:
        raise _misfit(spec, path, found, [f"timm cannot convert its keys ({error})"]) from None


def _load_strictly(
    model: nn.Module, tensors: StateDict, found: StateDict, spec: TeacherSpec, path: Path
) -> None:
    """Load converted tensors into a model; anything missing, unexpected or misshapen is an error.

    Left out: heads, mask tokens, decoders, and what lies behind the chosen block. Not missed: BatchNorm's
    counters, which have no effect in eval mode. `found` are the file's own keys, for the message.
    """
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in tensors and not k.endswith("num_batches_tracked")]
    misshapen = [k for k in wanted if k in tensors and tensors[k].shape != wanted[k].shape]
    left_out = (*HEADS, *MASK_TOKENS)
    unexpected = [k for k in tensors if k not in wanted and not k.startswith(left_out)]
    if unexpected:
        whole = _keys_of_whole(spec)
        unexpected = [k for k in unexpected if k not in whole]
    problems = []
    if missing:
        problems.append(f"missing {_some(missing)}")
    if unexpected:
        problems.append(f"unexpected {_some(unexpected)}")
    if misshapen:
        first = misshapen[0]
        more = f" and {len(misshapen) - 1} more" if len(misshapen) > 1 else ""
        problems.append(f"misshapen {first} ({_shapes(tensors[first], wanted[first])}){more}")
    if problems:
        raise _misfit(spec, path, found, problems)
    model.load_state_dict({k: v for k, v in tensors.items() if k in wanted}, strict=False)


def _shapes(found: Tensor, wanted: Tensor) -> str:
    return f"found {'x'.join(map(str, found.shape))}, expected {'x'.join(map(str, wanted.shape))}"


def _keys_of_whole(spec: TeacherSpec) -> set[str]:
    """Keys of the architecture with its classifier and all its blocks: what a cut may leave over."""
    try:
        with torch.device("meta"):
            model = create_model(spec.architecture, spec.arguments, spec.name)
    except UsageError:  # older releases of timm compute while they create
        with torch.random.fork_rng(devices=[]):
            model = create_model(spec.architecture, spec.arguments, spec.name)
    return set(model.state_dict())


def _misfit(spec: TeacherSpec, path: Path, found: StateDict, problems: list[str]) -> UsageError:
    fitting = _fitting_architectures(found)
    hint = f"; it would fit {' or '.join(fitting)}" if fitting else ""
    return UsageError(f"'{path}' does not fit {spec.architecture}: {'; '.join(problems)}{hint}")


COMMON_ARCHITECTURES = (
    *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
    *(
        "vit_small_patch8_224",
        "vit_base_patch8_224",
        "vit_base_patch32_224",
        "vit_huge_patch14_224",
    ),
    *(f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large")),
    *(f"vit_{size}_patch14_reg4_dinov2" for size in ("small", "base", "large")),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"),
    *(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
    *("mobilenetv2_100", "mobilenetv3_large_100", "efficientnet_b0", "regnety_016"),
)


def _fitting_architectures(found: StateDict) -> list[str]:
    """Which common architectures a state dict would fill, shapes and all; at most three."""
    import timm

    fitting = []
    patches = "patch_embed.proj.weight" in found
    for name in COMMON_ARCHITECTURES:
        if ("vit" in name) != patches:
            continue  # plain from its keys; making each takes a while
        try:
            with torch.device("meta"):
                wanted = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
        except Exception:
            continue  # an older timm may lack it; this is a hint in an error, no more
        sizeless = ("pos_embed",)
        if all(
            key in found and (key in sizeless or found[key].shape == value.shape)
            for key, value in wanted.items()
            if not key.endswith("num_batches_tracked")
        ):
            fitting.append(name)
    return fitting[:3]
