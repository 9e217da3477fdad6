"""Hooks of mkdocs: the command reference, made from the programs when the site is built.

In commands.md, the line `<!-- commands of PACKAGE -->` is replaced by every command of PACKAGE with its arguments
and options. On every page, a command that is too long for its line does not break within the name of an option.
"""

import importlib
import re
from typing import Any

MARK = re.compile(r"^<!-- commands of (\w+) -->$", flags=re.MULTILINE)
CODE = re.compile(r"<code.*?</code>", flags=re.DOTALL)
OPTION = re.compile(r"(?<=[\s>])--?[a-z][a-z-]*")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this with the text of each page."""
    return MARK.sub(lambda match: reference(match[1]), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """mkdocs calls this with the HTML of each page."""
    whole = r'<span class="whole">\g<0></span>'
    return CODE.sub(lambda match: OPTION.sub(whole, match[0]), content)


def reference(package: str) -> str:
    """Markdown for all commands of a package: heading, description, usage, arguments, options."""
    import typer

    application = importlib.import_module(f"{package}.cli").app
    group: Any = typer.main.get_command(application)
    return "\n\n".join(_command(package, name, group.commands[name]) for name in group.commands)


def _command(package: str, name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    required = [f"{_spelling(p)} {_value(p)}" for p in options if p.required]
    usage = " ".join([package, name, *map(_value, arguments), *required])
    if len(required) < len(options):
        usage += " [OPTIONS]"
    lines = [f"### {package} {name}", " ".join((command.help or "").split())]
    lines.append(f"```text {{.usage}}\n{usage}\n```")
    entries = [_entry(_code(_value(p)), p) for p in arguments]
    entries += [_entry(_names(p), p) for p in options]
    lines.append('<dl class="options" markdown="0">\n' + "\n".join(entries) + "\n</dl>")
    return "\n\n".join(lines)


def _entry(term: str, parameter: Any) -> str:
    text = " ".join((parameter.help or "").split())
    default = _default(parameter)
    return f"<dt>{term}</dt>\n<dd>{_prose(text + default)}</dd>"


def _default(parameter: Any) -> str:
    """The default in brackets, unless the help names it."""
    value = parameter.default
    if parameter.required or value is None or "[default:" in (parameter.help or ""):
        return ""
    if isinstance(value, bool):
        if not parameter.secondary_opts:
            return ""  # a switch that is off
        value = (parameter.opts if value else parameter.secondary_opts)[0]
    return f" [default: {value}]"


def _spelling(parameter: Any) -> str:
    return max(parameter.opts, key=len)


def _names(parameter: Any) -> str:
    """`--out, -o RUN`, or both spellings of a switch."""
    names = ", ".join(_code(name) for name in [*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {_code(_value(parameter))}"


def _value(parameter: Any) -> str:
    """The placeholder of a value: its metavar, else its type."""
    if parameter.metavar:
        return str(parameter.metavar)
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    # An attribute of newer typer releases; older ones use click's `type`.
    descriptor = getattr(parameter, "type_descriptor", None)
    kind = str(descriptor.annotation if descriptor else parameter.type).lower()
    return "INTEGER" if "int" in kind else "NUMBER" if "float" in kind else "TEXT"


def _code(text: str) -> str:
    return f"<code>{_escaped(text)}</code>"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _prose(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _escaped(text))
