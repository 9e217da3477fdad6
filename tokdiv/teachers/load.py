"""From a SPEC to a loaded Teacher: complete the spec, make the network, load its weights strictly."""

import dataclasses
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tokdiv.errors import UsageError, first_line
from tokdiv.run_dir import read_json
from tokdiv.teachers.architecture import create_model
from tokdiv.teachers.cache import HUB
from tokdiv.teachers.checkpoint import read_checkpoint
from tokdiv.teachers.exports import CONFIG, config_fields
from tokdiv.teachers.fit import find_network, load_strictly, some
from tokdiv.teachers.handcrafted import PATCH, Hog, Pixels
from tokdiv.teachers.notation import parse_specs
from tokdiv.teachers.spec import TeacherSpec, nearest
from tokdiv.teachers.teacher import DEFAULT_SIZE, DTYPES, Teacher
from tokdiv.teachers.weights import hub_file, weights_file
from tokdiv.teachers.zoo import IMAGENET_MEAN, IMAGENET_STD

log = logging.getLogger(__name__)


def load_teacher(
    spec: str | TeacherSpec,
    *,
    image_size: int | Literal["native"] | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
) -> Teacher:
    """Load a frozen teacher.

    Args:
        spec: in the notation of `tokdiv.teachers.notation`, or a TeacherSpec, as a ranking holds it.
        image_size: side of the view in pixels, default 224; "native" for the teacher's own. A size in the spec
            takes precedence.
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
    if spec.is_custom:
        raise UsageError(
            f"'{spec.name}' is a module of the user's own: a spec alone cannot load it again; make it in code "
            f"with tokdiv.Teacher, or name that code with --teacher-module FILE.py:FUNCTION"
        )
    spec = complete(spec)
    native = spec.input_size or DEFAULT_SIZE
    size = spec.size or (native if image_size == "native" else image_size) or DEFAULT_SIZE
    spec = dataclasses.replace(spec, size=size)
    teacher = _handcrafted(spec, size) if spec.is_handcrafted else _from_timm(spec, size)
    return teacher.prepare(device, dtype)


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
    parse_specs([t.spec if isinstance(t, Teacher) else t for t in named])  # labels are unique
    first = int(os.environ.get("RANK", 0)) == 0
    return [
        item if isinstance(item, Teacher) else load_teacher(item, image_size=image_size)
        for item in tqdm(named, desc="loading", unit="teacher", disable=None if first else True)
    ]


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
    # Prefixed, because the file may have the name of a package that it imports.
    module_spec = importlib.util.spec_from_file_location(f"teacher_module_{Path(path).stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"--teacher-module {reference}: '{path}' is no Python file")
    log.info("running your code: %s", reference)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look their module up
    sys.path.insert(0, str(Path(path).resolve().parent))  # for the imports of files beside it
    try:
        module_spec.loader.exec_module(module)
        make = getattr(module, function, None)
        if not callable(make):
            raise UsageError(f"--teacher-module {reference}: '{path}' has no function '{function}'")
        teacher = make()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"--teacher-module {reference} raised {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(teacher, Teacher):
        raise UsageError(
            f"--teacher-module {reference} returned {type(teacher).__name__}, not a tokdiv.Teacher"
        )
    return teacher


def complete(spec: TeacherSpec) -> TeacherSpec:
    """Fill in what only timm knows of an architecture: mean, std, native size, where its weights are.

    Raises:
        UsageError: an architecture or a tag that timm lacks.
    """
    if spec.is_custom:
        return spec
    if spec.architecture.startswith(HUB):
        config = hub_file(spec.architecture, (CONFIG,))
        stated = config_fields(read_json(config), f"{spec.architecture}/{CONFIG}")
        # Options of the SPEC go before what the repository states.
        asked = {k: v for k in ("mean", "std") if (v := getattr(spec, k)) is not None}
        arguments = stated["arguments"] | spec.arguments
        spec = dataclasses.replace(spec, **(stated | asked | {"arguments": arguments}))
    fields: dict[str, Any] = {
        "mean": spec.mean or IMAGENET_MEAN,
        "std": spec.std or IMAGENET_STD,
    }
    if spec.is_handcrafted:
        return dataclasses.replace(spec, **fields)
    import timm

    renamed = timm.models.get_deprecated_models().get(spec.architecture)
    spec = dataclasses.replace(spec, architecture=renamed or spec.architecture)
    family = timm.list_pretrained(spec.architecture.partition(".")[0] + ".*")
    known = timm.is_model(spec.architecture)
    if not known or ("." in spec.architecture and spec.architecture not in family):
        names = family if known else timm.list_models()
        raise UsageError(
            f"{spec.name}: timm has no model '{spec.architecture}'{nearest(spec.architecture, names)}; "
            f"a network that timm lacks comes in through tokdiv.Teacher"
        )
    published = timm.get_pretrained_cfg(spec.architecture)
    if spec.weights == "timm":
        if published is None or not (published.hf_hub_id or published.url):
            raise UsageError(
                f"{spec.name}: timm has no weights for '{spec.architecture}' "
                f"(with weights: {some(family) or 'none'}); write @PATH or @random"
            )
        hub = published.hf_hub_id
        fields["weights"] = f"hf-hub:{hub}" if hub else published.url
        fields["license"] = spec.license or published.license
        _remark_on_notes(spec, published.notes or ())
    if published is not None:
        fields["mean"] = spec.mean or tuple(published.mean)
        fields["std"] = spec.std or tuple(published.std)
        fields["input_size"] = spec.input_size or published.input_size[1]
        fields["interpolation"] = published.interpolation
    return dataclasses.replace(spec, **fields)


def _remark_on_notes(spec: TeacherSpec, notes: Sequence[str]) -> None:
    """Say where timm's notes tell that weights were trained with another activation than the architecture's."""
    for note in notes:
        if "QuickGELU" in note and "quickgelu" not in spec.architecture:
            other = spec.architecture.replace("_clip_", "_clip_quickgelu_")
            log.warning(
                "%s: timm notes of these weights: %s; write timm:%s", spec.name, note, other
            )


def _handcrafted(spec: TeacherSpec, size: int) -> Teacher:
    _check_multiple(spec, size, PATCH)
    module = Pixels() if spec.architecture == "pixels" else Hog()
    return Teacher(module, spec=spec)


def _from_timm(spec: TeacherSpec, size: int) -> Teacher:
    """Create the architecture, cut it at the block, load its weights strictly."""
    if spec.weights is None:
        raise UsageError(
            f"{spec.name}: no weights given; expected a path, a URL, 'timm' or 'random'"
        )
    path = None
    if spec.weights != "random":
        path, digest = weights_file(spec.weights, spec.sha256)
        spec = dataclasses.replace(spec, sha256=digest)
    model = _create(spec, size)
    _check_model(spec, size, model)
    norm = spec.norm if spec.norm is not None else (has_final_norm(model) and spec.block is None)
    spec = dataclasses.replace(spec, norm=norm)
    indices: int | list[int] = 1 if spec.block is None else [spec.block]
    uncut = set(model.state_dict())
    if path is not None:
        # Before the cut, because timm's converters look every block up.
        network = find_network(read_checkpoint(path), model, spec, path)
    if hasattr(model, "prune_intermediate_layers"):
        model.prune_intermediate_layers(indices, prune_norm=not norm, prune_head=True)  # type: ignore[operator]
    if path is not None:
        load_strictly(model, network, uncut, spec, path)
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

    return Teacher(model.float(), tokens, spec=spec)


def _create(spec: TeacherSpec, size: int) -> nn.Module:
    """The architecture without its classifier, for views of `size` px, initialized from the spec's seed."""

    def create(**own: Any) -> nn.Module:
        # Not torch.manual_seed, which would seed the GPUs as well.
        torch.default_generator.manual_seed(spec.seed)
        return create_model(spec.architecture, spec.arguments, spec.name, num_classes=0, **own)

    with torch.random.fork_rng(devices=[]):
        try:
            return create(img_size=size)
        except TypeError:  # a ConvNet takes no img_size
            return create()


def _check_model(spec: TeacherSpec, size: int, model: nn.Module) -> None:
    """Whether a network gives the tokens that the spec asks for, of views of this size."""
    if not hasattr(model, "forward_intermediates"):
        raise UsageError(
            f"{spec.name}: timm's '{spec.architecture}' does not give its tokens (no forward_intermediates); "
            f"wrap it with tokdiv.Teacher(model, tokens=FUNCTION)"
        )
    blocks = len(getattr(model, "feature_info", ()))
    if not blocks:
        raise UsageError(f"{spec.name}: {spec.architecture} with {spec.arguments} has no blocks")
    if spec.block is not None and spec.block >= blocks:
        raise UsageError(
            f"{spec.name}: blocks={spec.block}: {spec.architecture} has blocks 0 to {blocks - 1}"
        )
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    for side in patch if isinstance(patch, (tuple, list)) else (patch or 1,):
        # timm would drop the last rows and columns of pixels silently.
        _check_multiple(spec, size, side)
    if spec.norm and not has_final_norm(model):
        raise UsageError(
            f"{spec.name}: norm=true, but {spec.architecture} has no final norm for its tokens"
        )


def _check_multiple(spec: TeacherSpec, size: int, patch: int) -> None:
    if size % patch:
        raise UsageError(
            f"{spec.name}: {size} px is not a multiple of its patch of {patch} px; set :size= or --image-size"
        )


def has_final_norm(model: nn.Module) -> bool:
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
