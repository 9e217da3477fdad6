"""Arguments of architectures from outside: none reaches a file, other weights, or code."""

import os
import pickle
import sys

import pytest
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


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/ran-by-a-checkpoint",)


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize(
    "architecture", ["test_vit", "test_resnet", "mobilenetv2_100", "test_byobnet"]
)
def test_arguments_beside_the_constructors_are_refused(architecture: str, key: str):
    with pytest.raises(UsageError, match=f"{architecture} does not take these arguments: '{key}'"):
        create_model(architecture, {key: REFUSED[key]})


def test_a_pickle_named_by_an_argument_is_not_read(tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    for route in (
        lambda: load_teacher(f"timm:test_vit@random:checkpoint_path={path}"),
        lambda: load_teacher(
            TeacherSpec.from_dict(
                {
                    "name": "a",
                    "architecture": "test_vit",
                    "weights": "random",
                    "arguments": {"checkpoint_path": str(path)},
                }
            )
        ),
    ):
        with pytest.raises(UsageError, match="checkpoint_path"):
            route()
    assert not os.path.exists("/tmp/ran-by-a-checkpoint")


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
    import timm

    seen = set()
    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        if module not in seen:
            seen.add(module)
            found = constructor_arguments(name)
            assert not found & (set(REFUSED) | {"cfg", "device", "dtype", "pretrained_cfg"}), name
    assert len(seen) > 50 and "timm" in sys.modules
