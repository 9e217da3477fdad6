"""Arguments of architectures from outside: none reaches a file, other weights, or code."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from tokdiv import TeacherSpec, load_teacher
from tokdiv.errors import UsageError
from tokdiv.teachers.architecture import check_arguments, constructor_arguments, create_model

REFUSED = {
    "checkpoint_path": "/tmp/evil.pth",
    "pretrained": True,
    "pretrained_cfg": {"file": "/tmp/evil.pth"},
    "pretrained_cfg_overlay": {"file": "/tmp/evil.pth"},
    "pretrained_strict": False,
    "cache_dir": "/tmp",
    "scriptable": True,
    "features_only": True,
    "kwargs_filter": "os",
    "no_such": 1,
}


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize(
    "architecture", ["test_vit", "test_resnet", "mobilenetv2_100", "test_byobnet"]
)
def test_arguments_beside_the_constructors_are_refused(architecture: str, key: str):
    with pytest.raises(UsageError, match=f"{architecture} does not take these arguments: '{key}'"):
        create_model(architecture, {key: REFUSED[key]})


def spec(path: Path, folder: Path) -> None:
    load_teacher(f"timm:test_vit@random:checkpoint_path={path}")


def toml(path: Path, folder: Path) -> None:
    file = folder / "t.toml"
    file.write_text(
        f'[[teachers]]\nname = "a"\narchitecture = "test_vit"\nweights = "random"\n'
        f'arguments = {{checkpoint_path = "{path}"}}\n'
    )
    load_teacher(str(file))


def recorded(path: Path, folder: Path) -> None:
    """As ranking.json holds it."""
    fields = {"name": "a", "architecture": "test_vit", "weights": "random"}
    load_teacher(TeacherSpec.from_dict(fields | {"arguments": {"checkpoint_path": str(path)}}))


def yaml(path: Path, folder: Path) -> None:
    from img2vec.config import make_config
    from img2vec.model import make_student

    file = folder / "c.yaml"
    file.write_text(f"student: test_vit\nstudent_args: {{checkpoint_path: {path}}}\n")
    make_student(make_config(file=file))


def config(path: Path, folder: Path) -> None:
    from img2vec.config import Config
    from img2vec.model import make_student

    make_student(Config(student="test_vit", student_args={"checkpoint_path": str(path)}))


def exported(path: Path, folder: Path) -> Path:
    folder = folder / "student"
    folder.mkdir()
    published = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}
    content = {"architecture": "test_vit", "pretrained_cfg": published}
    content["model_args"] = {"checkpoint_path": str(path)}
    (folder / "config.json").write_text(json.dumps(content))
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    safetensors.torch.save_file(state, folder / "model.safetensors")
    return folder


def export_as_teacher(path: Path, folder: Path) -> None:
    load_teacher(f"local-dir:{exported(path, folder)}")


def export_as_model(path: Path, folder: Path) -> None:
    from img2vec.evaluate.encoder import load_encoder

    load_encoder(exported(path, folder))


def export_again(path: Path, folder: Path) -> None:
    from img2vec.export import export

    export(exported(path, folder), folder / "out")


def checkpoint(path: Path, folder: Path) -> None:
    settings = {"student": "test_vit", "student_args": {"checkpoint_path": str(path)}}
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    file = folder / "step-00000001.pt"
    torch.save({"config": settings, "model": {f"encoder.{k}": v for k, v in state.items()}}, file)
    load_teacher(str(file))


ROUTES = [spec, toml, recorded, yaml, config, export_as_teacher, export_as_model, export_again]


@pytest.mark.parametrize("route", [*ROUTES, checkpoint], ids=lambda route: route.__name__)
def test_a_pickle_named_by_an_argument_is_not_read(tmp_path: Path, route: Callable[..., None]):
    path, marker = tmp_path / "evil.pth", tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(marker),)

    path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(UsageError, match="checkpoint_path"):
        route(path, tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        (
            "test_vit",
            {"depth": 2, "drop_path_rate": 0.1, "global_pool": "avg", "init_values": 1e-5},
        ),
        ("test_vit", {"act_layer": "gelu", "class_token": False, "global_pool": "avg"}),
        ("resnet10t", {"channels": [32, 64, 128, 256]}),
        ("mobilenetv2_100", {"pad_type": "same"}),
        ("test_convnext", {"drop_path_rate": 0.1}),
    ],
)
def test_the_constructors_own_arguments_are_taken(architecture: str, arguments: dict):
    with torch.device("meta"):
        create_model(architecture, arguments, num_classes=0)


@pytest.mark.parametrize(
    "arguments",
    [{"act_layer": "os"}, {"block_fn": "os"}, {"mlp_layer": "os"}, {"patch_size": 0}],
)
def test_values_that_the_constructor_cannot_use_are_one_line(arguments: dict):
    with pytest.raises(UsageError, match="cannot make test_vit"):
        create_model("test_vit", arguments)


def test_values_are_plain():
    for value in (os, print, b"x", {1: 2}, [os]):
        with pytest.raises(UsageError, match="expected a number, a text"):
            check_arguments("test_vit", {"act_layer": value})


def test_no_family_takes_files_or_configurations():
    seen = set()
    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        if module not in seen:
            seen.add(module)
            found = constructor_arguments(name)
            assert not found & (set(REFUSED) | {"cfg", "device", "dtype", "pretrained_cfg"}), name
    assert len(seen) > 50 and "timm" in sys.modules


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 10**9},
        {"embed_dim": 10**8},
        {"depth": 1001},
        {"patch_size": [10**6, 1]},
        {"reg_tokens": -(10**9)},
    ],
)
def test_numbers_beyond_all_networks_are_refused(arguments: dict):
    (key,) = arguments
    with pytest.raises(UsageError, match=f"^{key} = .*: expected numbers up to "):
        create_model("test_vit", arguments)
