"""Folders and files that say themselves which network they hold: timm's exports, and runs of img2vec pretrain."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_networks import MEAN, STD, Server, bare_tokens, network, prefixed, saved
from torch import Tensor

from tokdiv import load_teacher, parse_specs
from tokdiv.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

ARGUMENTS = {"depth": 3}
CONFIG: dict[str, Any] = {
    "architecture": "test_vit",
    "num_classes": 0,
    "model_args": {"img_size": 64, "num_classes": 0, **ARGUMENTS},
    "pretrained_cfg": {"input_size": [3, 64, 64], "mean": MEAN, "std": STD, "license": "mit"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that relative paths are ours."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return network("test_vit", img_size=64, num_classes=0, **ARGUMENTS)


def export(model: torch.nn.Module, folder: Path, config: dict[str, Any] = CONFIG) -> Path:
    """As timm's save_for_hf and img2vec write it."""
    folder.mkdir(parents=True)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check(spec: str, model: torch.nn.Module, images: Tensor) -> None:
    teacher = load_teacher(spec, image_size=64)
    expected = bare_tokens(model, images)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-4)
    assert (teacher.spec.architecture, teacher.spec.arguments) == ("test_vit", ARGUMENTS)
    assert teacher.spec.input_size == 64
    again = load_teacher(type(teacher.spec).from_dict(teacher.spec.to_dict()))
    assert torch.equal(again(images), teacher(images))


@pytest.mark.parametrize(
    "spec",
    [
        "local-dir:{}",
        "mine=local-dir:{}",
        "local-dir:{}:mean=0.485/0.456/0.406",
        "{}",
        "{}/",
        "{}/model.safetensors",
        "timm:test_vit@{}/model.safetensors",
        "timm:test_vit@{}",
    ],
)
@pytest.mark.parametrize("name", ["student", "a:b=c, d"])
def test_a_timm_export_brings_its_architecture(model, images: Tensor, folder, spec: str, name: str):
    export(model, folder / name)
    check(spec.format(name), model, images)


def test_the_student_of_a_run_is_found(model, images: Tensor, folder: Path):
    export(model, folder / "runs" / "pretrain" / "student")
    (folder / "runs" / "pretrain" / "config.json").write_text('{"config": {}}')
    check("runs/pretrain", model, images)
    check(str(folder / "runs" / "pretrain"), model, images)


def checkpoint(model: torch.nn.Module, path: Path) -> Path:
    """As img2vec pretrain writes it: the encoder in the model, its configuration, a hash at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder = prefixed("encoder.", model.state_dict())
    config = {"student": "test_vit", "student_args": ARGUMENTS, "image_size": 64}
    state = {
        "model": encoder | {"decoder.weight": torch.ones(2, 2), "mask_token": torch.ones(8)},
        "optimizer": {k: {"exp_avg": v + 1, "step": torch.tensor(1.0)} for k, v in encoder.items()},
        "config": config | {"mean": MEAN, "std": STD},
        "progress": {"step": 3},
    }
    saved(state, path)
    with path.open("ab") as file:
        file.write(b"\nsha256:" + b"0" * 64 + b"\n")
    return path


@pytest.mark.parametrize("spec", ["OUT", "OUT/checkpoints", "OUT/checkpoints/step-00000003.pt"])
def test_a_run_that_was_not_finished_stands_for_its_last_checkpoint(
    model, images: Tensor, folder: Path, spec: str
):
    checkpoint(network("test_vit", img_size=64), folder / "OUT/checkpoints/step-00000001.pt")
    checkpoint(model, folder / "OUT/checkpoints/step-00000003.pt")
    (folder / "OUT" / "config.json").write_text('{"config": {"student": "test_vit"}}')
    check(spec, model, images)


def test_the_pointer_names_the_last_checkpoint(model, images: Tensor, folder: Path):
    checkpoint(model, folder / "OUT/checkpoints/step-00000001.pt")
    (folder / "OUT/checkpoints/step-00000003.pt").write_bytes(b"not finished")
    (folder / "OUT/checkpoints/last").write_text("step-00000001.pt\n")
    check("OUT", model, images)


def test_of_a_student_that_was_trained_with_its_average_the_student_is_taken(
    model, images: Tensor, folder: Path
):
    path = checkpoint(model, folder / "step-00000001.pt")
    state = torch.load(path, weights_only=True)
    state["ema"] = {k: v + 1 for k, v in state["model"].items()}
    check(str(saved(state, path)), model, images)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "config.json' is damaged"),
        ("[" * 100_000, "config.json' is damaged"),
        ("[]", "config.json' is damaged"),
        ("{}", "no timm export and no run of img2vec pretrain"),
        ('{"architectures": ["ViTModel"]}', "no timm export"),
        ('{"architecture": "test_vit"}', "is no configuration of a timm export: KeyError"),
        (
            '{"architecture": "test_vit", "pretrained_cfg": []}',
            "is no configuration of a timm export",
        ),
        (
            json.dumps(CONFIG | {"architecture": 5}),
            "architecture = 5 of a teacher: expected a text",
        ),
        (json.dumps(CONFIG | {"architecture": "x" * 9}), "timm has no model 'xxxxxxxxx'"),
        (
            json.dumps(CONFIG | {"model_args": {"checkpoint_path": "/x"}}),
            "'checkpoint_path' is not one",
        ),
        (
            json.dumps(CONFIG | {"model_args": {"depth": 10**9}}),
            "depth = 1000000000: expected numbers up to 1000",
        ),
        (
            json.dumps(
                CONFIG | {"pretrained_cfg": CONFIG["pretrained_cfg"] | {"mean": [123, 1, 1]}}
            ),
            "expected numbers from 0 to 1",
        ),
    ],
)
def test_a_damaged_or_hostile_configuration_is_one_line(model, folder, config: str, said: str):
    export(model, folder / "student")
    (folder / "student" / "config.json").write_text(config)
    with pytest.raises(UsageError) as caught:
        load_teacher("local-dir:student")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_export_is_told_what_was_expected(folder: Path):
    (folder / "photos").mkdir()
    (folder / "RUN").mkdir()
    (folder / "RUN" / "ranking.json").write_text("{}")
    for text, said in (
        ("photos", "'photos': no timm export and no run of img2vec pretrain; expected config.json"),
        ("local-dir:gone", "'local-dir:gone': no such folder"),
        ("RUN", "'RUN' is the folder of a ranking: name one of its teachers"),
        ("timm:resnet18@photos", "a folder, not a checkpoint; expected a .pth"),
    ):
        with pytest.raises(UsageError) as caught:
            parse_specs([text])
        assert said in str(caught.value)


def test_folders_of_other_tools_are_told_how_to_go_on(folder: Path):
    (folder / "dcp").mkdir()
    (folder / "dcp" / "__0_0.distcp").write_bytes(b"x")
    (folder / "several").mkdir()
    (folder / "several" / "last.pth").write_bytes(b"x")
    for name, said in (
        ("dcp", "torch.distributed.checkpoint.format_utils dcp_to_torch dcp weights.pth"),
        ("several", "name a file in it, as several/last.pth"),
    ):
        with pytest.raises(UsageError) as caught:
            parse_specs([f"timm:resnet18@{name}"])
        assert said in str(caught.value)


def test_an_export_of_another_architecture_does_not_bring_its_arguments(model, folder: Path):
    export(model, folder / "student")
    spec = parse_specs(["timm:test_vit2@student/model.safetensors"])[0]
    assert (spec.architecture, spec.arguments, spec.mean) == ("test_vit2", {}, None)


def test_a_timm_export_comes_from_the_hub(model, images: Tensor, folder, hub: Path, server: Server):
    """Its config.json is read from the cache of huggingface_hub, as its weights are."""
    snapshot = hub / "hub" / "models--owner--name" / "snapshots" / ("1" * 40)
    export(model, snapshot)
    check("hf-hub:owner/name", model, images)
    teacher = load_teacher("mine=hf-hub:owner/name:mean=0.1:qkv_bias=true:blocks=1", image_size=64)
    assert teacher.spec.weights == "hf-hub:owner/name" and teacher.spec.sha256
    assert (teacher.spec.mean, teacher.spec.arguments) == (
        (0.1,) * 3,
        {"depth": 3, "qkv_bias": True},
    )
