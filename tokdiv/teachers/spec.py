"""Which teacher: `TeacherSpec`, and the SPEC notation of the command line that describes one.

    [LABEL=]NAME              an entry of the zoo, or a group of them
    [LABEL=]timm:MODEL        timm's own pretrained weights
    [LABEL=]timm:ARCH@PATH    a local checkpoint
    [LABEL=]timm:ARCH@random  untrained, a baseline
    FILE.toml                 a list of teachers with all their fields

each followed by any number of `:key=value`. This module needs neither torch nor timm: what only timm knows
(mean and std of a model, whether an architecture exists) is filled in by `tokdiv.teachers.teacher`.
"""

import dataclasses
import difflib
import itertools
import math
import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tokdiv.errors import UsageError

HANDCRAFTED = ("pixels", "hog")
CUSTOM = "custom"  # the architecture of a user's own module, which a spec alone cannot load again

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class TeacherSpec:
    """All that is needed to load a teacher again; unknown fields are None until it is loaded once.

    Attributes:
        name: the label in rankings and pictures; unique within a run.
        architecture: a timm architecture, "pixels", "hog", or "custom" for a user's own module.
        weights: "hf-hub:OWNER/REPO", an http(s) URL, the path of a local file, "package:PATH" for a file
            that ships with tokdiv, "random", or None where there are none (pixels, hog).
        sha256: of the weights' file, in hex. A file with another one is refused.
        mean, std: of the RGB channels, in units of [0, 1].
        interpolation: that of the published evaluation; recorded, not used (every view is bicubic).
        input_size: native side in pixels.
        size: side of the view in pixels; None for the run's own.
        block: zero-based index of the block or stage whose output is used; None for the last.
        norm: whether the final norm is applied; None for the default (where there is one, after the
            last block).
        arguments: further arguments of the timm architecture.
        seed: of untrained weights.
        baseline: pixels, hog and untrained networks: measured, but not chosen.
        num_tokens, dim: K and C; the zoo's K is that of 224 px, a loaded teacher's that of its view.
        parameters: of the backbone, without a classifier.
    """

    name: str
    architecture: str
    weights: str | None = None
    sha256: str | None = None
    mean: Triple | None = None
    std: Triple | None = None
    interpolation: str = "bicubic"
    input_size: int | None = None
    size: int | None = None
    block: int | None = None
    norm: bool | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    baseline: bool = False
    method: str | None = None
    license: str | None = None
    paper: str | None = None
    num_tokens: int | None = None
    dim: int | None = None
    parameters: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; raises UsageError for an unknown, missing or mistyped field."""
        known = {f.name for f in dataclasses.fields(cls)}
        name = fields.get("name", "a teacher")
        for key in fields:
            if key not in known:
                raise UsageError(
                    f"{name}: unknown field '{key}' of a teacher{nearest(key, known)}; "
                    f"the fields are {', '.join(sorted(known))}"
                )
        for key in ("name", "architecture"):
            if not isinstance(fields.get(key), str) or not fields[key]:
                raise UsageError(f"{name}: the field '{key}' is missing or not a text")
        values = dict(fields)
        for key in ("mean", "std"):
            if values.get(key) is not None:
                values[key] = _triple(key, values[key], name)
        for key in ("size", "input_size", "block", "seed"):
            value = values.get(key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise UsageError(f"{name}: {key} = {value!r} is not a whole number")
            least = 0 if key in ("block", "seed") else 1
            if value is not None and value < least:
                raise UsageError(f"{name}: {key} = {value}: expected {least} or more")
        for key in ("weights", "sha256", "interpolation", "method", "license", "paper"):
            if values.get(key) is not None and not isinstance(values[key], str):
                raise UsageError(f"{name}: {key} = {values[key]!r} is not a text")
        for key in ("norm", "baseline"):
            if values.get(key) is not None and not isinstance(values[key], bool):
                raise UsageError(f"{name}: {key} = {values[key]!r} is neither true nor false")
        if not isinstance(values.get("arguments", {}), dict):
            raise UsageError(
                f"{name}: arguments = {values['arguments']!r} is no table of key = value"
            )
        spec = cls(**values)
        if spec.architecture in HANDCRAFTED or spec.weights == "random":
            spec = dataclasses.replace(spec, baseline=True)
        return spec


def nearest(word: str, words: Iterable[str]) -> str:
    """' (did you mean a, b?)' for the known words closest to `word`, or nothing."""
    matches = difflib.get_close_matches(word, list(words), n=3, cutoff=0.5)
    return f" (did you mean {', '.join(matches)}?)" if matches else ""


def parse_specs(texts: Sequence["str | TeacherSpec"]) -> list[TeacherSpec]:
    """Read SPECs, groups and TOML files into specs with unique names.

    Args:
        texts: SPECs in the notation above, each possibly a comma-separated list; a TeacherSpec is taken
            as it stands.

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
            f"'{text}' names no teacher: expected a zoo name, timm:MODEL, timm:ARCH@PATH or FILE.toml"
        )
    specs = _resolve(base, body, text)
    if label is not None and len(specs) != 1:
        raise UsageError(f"the label '{label}' cannot name the {len(specs)} teachers of '{base}'")
    renamed = []
    for spec in specs:
        # Options distinguish a teacher from its siblings, so they are part of the name it gets by itself.
        suffix = body[len(base) :] if label is None else ""
        spec = dataclasses.replace(spec, name=label or spec.name + suffix)
        renamed.append(_with_options(spec, options))
    return renamed


def _split_list(text: str) -> list[str]:
    """Split at commas, except inside the path of a file that exists."""
    pieces = text.split(",")
    parts = []
    while pieces:
        counts = range(len(pieces), 1, -1)
        count = next((n for n in counts if _names_a_file(",".join(pieces[:n]))), 1)
        parts.append(",".join(pieces[:count]))
        del pieces[:count]
    return [part for part in parts if part.strip()]


def _names_a_file(text: str) -> bool:
    body = _split_label(text.strip())[1]
    base = body[: _base_end(body)]
    path = base.partition("@")[2] if base.startswith("timm:") else base
    # A comma behind the path starts the next SPEC: no option has one.
    return "," in path and "," not in body[len(base) :] and _is_file(path)


def _is_file(text: str) -> bool:
    # os.path, because pathlib raises for names that no file can have, as a long list of SPECs.
    return os.path.isfile(os.path.expanduser(text))


def _split_label(text: str) -> tuple[str | None, str]:
    if _is_file(text[: _base_end(text)]):
        return None, text  # a file whose own name has a "="
    match = re.match(r"([^=:@/\\,]+)=(.*)", text, flags=re.DOTALL)
    return (match[1].strip(), match[2].strip()) if match else (None, text)


def _cuts(body: str) -> list[int]:
    """Where text that looks like `:key=value` begins."""
    return [match.start() for match in re.finditer(r":[A-Za-z_]\w*=", body)]


def _base_end(body: str) -> int:
    """Where the options begin; the longest stretch that is an existing path stays whole."""
    cuts = _cuts(body)
    start = body.find("@") + 1 if body.startswith("timm:") else 0
    if start or not body.startswith("timm:"):
        for end in [len(body), *reversed(cuts)]:
            if end > start and _is_file(body[start:end]):
                return end
    return cuts[0] if cuts else len(body)


def _split_options(body: str) -> tuple[str, dict[str, str]]:
    """What a SPEC without its label names, and its `:key=value` segments."""
    base_end = _base_end(body)
    options: dict[str, str] = {}
    ends = [cut for cut in _cuts(body) if cut >= base_end] + [len(body)]
    for begin, end in itertools.pairwise(ends):
        key, _, value = body[begin + 1 : end].partition("=")
        if key in options:
            raise UsageError(f"the option '{key}' is given twice in '{body}'")
        options[key] = value
    return body[:base_end], options


def _resolve(base: str, body: str, text: str) -> list[TeacherSpec]:
    """The teachers that a SPEC without label and options names."""
    from tokdiv.teachers.zoo import GROUPS, ZOO

    if base in ZOO:
        return [ZOO[base]]
    if base in GROUPS:
        return [ZOO[name] for name in GROUPS[base]]
    if base.startswith("timm:"):
        architecture, at, source = base[len("timm:") :].partition("@")
        if not architecture or (at and not source):
            raise UsageError(
                f"'{text}' is incomplete: expected timm:MODEL, timm:ARCH@PATH or timm:ARCH@random"
            )
        if not at:
            return [TeacherSpec(name=base, architecture=architecture, weights="timm")]
        if source == "random":
            return [
                TeacherSpec(name=base, architecture=architecture, weights="random", baseline=True)
            ]
        path = Path(os.path.expanduser(source))
        if not _is_file(source):
            kind = "a folder, not a checkpoint" if os.path.isdir(path) else "no such file"
            raise UsageError(
                f"'{source}' in '{text}': {kind}; expected a .pth, .pt or .safetensors file"
            )
        # The folder says nothing about the teacher; the file's name often does.
        name = f"timm:{architecture}@{path.name}"
        return [TeacherSpec(name=name, architecture=architecture, weights=str(path.resolve()))]
    if base.endswith(".toml"):
        return _read_toml(Path(os.path.expanduser(base)))
    remedy = "see them with: tokdiv teachers"
    if _is_file(base):
        remedy = f"for a local checkpoint write timm:ARCH@{base}"
    raise UsageError(f"unknown teacher '{base}'{nearest(base, [*ZOO, *GROUPS])}; {remedy}")


def _read_toml(path: Path) -> list[TeacherSpec]:
    """Teachers listed as [[teachers]] tables of TeacherSpec's fields; `zoo` starts from a zoo's entry."""
    from tokdiv.teachers.zoo import ZOO

    if not os.path.isfile(path):
        raise UsageError(f"'{path}': no such file; expected a TOML file that lists teachers")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is not valid TOML: {error}") from None
    entries = tables.get("teachers")
    listed = isinstance(entries, list) and entries and all(isinstance(e, dict) for e in entries)
    if not isinstance(entries, list) or not listed or set(tables) != {"teachers"}:
        raise UsageError(f"'{path}' must hold one or more [[teachers]] tables and nothing else")
    specs = []
    for entry in entries:
        fields = dict(entry)
        if "zoo" in fields:
            base = fields.pop("zoo")
            if not isinstance(base, str) or base not in ZOO:
                raise UsageError(f"'{path}': unknown zoo entry '{base}'{nearest(str(base), ZOO)}")
            # The entry's norm is that of its last block; see `_with_options`.
            norm = {"norm": False} if fields.get("block") is not None else {}
            fields = ZOO[base].to_dict() | norm | fields
        weights = fields.get("weights")
        elsewhere = ("http://", "https://", "hf-hub:", "package:")
        if isinstance(weights, str) and not weights.startswith(elsewhere):
            if weights not in ("random", "timm"):
                local = (path.parent / os.path.expanduser(weights)).resolve()
                if not os.path.isfile(local):
                    raise UsageError(
                        f"'{path}': the weights '{weights}' of '{fields.get('name')}': no such file"
                    )
                fields["weights"] = str(local)
        elif weights is None and fields.get("architecture") not in HANDCRAFTED:
            fields["weights"] = "timm"
        specs.append(TeacherSpec.from_dict(fields))
    return specs


def _with_options(spec: TeacherSpec, options: dict[str, str]) -> TeacherSpec:
    """Apply `:key=value` segments; a key that is none of ours is an argument of the architecture."""
    fields: dict[str, Any] = {}
    arguments = dict(spec.arguments)
    for key, text in options.items():
        if key == "blocks":
            fields["block"] = _whole(key, text, spec.name, least=0)
        elif key == "size":
            fields["size"] = _whole(key, text, spec.name, least=1)
        elif key == "seed":
            fields["seed"] = _whole(key, text, spec.name, least=0)
        elif key == "norm":
            if text.lower() not in ("true", "false"):
                raise UsageError(f"{spec.name}: norm={text}: expected true or false")
            fields["norm"] = text.lower() == "true"
        elif key in ("mean", "std"):
            try:
                numbers = [float(part) for part in text.split("/")]
            except ValueError:
                raise UsageError(
                    f"{spec.name}: {key}={text}: expected a number, or three joined with '/'"
                ) from None
            fields[key] = _triple(key, numbers, spec.name)
        else:
            arguments[key] = _literal(text)
    if spec.architecture in HANDCRAFTED:
        useless = [key for key in options if key not in ("size", "mean", "std")]
        if useless:
            raise UsageError(
                f"{spec.name}: {spec.architecture} takes size, mean and std, not '{useless[0]}'"
            )
    if fields.get("block") is not None and "norm" not in fields:
        fields["norm"] = False  # an intermediate block's output was never meant for the final norm
    return dataclasses.replace(spec, arguments=arguments, **fields)


def _whole(key: str, text: str, name: str, least: int) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise UsageError(f"{name}: {key}={text}: expected a whole number, {least} or more")
    return int(text)


def _triple(key: str, values: Any, name: str) -> Triple:
    numbers = list(values) if isinstance(values, (list, tuple)) else [values]
    if len(numbers) == 1:
        numbers *= 3
    bad = [v for v in numbers if not isinstance(v, (int, float)) or isinstance(v, bool)]
    if len(numbers) != 3 or bad or not all(map(math.isfinite, numbers)):
        raise UsageError(f"{name}: {key} = {values!r}: expected one number or three (R, G, B)")
    if key == "std" and min(numbers) <= 0:
        raise UsageError(f"{name}: std = {values!r}: expected positive numbers")
    return (float(numbers[0]), float(numbers[1]), float(numbers[2]))


def _literal(text: str) -> Any:
    """The value of an architecture's argument: true, false, none, a number, or the text itself."""
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
