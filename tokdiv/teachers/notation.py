"""The SPEC notation of the command line, and TOML files that list teachers.

    [LABEL=]NAME                a zoo entry, or a group of them
    [LABEL=]timm:MODEL          timm's own pretrained weights
    [LABEL=]timm:ARCH@PATH      a local checkpoint
    [LABEL=]timm:ARCH@URL       one on a server, or @hf-hub:OWNER/REPO
    [LABEL=]timm:ARCH@random    untrained, a baseline
    [LABEL=]hf-hub:OWNER/REPO   a timm export on the hub
    [LABEL=]local-dir:FOLDER    a timm export on this machine; FOLDER alone does as well
    [LABEL=]OUT                 the student of `img2vec pretrain`, or one of its checkpoints
    FILE.toml                   a list of teachers with all their fields

each followed by any number of `:key=value`.
"""

import dataclasses
import itertools
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokdiv.errors import UsageError, first_line
from tokdiv.teachers.exports import WEIGHTS, export_fields, spec_of_path, weights_file_in
from tokdiv.teachers.spec import TeacherSpec, nearest

# Options that are fields of TeacherSpec; any other is an argument of the timm architecture.
OPTIONS = {
    "blocks": "block",
    "weights": "use_ema",
    **{key: key for key in ("mean", "norm", "seed", "size", "std")},
}
REMOTE = ("http://", "https://", "hf-hub:")


def parse_specs(texts: Sequence[str | TeacherSpec]) -> list[TeacherSpec]:
    """Read SPECs, groups and TOML files into specs with unique names.

    Args:
        texts: SPECs in the notation above, each possibly a comma-separated list; a TeacherSpec is taken as it is.

    Raises:
        UsageError: a SPEC that cannot be read, an unknown name, a label given twice, or none at all.
    """
    specs: list[TeacherSpec] = []
    for text in texts:
        if isinstance(text, TeacherSpec):
            specs.append(text)
        else:
            for part in _split_list(text):
                specs.extend(parse_spec(part))
    if not specs:
        raise UsageError(
            "no teacher given: name one with -t, as in -t dino_resnet50 (see: tokdiv teachers)"
        )
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"the label '{name}' names {names.count(name)} teachers: labels must be unique; "
                f"write LABEL=SPEC to name one"
            )
    return specs


def parse_spec(text: str) -> list[TeacherSpec]:
    """One SPEC into one teacher, or into several where it is a group or a TOML file."""
    label, body = _split_label(text.strip())
    base, options = _split_options(body)
    if not base:
        raise UsageError(
            f"'{text}' names no teacher: expected a zoo name, timm:MODEL, timm:ARCH@PATH, a folder or FILE.toml"
        )
    specs = _resolve(base, text)
    if label is not None and len(specs) != 1:
        raise UsageError(f"the label '{label}' cannot name the {len(specs)} teachers of '{base}'")
    # Without a label, options are part of the name: they distinguish a teacher from its siblings.
    suffix = body[len(base) :]
    return [
        _with_options(dataclasses.replace(spec, name=label or spec.name + suffix), options)
        for spec in specs
    ]


def _split_list(text: str) -> list[str]:
    """Split at commas, except inside a path that exists."""
    pieces = text.split(",")
    parts = []
    while pieces:
        counts = range(len(pieces), 1, -1)
        count = next((n for n in counts if _names_a_path(",".join(pieces[:n]))), 1)
        parts.append(",".join(pieces[:count]))
        del pieces[:count]
    return [part for part in parts if part.strip()]


def _names_a_path(text: str) -> bool:
    body = _split_label(text.strip())[1]
    base = body[: _base_end(body)]
    begin = _path_begin(base)
    # A comma after the path starts the next SPEC: no option has one.
    path = None if begin is None else base[begin:]
    return path is not None and "," in path and "," not in body[len(base) :] and _exists(path)


def _path_begin(body: str) -> int | None:
    """Where a path may begin in a SPEC without its label; None where it has none."""
    if body.startswith("timm:"):
        return body.find("@") + 1 or None
    return len("local-dir:") if body.startswith("local-dir:") else 0


def _exists(text: str) -> bool:
    # os.path, because pathlib raises for names that no file can have, such as a long list of SPECs.
    return os.path.exists(os.path.expanduser(text))


def _split_label(text: str) -> tuple[str | None, str]:
    if _exists(text[: _base_end(text)]):
        return None, text  # a path that has a "=" itself
    match = re.match(r"([^=:@/\\,]+)=(.*)", text, flags=re.DOTALL)
    return (match[1].strip(), match[2].strip()) if match else (None, text)


def _cuts(body: str) -> list[int]:
    """Where text that looks like `:key=value` begins."""
    return [match.start() for match in re.finditer(r":[A-Za-z_]\w*=", body)]


def _base_end(body: str) -> int:
    """Where the options begin. The longest stretch that is an existing path is not split."""
    cuts, begin = _cuts(body), _path_begin(body)
    if begin is not None:
        for end in [len(body), *reversed(cuts)]:
            if end > begin and _exists(body[begin:end]):
                return end
    return cuts[0] if cuts else len(body)


def _split_options(body: str) -> tuple[str, dict[str, str]]:
    """A SPEC without its label, split into what it names and its `:key=value` segments."""
    base_end = _base_end(body)
    options: dict[str, str] = {}
    ends = [cut for cut in _cuts(body) if cut >= base_end] + [len(body)]
    for begin, end in itertools.pairwise(ends):
        key, _, value = body[begin + 1 : end].partition("=")
        if key in options:
            raise UsageError(f"the option '{key}' is given twice in '{body}'")
        options[key] = value
    return body[:base_end], options


def _resolve(base: str, text: str) -> list[TeacherSpec]:
    """The teachers that a SPEC without label and options names."""
    from tokdiv.teachers.zoo import GROUPS, ZOO

    if base in ZOO:
        return [ZOO[base]]
    if base in GROUPS:
        return [ZOO[name] for name in GROUPS[base]]
    if base.startswith("timm:"):
        return [_of_timm(base, text)]
    if base.startswith("hf-hub:"):
        # Its architecture is known once its config.json is here: `load.complete` fills it in.
        return [TeacherSpec(base, base, weights=base)]
    if base.endswith(".toml"):
        return _read_toml(Path(os.path.expanduser(base)))
    path = Path(os.path.expanduser(base.removeprefix("local-dir:")))
    if _exists(str(path)):
        if (spec := spec_of_path(path, base)) is not None:
            return [spec]
        if path.is_file():
            remedy = f"for a local checkpoint write timm:ARCH@{base}"
            raise UsageError(f"'{base}' does not say which network it holds; {remedy}")
        if (path / "ranking.json").is_file():
            raise UsageError(f"'{base}' is the folder of a ranking: name one of its teachers")
    if path.is_dir() or base.startswith("local-dir:"):
        kind = (
            "no timm export and no run of img2vec pretrain" if path.is_dir() else "no such folder"
        )
        raise UsageError(f"'{base}': {kind}; expected config.json and model.safetensors in it")
    raise UsageError(
        f"unknown teacher '{base}'{nearest(base, [*ZOO, *GROUPS])}; see them with: tokdiv teachers"
    )


def _of_timm(base: str, text: str) -> TeacherSpec:
    """timm:MODEL, timm:ARCH@random, timm:ARCH@URL or timm:ARCH@PATH."""
    architecture, at, source = base[len("timm:") :].partition("@")
    if not architecture or (at and not source):
        raise UsageError(
            f"'{text}' is incomplete: expected timm:MODEL, timm:ARCH@PATH or timm:ARCH@random"
        )
    if not at or source == "random":
        return TeacherSpec(base, architecture, weights=source or "timm")
    # The folder or host says nothing about the teacher; the file's name often does.
    name = f"timm:{architecture}@{source.rstrip('/').rpartition('/')[2]}"
    if source.startswith(REMOTE):
        return TeacherSpec(name, architecture, weights=source)
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        path = weights_file_in(str(path), text)
    if not os.path.isfile(path):
        raise UsageError(
            f"'{source}' in '{text}': no such file; expected a .pth, .pt or .safetensors file"
        )
    fields: dict[str, Any] = {}
    exported = export_fields(path.parent) if path.name in WEIGHTS else None
    if exported and exported["architecture"].partition(".")[0] == architecture.partition(".")[0]:
        fields = exported | {"architecture": architecture}
    return TeacherSpec(
        name, **({"architecture": architecture} | fields), weights=str(path.resolve())
    )


def _read_toml(path: Path) -> list[TeacherSpec]:
    """Teachers listed as [[teachers]] tables of TeacherSpec's fields; `zoo` starts from a zoo's entry."""
    if not os.path.isfile(path):
        raise UsageError(f"'{path}': no such file; expected a TOML file that lists teachers")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"'{path}' is not valid TOML: {first_line(error)}") from None
    entries = tables.get("teachers")
    listed = isinstance(entries, list) and entries and all(isinstance(e, dict) for e in entries)
    if not isinstance(entries, list) or not listed or set(tables) != {"teachers"}:
        raise UsageError(f"'{path}' must hold one or more [[teachers]] tables and nothing else")
    return [_from_table(dict(entry), path) for entry in entries]


def _from_table(fields: dict[str, Any], path: Path) -> TeacherSpec:
    from tokdiv.teachers.zoo import ZOO

    if "zoo" in fields:
        base = fields.pop("zoo")
        if not isinstance(base, str) or base not in ZOO:
            raise UsageError(f"'{path}': unknown zoo entry '{base}'{nearest(str(base), ZOO)}")
        # The entry's norm is that of its last block; see `_with_options`.
        norm = {"norm": False} if fields.get("block") is not None else {}
        fields = ZOO[base].to_dict() | norm | fields
    spec = TeacherSpec.from_dict(fields)
    weights = spec.weights
    if weights is None:
        return spec if spec.is_handcrafted else dataclasses.replace(spec, weights="timm")
    if weights in ("random", "timm") or weights.startswith((*REMOTE, "package:")):
        return spec
    local = (path.parent / os.path.expanduser(weights)).resolve()
    if not os.path.isfile(local):
        raise UsageError(f"'{path}': the weights '{weights}' of '{spec.name}': no such file")
    return dataclasses.replace(spec, weights=str(local))


def _with_options(spec: TeacherSpec, options: dict[str, str]) -> TeacherSpec:
    """Apply `:key=value` segments."""
    if spec.is_handcrafted and (useless := options.keys() - {"size", "mean", "std"}):
        raise UsageError(
            f"{spec.name}: {spec.architecture} takes size, mean and std, not '{min(useless)}'"
        )
    fields: dict[str, Any] = {"arguments": dict(spec.arguments)}
    for key, text in options.items():
        if key not in OPTIONS:
            fields["arguments"][key] = _literal(text)
        elif key in ("mean", "std") and "/" in text:
            fields[key] = [_literal(part) for part in text.split("/")]
        elif key == "weights":
            if text not in ("ema", "raw"):
                raise UsageError(f"{spec.name}: weights = {text!r}: expected ema or raw")
            fields["use_ema"] = text == "ema"
        else:
            fields[OPTIONS[key]] = _literal(text)
    if fields.get("block") is not None and "norm" not in fields:
        fields["norm"] = False  # the final norm was trained for the last block's output alone
    return dataclasses.replace(spec, **fields)


def _literal(text: str) -> Any:
    """The value of an option: true, false, none, a number, or the text itself."""
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
