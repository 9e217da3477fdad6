"""Settings as a dataclass: one statement of default, help and range makes the options and the check."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from tokdiv.errors import UsageError
from tokdiv.settings import check_settings, check_types, convert, expected, setting, with_settings


@dataclass(frozen=True)
class Settings:
    """Of every kind of field."""

    count: int | None = setting(None, "How many.", at_least=1, shown_default="all")
    rate: float = setting(0.5, "How fast.", above=0, at_most=1)
    size: int | Literal["auto"] = setting("auto", "How large.", at_least=1)
    mode: Literal["on", "off"] = setting("on", "Which way.")
    name: str = setting("x", "What it is called.")
    wide: bool = setting(False, "Whether it is wide.")
    long: bool = setting(True, "Whether it is long.")
    sizes: tuple[int, ...] = setting((1, 2), "Some sizes.", at_least=1, as_text=True)
    hidden: dict[str, Any] = setting({})

    def __post_init__(self) -> None:
        check_settings(self)


def call(*arguments: str, **options: Any) -> dict[str, Any]:
    """What a command gets for its settings."""
    app, got = typer.Typer(), []

    @app.command()
    @with_settings(Settings, **options)
    def command(data: str, settings: dict[str, Any]) -> None:
        got.append(settings)

    result = CliRunner().invoke(app, ["DATA", *arguments])
    if isinstance(result.exception, UsageError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return got[0]


def test_without_options_the_command_gets_the_defaults() -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(Settings) if f.name != "hidden"}
    assert call() == defaults | {"sizes": "1,2"}  # the command reads this one itself


def test_options_become_values_of_the_types_of_the_fields() -> None:
    options = "--count 3 --rate 1 --size 7 --mode off --name 5 --wide --no-long --sizes 4,5"
    assert call(*options.split()) == {
        "count": 3, "rate": 1.0, "size": 7, "mode": "off", "name": "5", "wide": True, "long": False,
        "sizes": "4,5",
    }  # fmt: skip


def test_a_command_may_have_some_of_the_fields_and_other_defaults() -> None:
    assert call(only=("size", "mode"), size=64) == {"size": 64, "mode": "on"}
    assert "mode" not in call(leave_out=("mode",))


def test_where_other_sources_come_first_nothing_given_is_none() -> None:
    assert set(call(optional=True).values()) == {None}
    assert call("--no-wide", "--size", "auto", optional=True)["wide"] is False


@pytest.mark.parametrize("text", ["many", "1.5", "", "-"])
def test_text_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises(
        UsageError, match=f"--size {text}: expected a whole number of 1 or more, or auto"
    ):
        call("--size", text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 0), ("count", 1.5), ("count", "1"), ("count", True), ("count", -1),
        ("rate", 0), ("rate", 1.1), ("rate", float("nan")), ("rate", float("inf")), ("rate", "0.5"), ("rate", None),
        ("rate", 10**400), ("size", 0), ("size", "none"), ("size", None), ("mode", "maybe"), ("mode", None),
        ("name", None), ("name", {}), ("wide", 1), ("wide", "true"), ("sizes", (0,)), ("sizes", ()), ("sizes", 5),
        ("hidden", []),
    ],
)  # fmt: skip
def test_a_value_out_of_its_type_or_range_names_the_option(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"--{field} .*: expected "):
        Settings(**{field: value})


@pytest.mark.parametrize(
    "field", [{"count": 10**300}, {"rate": 1}, {"size": "auto"}, {"count": None}]
)
def test_values_within_their_range_are_taken(field: dict[str, Any]) -> None:
    Settings(**field)


def test_yaml_s_readings_are_converted() -> None:
    assert convert("1e-4", float) == 1e-4
    assert convert(True, Literal["on", "off"]) == "on"
    assert convert([2, 5], str) == "2,5"
    assert (
        expected(int, {"at_least": 1, "at_most": 9}) == "a whole number of 1 or more and at most 9"
    )


def test_help_and_default_are_on_the_help_page() -> None:
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @with_settings(Settings)
    def command(settings: dict[str, Any]) -> None:
        pass

    text = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output.split())
    for part in (
        "How many. [default: all]",
        "on|off",
        "N|auto",
        "--long",
        "--no-long",
        "Whether it is wide.",
    ):
        assert part in text
    assert "--no-wide" not in text and "hidden" not in text


def test_records_from_json_are_checked_by_type_alone() -> None:
    @dataclass
    class Record:
        name: str
        value: float
        state: Literal["a", "b"]
        other: list[int]

    check_types(Record("x", 1, "a", []))
    check_types(Record("x", 1, "a", "not looked at"))  # type: ignore[arg-type]
    for wrong in (
        Record(1, 1, "a", []),
        Record("x", "1", "a", []),
        Record("x", float("nan"), "a", []),
    ):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"(name|value) = .*: expected"):
            check_types(wrong)
