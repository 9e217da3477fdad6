"""Which teacher: `TeacherSpec` is what a user asks for, `LoadedSpec` what loading it found out.

No torch and no timm: what only timm knows (mean and std of a model, whether an architecture exists) is filled in
by `tokdiv.teachers.load`.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from tokdiv.errors import UsageError

HANDCRAFTED = ("pixels", "hog")
CUSTOM = "custom"  # the architecture of a user's own module, which a spec alone cannot load again

Triple = tuple[float, float, float]

TEXTS = ("weights", "sha256", "interpolation", "method", "license", "paper")
WHOLE_NUMBERS = {  # smallest and largest value of a field
    "input_size": (1, 8192),
    "size": (1, 8192),
    "block": (0, 10_000),
    "seed": (0, 2**63 - 1),
}
FLAGS = ("norm", "baseline", "use_ema")


@dataclass(frozen=True)
class TeacherSpec:
    """Which teacher, and how to load it. Fields that are None are filled in when it is loaded.

    Attributes:
        name: the label in rankings and pictures; unique within a run.
        architecture: a timm architecture, "pixels", "hog", or "custom" for a user's own module.
        weights: "timm" for timm's own, "hf-hub:OWNER/REPO", an http(s) URL, the path of a local file,
            "package:PATH" for a file that ships with tokdiv, "random", or None (pixels, hog).
        sha256: of the weights' file, in hex. A file with another hash is refused.
        mean, std: of the RGB channels, in units of [0, 1]; one number stands for all three.
        interpolation: of the published evaluation; recorded, not used (every view is bicubic).
        input_size: native side in pixels.
        size: side of the view in pixels; None for the run's.
        block: zero-based index of the block or stage whose output is used; None for the last.
        norm: whether the final norm is applied; None for the default (where there is one, after the last block).
        arguments: further arguments of the timm architecture.
        seed: of untrained weights.
        use_ema: of a file with several copies of the network, whether to take the moving average, momentum network
            or teacher: None where there is one, True always, False never.
        baseline: measured, but never chosen; always true of pixels, hog and untrained networks.

    Raises:
        UsageError: a field of the wrong type or out of range.
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
    use_ema: bool | None = None
    baseline: bool = False
    method: str | None = None
    license: str | None = None
    paper: str | None = None

    def __post_init__(self) -> None:
        for key in ("name", "architecture"):
            text = getattr(self, key)
            if not isinstance(text, str) or not text or not text.isprintable():
                raise UsageError(
                    f"{key} = {text!r} of a teacher: expected a text that can be printed"
                )
        for key, value in vars(self).items():
            if value is None:
                continue
            expected = None
            if key in TEXTS and not isinstance(value, str):
                expected = "a text"
            elif key in FLAGS and not isinstance(value, bool):
                expected = "true or false"
            elif key in WHOLE_NUMBERS:
                least, most = WHOLE_NUMBERS[key]
                if type(value) is not int or not least <= value <= most:
                    expected = f"a whole number from {least} to {most}"
            elif key == "arguments" and not isinstance(value, dict):
                expected = "a table of key = value"
            if expected:
                raise UsageError(f"{self.name}: {key} = {value!r:.80}: expected {expected}")
        for key in ("mean", "std"):
            if (value := getattr(self, key)) is not None:
                object.__setattr__(self, key, triple(key, value, self.name))
        if self.is_handcrafted or self.weights == "random":
            object.__setattr__(self, "baseline", True)

    @property
    def is_handcrafted(self) -> bool:
        """Whether it is pixels or hog, which have no weights."""
        return self.architecture in HANDCRAFTED

    @property
    def is_custom(self) -> bool:
        """Whether it is a user's own module, which cannot be loaded without its code."""
        return self.architecture == CUSTOM

    def identity(self) -> dict[str, Any]:
        """What makes two loaded teachers the same one, whatever their labels and wherever their files.

        Plain JSON types. Equal identities give equal tokens: runs are resumed by this.
        """
        same = (
            "architecture",
            "sha256",
            "mean",
            "std",
            "size",
            "block",
            "norm",
            "arguments",
            "seed",
        )
        found: dict[str, Any] = {key: getattr(self, key) for key in same}
        found["use_ema"] = self.use_ema is not False
        found["weights"] = None if self.sha256 else self.weights
        return json.loads(json.dumps(found))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. A TeacherSpec is also read from what a LoadedSpec wrote.

        Raises:
            UsageError: an unknown, missing or mistyped field.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        recorded = {f.name for f in dataclasses.fields(LoadedSpec)}
        name = fields.get("name", "a teacher")
        for key in fields:
            if key not in recorded:
                raise UsageError(
                    f"{name}: unknown field '{key}' of a teacher{nearest(key, known)}; "
                    f"the fields are {', '.join(sorted(known))}"
                )
        required = [f.name for f in dataclasses.fields(cls) if _is_required(f)]
        if missing := [key for key in required if key not in fields]:
            raise UsageError(f"{name}: the field '{missing[0]}' is missing")
        return cls(**{key: value for key, value in fields.items() if key in known})


@dataclass(frozen=True, kw_only=True)
class LoadedSpec(TeacherSpec):
    """A spec with what loading the teacher found out; mean, std, size, norm and sha256 are filled in as well.

    Attributes:
        num_tokens, dim: K and C of the view.
        parameters: of the network as it is run, without a classifier.
    """

    num_tokens: int
    dim: int
    parameters: int

    @classmethod
    def of(cls, spec: TeacherSpec, **found: Any) -> Self:
        """A spec with fields set to what was found."""
        asked = {f.name: getattr(spec, f.name) for f in dataclasses.fields(TeacherSpec)}
        return cls(**(asked | found))


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def triple(key: str, values: Any, name: str) -> Triple:
    """A mean or std of three channels, from one number or three.

    Raises:
        UsageError: something else.
    """
    numbers = list(values) if isinstance(values, (list, tuple)) else [values]
    if len(numbers) == 1:
        numbers *= 3
    bad = [v for v in numbers if not isinstance(v, (int, float)) or isinstance(v, bool)]
    if len(numbers) != 3 or bad or not all(map(math.isfinite, numbers)):
        raise UsageError(f"{name}: {key} = {values!r:.80}: expected one number or three (R, G, B)")
    low, high = min(numbers), max(numbers)
    if low < 0 or high > 1 or (key == "std" and low == 0):
        red, green, blue = (float(f"{number / 255:.4g}") for number in numbers)
        remedy = f"; of pixels from 0 to 255, {key}={red:g}/{green:g}/{blue:g}" if high > 1 else ""
        kind = "numbers from 0 to 1" if key == "mean" else "positive numbers up to 1"
        raise UsageError(f"{name}: {key} = {values!r:.80}: expected {kind}{remedy}")
    return (float(numbers[0]), float(numbers[1]), float(numbers[2]))


def nearest(word: str, words: Iterable[str]) -> str:
    """' (did you mean a, b?)' for the known words closest to `word`, or nothing."""
    matches = difflib.get_close_matches(word, list(words), n=3, cutoff=0.5)
    return f" (did you mean {', '.join(matches)}?)" if matches else ""
