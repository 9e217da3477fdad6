"""TeacherSpec and LoadedSpec: checked fields, JSON and back, and what makes two teachers the same."""

import dataclasses
import json

import pytest
import timm

from tokdiv.errors import UsageError
from tokdiv.teachers.spec import LoadedSpec, TeacherSpec
from tokdiv.teachers.zoo import ZOO

SPEC = TeacherSpec(
    "full",
    "vit_tiny_patch16_224",
    "/w.pth",
    sha256="ab12",
    mean=(0.1, 0.2, 0.3),
    std=(0.5, 0.5, 0.5),
    input_size=256,
    size=64,
    block=3,
    norm=True,
    arguments={"depth": 4, "channels": [1, 2]},
    seed=4,
)
LOADED = LoadedSpec.of(SPEC, num_tokens=16, dim=192, parameters=5)


def through_json(spec: TeacherSpec) -> dict:
    return json.loads(json.dumps(spec.to_dict()))


@pytest.mark.parametrize("spec", [SPEC, LOADED, *ZOO.values()], ids=lambda spec: spec.name)
def test_a_spec_survives_json(spec: TeacherSpec):
    assert type(spec).from_dict(through_json(spec)) == spec


def test_a_loaded_spec_is_a_spec_and_is_read_as_one():
    assert isinstance(LOADED, TeacherSpec)
    assert TeacherSpec.from_dict(through_json(LOADED)) == SPEC
    assert through_json(LOADED) == through_json(SPEC) | {
        "num_tokens": 16,
        "dim": 192,
        "parameters": 5,
    }
    again = LoadedSpec.of(LOADED, size=32, num_tokens=4, dim=192, parameters=5)
    assert (again.size, again.num_tokens) == (32, 4)


def test_a_spec_that_was_not_loaded_is_no_loaded_spec():
    with pytest.raises(UsageError, match="full: the field 'num_tokens' is missing"):
        LoadedSpec.from_dict(through_json(SPEC))


def test_an_unknown_field_of_a_recorded_spec_is_a_mistake():
    with pytest.raises(UsageError, match=r"unknown field 'nam' of a teacher \(did you mean name"):
        TeacherSpec.from_dict({"nam": "a", "architecture": "resnet18"})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": 0}, "t: size = 0: expected a whole number from 1 to 8192"),
        ({"size": 2.0}, "t: size = 2.0: expected a whole number"),
        ({"seed": True}, "t: seed = True: expected a whole number from 0 to"),
        ({"norm": 1}, "t: norm = 1: expected true or false"),
        ({"mean": (0.1, 0.2)}, "expected one number or three"),
        ({"std": 0}, "expected positive numbers up to 1"),
        ({"std": (0.2, -0.2, 0.2)}, "expected positive numbers up to 1"),
        ({"mean": -0.1}, "expected numbers from 0 to 1"),
        ({"mean": 1.01}, "expected numbers from 0 to 1"),
        (
            {"mean": (123.675, 116.28, 103.53)},
            "expected numbers from 0 to 1; of pixels from 0 to 255, mean=0.485/0.456/0.406",
        ),
        ({"std": (58.395, 57.12, 57.375)}, "of pixels from 0 to 255, std=0.229/0.224/0.225"),
        ({"seed": 2**64}, "expected a whole number from 0 to"),
        ({"size": 1_000_000}, "expected a whole number from 1 to 8192"),
        ({"weights": 5}, "t: weights = 5: expected a text"),
        ({"arguments": [1]}, "expected a table of key = value"),
        ({"name": ""}, "name = '' of a teacher: expected a text that can be printed"),
        ({"name": "a\x00b"}, r"name = 'a\x00b' of a teacher: expected a text that can be printed"),
        ({"name": "a\nb"}, "expected a text that can be printed"),
        ({"name": "\x1b[31m"}, "expected a text that can be printed"),
        ({"name": "\udcff"}, "expected a text that can be printed"),
        ({"architecture": None}, "architecture = None of a teacher: expected a text"),
    ],
)
def test_fields_are_checked_however_a_spec_is_made(fields: dict, said: str):
    good = {"name": "t", "architecture": "resnet18"}
    for make in (
        lambda: TeacherSpec(**good | fields),
        lambda: TeacherSpec.from_dict(good | fields),
    ):
        with pytest.raises(UsageError) as caught:
            make()
        assert said in str(caught.value)
    with pytest.raises(UsageError):
        dataclasses.replace(SPEC, **fields)


def test_every_mean_and_std_that_timm_publishes_is_in_range():
    for name in timm.list_pretrained():
        published = timm.get_pretrained_cfg(name)
        TeacherSpec("t", name, mean=tuple(published.mean), std=tuple(published.std))


def test_handcrafted_and_untrained_networks_are_baselines():
    assert TeacherSpec("t", "hog").baseline and TeacherSpec("t", "hog").is_handcrafted
    assert TeacherSpec("t", "resnet18", "random").baseline
    assert TeacherSpec("t", "resnet18", "timm", baseline=True).baseline
    assert not TeacherSpec("t", "resnet18", "timm").baseline
    assert TeacherSpec("t", "custom").is_custom and not SPEC.is_custom


def test_the_same_teacher_under_another_label_and_path_is_the_same():
    moved = dataclasses.replace(LOADED, name="other", weights="/elsewhere.pth", method="ours")
    assert moved.identity() == SPEC.identity() == LOADED.identity()
    assert TeacherSpec.from_dict(through_json(LOADED)).identity() == LOADED.identity()
    assert json.loads(json.dumps(SPEC.identity())) == SPEC.identity()


@pytest.mark.parametrize(
    "fields",
    [
        {"architecture": "resnet18"},
        {"sha256": "cd34"},
        {"sha256": None},
        {"mean": 0.5},
        {"std": 0.4},
        {"size": 32},
        {"block": None},
        {"norm": False},
        {"arguments": {"depth": 5}},
        {"seed": 5},
    ],
)
def test_what_changes_tokens_changes_the_identity(fields: dict):
    assert dataclasses.replace(SPEC, **fields).identity() != SPEC.identity()


def test_without_a_hash_the_weights_are_known_by_name():
    first, second = (TeacherSpec("t", "resnet18", weights) for weights in ("timm", "random"))
    assert first.identity() != second.identity()
