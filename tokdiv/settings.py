"""Settings as one dataclass: its fields hold default, help and constraint, and the command line is made from them.

@dataclass(frozen=True)
class Settings:
    tie: float = setting(0.002, "A gap below this is a tie.", at_least=0, below=1)

    def __post_init__(self) -> None:
        check_settings(self)

@app.command()
@with_settings(Settings)
def rank(data: Data, settings: dict[str, Any]) -> None: ...
"""

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from tokdiv.errors import UsageError


def setting(
    default: Any,
    help: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    **metadata: Any,
) -> Any:
    """A dataclass field with its help text and its constraint.

    Args:
        default: its value; a list or dict is copied for each instance.
        help: of the option on the command line; "" leaves it out there.
        at_least, above, at_most, below: range of a number.
        metadata: `as_text` (the option is read as text, by the command), `shown_default` (what help gives as
            the default), and whatever else the dataclass's own code looks up.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata |= {"help": help, **{k: v for k, v in limits.items() if v is not None}}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def option(name: str) -> str:
    """A field's spelling on the command line."""
    return "--" + name.replace("_", "-")


def check_settings(settings: Any) -> None:
    """Check every field of a dataclass against its type and its constraint.

    Raises:
        UsageError: it names the option, the value and what was expected.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        try:
            convert(value, hints[field.name])
        except (TypeError, ValueError, OverflowError):
            raise UsageError(
                f"{option(field.name)} {value!r}: expected {expected(hints[field.name], field.metadata)}"
            ) from None
        numbers = [
            entry
            for entry in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(entry, (int, float)) and not isinstance(entry, bool)
        ]
        if not all(_within(number, field.metadata) for number in numbers):
            raise UsageError(
                f"{option(field.name)} {value}: expected {expected(hints[field.name], field.metadata)}"
            )


def _within(value: float, limits: Mapping[str, Any]) -> bool:
    return (
        math.isfinite(value)
        and value >= limits.get("at_least", -math.inf)
        and value > limits.get("above", -math.inf)
        and value <= limits.get("at_most", math.inf)
        and value < limits.get("below", math.inf)
    )


def convert(value: Any, hint: Any) -> Any:
    """`value` as an annotated type; ValueError where it is none.

    YAML reads 1e-4 as text and a bare `on` as true; both become what the field wants.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        for kind in kinds[:-1]:
            try:
                return convert(value, kind)
            except (TypeError, ValueError, OverflowError):
                continue
        return convert(value, kinds[-1])
    if origin is Literal:
        value = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        if value not in arguments:
            raise ValueError
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(value) != len(arguments):
            raise ValueError
        return tuple(convert(v, a) for v, a in zip(value, arguments))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError
        return dict(value)
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError
        return value
    if isinstance(value, bool) or (hint is int and float(value) != int(value)):
        raise ValueError
    if hint is str:
        if isinstance(value, (list, tuple)):
            return ",".join(str(v) for v in value)  # blocks: [2, 5, 8, 11]
        if not isinstance(value, (str, int, float)):
            raise ValueError
    return hint(value)


def expected(hint: Any, metadata: Mapping[str, Any] = types.MappingProxyType({})) -> str:
    """What a field takes, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in arguments if a is not type(None)]
        return " or ".join(expected(kind, metadata) for kind in kinds)
    if origin is Literal:
        return (f"one of {', '.join(arguments)}") if len(arguments) > 1 else repr(arguments[0])
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"one or more of: {expected(arguments[0], metadata)}"
    words = {
        "at_least": "{} or more",
        "above": "above {}",
        "at_most": "at most {}",
        "below": "below {}",
    }
    limits = [text.format(metadata[key]) for key, text in words.items() if key in metadata]
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    kind = names.get(hint, "a table of key: value")
    return ", ".join([f"{len(arguments)} numbers" if origin is tuple else kind, *limits])


def with_settings(
    settings: type, *, optional: bool = False, leave_out: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a typer command an option for each field of a dataclass that has a help text.

    The command's parameter `settings` becomes the dict of their values, by field.

    Args:
        optional: every option defaults to None, which the command reads as "not given" (as where presets
            and files come before).
        leave_out: fields without an option.
    """
    import typer

    hints = typing.get_type_hints(settings)
    fields = {
        f.name: f
        for f in dataclasses.fields(settings)
        if f.metadata.get("help") and f.name not in leave_out
    }

    def parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
        metadata = field.metadata
        default = None if optional else field.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        kind = str if metadata.get("as_text") else _option_type(hints[field.name])
        if default is None:
            kind = kind | None
        names = [option(field.name)]
        if kind in (bool, bool | None):
            names = [f"{names[0]}/--no-{names[0][2:]}"]
        text = metadata["help"]
        if metadata.get("shown_default"):
            text = f"{text} [default: {metadata['shown_default']}]"
        annotation: Any = Annotated[kind, typer.Option(*names, help=text)]  # type: ignore[valid-type]
        return inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.name != "settings"]

        @functools.wraps(command)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = {name: kwargs.pop(name) for name in fields if name in kwargs}
            return command(*args, settings=given, **kwargs)

        options = [parameter(field) for field in fields.values()]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        made = [*own, *options]
        wrapper.__signature__ = signature.replace(parameters=made)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in made}
        return wrapper

    return decorate


def _option_type(hint: Any) -> Any:
    """What typer parses: the choices of a Literal are checked with the other constraints."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = {_option_type(a) for a in arguments if a is not type(None)}
        return kinds.pop() if len(kinds) == 1 else str
    return str if origin is Literal else hint
