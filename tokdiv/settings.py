"""Settings as one dataclass: its fields hold default, help and constraint; the command line is made from them.

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
        if not _is_valid(value, hints[field.name], field.metadata):
            raise UsageError(
                f"{option(field.name)} {value}: expected {expected(hints[field.name], field.metadata)}"
            )


def _is_valid(value: Any, hint: Any, limits: Mapping[str, Any]) -> bool:
    try:
        converted = convert(value, hint)
    except (TypeError, ValueError, OverflowError):
        return False
    if isinstance(value, str) and not isinstance(converted, str):
        return False  # "0.9" would pass here and fail in the first comparison
    entries = value if isinstance(value, (list, tuple)) else [value]
    numbers = [n for n in entries if isinstance(n, (int, float)) and not isinstance(n, bool)]
    return all(_within(number, limits) for number in numbers)


def check_types(record: Any) -> None:
    """Check that the fields of a dataclass that was read from JSON are of their types.

    Fields of other types than numbers, texts and truth values are not looked at.

    Raises:
        ValueError: it names the field and the value.
    """
    simple = (int, float, str, bool)
    for name, hint in typing.get_type_hints(type(record)).items():
        hint = str if isinstance(hint, typing.TypeVar) else hint
        is_simple = all(k in simple or typing.get_origin(k) is Literal for k in _kinds(hint))
        value = getattr(record, name)
        if is_simple and not _is_valid(value, hint, {}):
            raise ValueError(f"{name} = {value!r}: expected {expected(hint)}")


def _within(value: float, limits: Mapping[str, Any]) -> bool:
    return (
        (isinstance(value, int) or math.isfinite(value))
        and value >= limits.get("at_least", -math.inf)
        and value > limits.get("above", -math.inf)
        and value <= limits.get("at_most", math.inf)
        and value < limits.get("below", math.inf)
    )


def convert(value: Any, hint: Any) -> Any:
    """`value` as a value of the annotated type `hint`; ValueError where it is none.

    YAML reads 1e-4 as text and a bare `on` as true; both become what the field wants.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = _kinds(hint)
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
    """What a field takes, in words: "a whole number of 1 or more, or auto"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(expected(kind, metadata) for kind in _kinds(hint))
    if origin is Literal:
        return f"one of {', '.join(arguments)}" if len(arguments) > 1 else str(arguments[0])
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"one or more of: {expected(arguments[0], metadata)}"
    words = {
        "at_least": "of {} or more",
        "above": "above {}",
        "at_most": "at most {}",
        "below": "below {}",
    }
    limits = [text.format(metadata[key]) for key, text in words.items() if key in metadata]
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    kind = names.get(hint, "a table of key: value")
    kind = f"{len(arguments)} numbers" if origin is tuple else kind
    return " ".join([kind, " and ".join(limits)]).strip()


def with_settings(
    settings: type,
    *,
    optional: bool = False,
    only: tuple[str, ...] | None = None,
    leave_out: tuple[str, ...] = (),
    **defaults: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a typer command an option for each field of a dataclass that has a help text.

    The command's parameter `settings` gets the dict of their values, by field.

    Args:
        optional: every option defaults to None, which the command reads as "not given" (where presets
            and files come before).
        only, leave_out: fields with and without an option; by default all have one.
        **defaults: where this command's differ from the dataclass's.
    """
    hints = typing.get_type_hints(settings)
    fields = [
        field
        for field in dataclasses.fields(settings)
        if field.metadata.get("help")
        and field.name not in leave_out
        and (only is None or field.name in only)
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapper(**given: Any) -> Any:
            values = {f.name: _parsed(given.pop(f.name), hints[f.name], f) for f in fields}
            return command(**given, settings=values)

        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.name != "settings"]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        for field in fields:
            default = None if optional else defaults.get(field.name, field.default)
            parameters.append(_parameter(field, hints[field.name], default, optional))
        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def _parameter(
    field: dataclasses.Field[Any], hint: Any, default: Any, optional: bool
) -> inspect.Parameter:
    """The option of a field, as typer wants it in a signature."""
    import typer

    metadata = field.metadata
    kind = str if metadata.get("as_text") else _option_type(hint)
    if kind is str and default is not None:
        default = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    names = [option(field.name)]
    if kind is bool and (optional or default):
        names = [f"{names[0]}/--no-{names[0][2:]}"]
    text = metadata["help"]
    if default is None and metadata.get("shown_default"):
        text = f"{text} [default: {metadata['shown_default']}]"
    given = typer.Option(*names, help=text, metavar=None if kind is bool else _metavar(hint))
    annotation: Any = Annotated[kind | None if default is None else kind, given]  # type: ignore[operator]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _kinds(hint: Any) -> list[Any]:
    """The types of a union but None; of any other type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return [hint]


def _option_type(hint: Any) -> Any:
    """What typer parses; values of several types, and choices, come as text."""
    kinds = {str if typing.get_origin(k) is Literal else k for k in _kinds(hint)}
    return kinds.pop() if len(kinds) == 1 else str


def _metavar(hint: Any) -> str | None:
    """`order|best|none`, `N|auto`; None where typer's own (INTEGER) says it."""
    kinds = _kinds(hint)
    if not any(typing.get_origin(kind) is Literal for kind in kinds):
        return None
    words = [typing.get_args(k) if typing.get_origin(k) is Literal else ("N",) for k in kinds]
    return "|".join(str(word) for group in words for word in group)


def _parsed(value: Any, hint: Any, field: dataclasses.Field[Any]) -> Any:
    """The text of an option as the field's type; ranges and choices are checked by the dataclass."""
    if not isinstance(value, str) or field.metadata.get("as_text") or str in _kinds(hint):
        return value
    try:
        return convert(value, hint)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(
            f"{option(field.name)} {value}: expected {expected(hint, field.metadata)}"
        ) from None
