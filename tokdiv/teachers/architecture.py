"""The one place that makes a network of timm's from a name and arguments that came from outside.

A SPEC, a TOML file, a YAML file, ranking.json, an export's config.json and a checkpoint can all name an
architecture with arguments. `timm.create_model` takes arguments that read files (`checkpoint_path` unpickles one)
or load other weights than the run records (`pretrained_cfg_overlay`), so only the model constructor's own
arguments are passed on.
"""

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from tokdiv.errors import UsageError, first_line
from tokdiv.teachers.spec import nearest

# Never passed on, even where a constructor names its argument so.
FORBIDDEN = re.compile(
    r"pretrained|checkpoint|cache|cfg|config|url|hub|file|(?<!drop_)path|^device$|^dtype$"
)


# No network is larger; from a file of others, such numbers would take all memory.
LARGEST, MOST_LAYERS = 65_536, 1_000
COUNTS_LAYERS = re.compile(r"depth|layers|stages|blocks|num_")


def create_model(
    architecture: str, arguments: Mapping[str, Any], name: str = "", **own: Any
) -> Any:
    """Make an untrained network of timm's.

    Args:
        architecture: timm's name.
        arguments: from outside; each must be an argument of the model's constructor.
        name: the teacher's label, for messages.
        own: further arguments that this project sets itself (num_classes, img_size).

    Raises:
        UsageError: an argument that is not the constructor's, or that it cannot use.
        TypeError: the architecture takes no `img_size`, where `own` has one.
    """
    import timm

    check_arguments(architecture, arguments, name)
    prefix = f"{name}: " if name else ""
    try:
        return timm.create_model(architecture, pretrained=False, **own, **arguments)
    except Exception as error:
        if isinstance(error, MemoryError) or (
            isinstance(error, TypeError) and "img_size" in str(error)
        ):
            raise
        size = f" for {own['img_size']} px" if "img_size" in own else ""
        raise UsageError(
            f"{prefix}cannot make {architecture}{size} with {dict(arguments)}: {first_line(error)}"
        ) from None


def check_arguments(architecture: str, arguments: Mapping[str, Any], name: str = "") -> None:
    """Refuse arguments that the architecture's constructor does not have, and all that read files.

    Raises:
        UsageError: it names the argument, and the nearest ones that exist.
    """
    if not arguments:
        return
    prefix = f"{name}: " if name else ""
    allowed = constructor_arguments(architecture)
    for key, value in arguments.items():
        if key not in allowed:
            raise UsageError(
                f"{prefix}{architecture} does not take these arguments: '{key}' is not one of its "
                f"constructor's{nearest(str(key), allowed)}"
            )
        if not _is_plain(value):
            raise UsageError(
                f"{prefix}{key} = {value!r:.80}: expected a number, a text, true, false, or a list of them"
            )
        largest = MOST_LAYERS if COUNTS_LAYERS.search(key) else LARGEST
        if max(map(abs, _numbers(value)), default=0) > largest:
            raise UsageError(f"{prefix}{key} = {value!r:.80}: expected numbers up to {largest}")


def constructor_arguments(architecture: str) -> set[str]:
    """Names of the arguments that the constructors of an architecture's model family take."""
    import timm

    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    names: set[str] = set()
    for _, kind in inspect.getmembers(module, inspect.isclass):
        if issubclass(kind, nn.Module):
            found = set(_parameters(kind))
            names |= found if "num_classes" in found else set()
    return {name for name in names if not FORBIDDEN.search(name)} - {"self", "num_classes"}


def _parameters(kind: type) -> Iterable[str]:
    """Of a constructor, and of those that its **kwargs go on to."""
    for base in kind.__mro__:
        if "__init__" not in vars(base) or base is nn.Module:
            continue
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        yield from (
            p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return


def _numbers(value: Any) -> list[float]:
    if isinstance(value, (list, tuple, dict)):
        entries = value.values() if isinstance(value, dict) else value
        return [number for entry in entries for number in _numbers(entry)]
    return [value] if isinstance(value, (int, float)) else []


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    return value is None or isinstance(value, (bool, int, float, str))
