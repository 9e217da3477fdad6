"""The export: what timm reads back is the student, or nothing is left behind."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import safetensors
import timm
import torch
from small import SMALL, make_model

from img2vec.checkpoint import write_checkpoint
from img2vec.config import make_config
from img2vec.evaluate import load_encoder
from img2vec.export import WEIGHTS, export, export_student, read_student
from img2vec.resume import KIND, Progress
from tokdiv import run_dir
from tokdiv.errors import RunError, UsageError

ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS = {"depth": 2, "embed_dim": 32, "num_heads": 2}
INPUT = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}


def student(size: int = 32, **changes) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(
            ARCHITECTURE, num_classes=0, img_size=size, **{**ARGUMENTS, **changes}
        ).eval()


def write(model: torch.nn.Module, out: Path, size: int = 32, **options) -> Path:
    return export_student(
        model.state_dict(),
        ARCHITECTURE,
        out,
        **{"model_args": ARGUMENTS, "input_size": size, **INPUT, **options},
    )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The mean patch token after the final norm."""
    return model.forward_features(images)[:, 1:].mean(dim=1)


def test_timm_loads_the_folder_with_the_same_tokens_to_the_bit(tmp_path, images):
    model = student()
    out = write(model, tmp_path / "student", description={"teacher": "dino_resnet50"})
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert torch.equal(loaded.forward_features(images), model.forward_features(images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]
    assert sorted(path.name for path in out.iterdir()) == ["config.json", WEIGHTS]
    config = json.loads((out / "config.json").read_text())
    assert config["img2vec"] == {"teacher": "dino_resnet50"}
    with safetensors.safe_open(out / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(model.state_dict())


@pytest.mark.parametrize("more", [{}, {"global_pool": "avg"}, {"fc_norm": False}])
@pytest.mark.parametrize("num_classes", [0, 10])
def test_its_feature_is_the_mean_patch_token_as_in_k_nn(tmp_path, images, more, num_classes):
    model = student()
    torch.nn.init.normal_(model.norm.bias)
    out = write(model, tmp_path / "student")
    loaded = timm.create_model(
        f"local-dir:{out}", pretrained=True, num_classes=num_classes, **more
    ).eval()
    expected = features(model, images)
    found = loaded.forward_head(loaded.forward_features(images), pre_logits=True)
    assert torch.equal(found, expected)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(INPUT[key])[:, None, None] * 255 for key in ("mean", "std"))
    tokens = model.forward_features((pixels - mean) / std)[:, 1:]
    encoder = load_encoder(str(out), device="cpu", dtype="float32")
    torch.testing.assert_close(encoder(pixels), tokens, rtol=1e-4, atol=1e-5)


def test_its_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        out = write(student(), tmp_path / "student")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()} == {
        "config.json": 0o640,
        WEIGHTS: 0o640,
    }
    assert out.stat().st_mode & 0o777 == 0o750


def test_a_path_that_older_timm_cuts_is_exported_all_the_same(tmp_path, monkeypatch):
    import timm.models._factory as factory

    def split(name):  # as in timm 1.0.20
        parsed = urlsplit(name)
        return (parsed.scheme, parsed.path) if parsed.scheme else (None, name)

    monkeypatch.setattr(factory, "parse_model_name", split)
    for name in ("exp#1", "what?", "a b", "x[1]", "{y}%20"):
        out = write(student(), tmp_path / name / "student")
        assert (out / "config.json").is_file()
    assert sorted(p.name for p in (tmp_path / "exp#1").iterdir()) == ["student"]


def test_timm_loads_it_with_a_new_classifier_another_size_or_by_path(tmp_path, images):
    model = student()
    out = write(model, tmp_path / "student")
    classifier = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=10).eval()
    assert classifier(images).shape == (3, 10)
    assert torch.equal(classifier.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    larger = timm.create_model(f"local-dir:{out}", pretrained=True, img_size=64)
    assert larger.pos_embed.shape == (1, 17, 32)
    by_path = timm.create_model(
        ARCHITECTURE, num_classes=0, img_size=32, checkpoint_path=str(out / WEIGHTS), **ARGUMENTS
    ).eval()
    assert torch.equal(by_path(images), model(images))


def test_timms_transforms_follow_the_students_input(tmp_path):
    out = write(student(), tmp_path / "student")
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    data = timm.data.resolve_model_data_config(loaded)
    assert tuple(data["input_size"]) == (3, 32, 32)
    assert tuple(data["mean"]) == INPUT["mean"]
    assert tuple(data["std"]) == INPUT["std"]
    assert data["interpolation"] == "bicubic"
    assert data["crop_pct"] == 0.875


def test_the_configuration_has_the_fields_of_timms_own(tmp_path):
    from timm.models._hub import save_config_for_hf

    model = student()
    out = write(model, tmp_path / "student")
    save_config_for_hf(model, tmp_path / "timms.json")
    own = json.loads((tmp_path / "timms.json").read_text())
    ours = json.loads((out / "config.json").read_text())
    assert set(ours) - {"img2vec"} <= {*own, "model_args"}
    assert set(ours["pretrained_cfg"]) <= {*own["pretrained_cfg"], "pool_size", "tag"}
    for key in ("architecture", "num_classes", "num_features"):
        assert ours[key] == own[key]


def test_half_precision_and_non_contiguous_weights_are_stored_as_float32(tmp_path):
    model = student()
    state = {key: value.half() for key, value in model.state_dict().items()}
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].T.contiguous().T
    out = export_student(
        state, ARCHITECTURE, tmp_path / "s", model_args=ARGUMENTS, input_size=32, **INPUT
    )
    stored = read_student(out)["state_dict"]
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert torch.equal(
        stored["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"].float()
    )


def test_exporting_again_replaces_the_folder(tmp_path, images):
    write(student(), tmp_path / "student")
    other = student()
    torch.nn.init.zeros_(other.norm.weight)
    out = write(other, tmp_path / "student")
    assert torch.equal(
        timm.create_model(f"local-dir:{out}", pretrained=True).norm.weight, other.norm.weight
    )
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_full_disk_is_named_and_leaves_the_older_export_in_place(tmp_path, images, monkeypatch):
    good = student()
    out = write(good, tmp_path / "student")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"student': the disk is full.*free some space"):
            write(student(), out)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert torch.equal(loaded(images), features(good, images))
    left, other = run_dir.part_of(out), run_dir.part_of(tmp_path / "students")
    left.mkdir(), other.mkdir()
    write(good, out)  # removes what a killed export left, and no one else's
    assert sorted(tmp_path.iterdir()) == sorted([other, out])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write '.*file/student': (File exists|Not a dir)"):
        write(good, tmp_path / "file" / "student")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("norm.weight"), "missing norm.weight"),
        (lambda state: state.update(mask_token=torch.zeros(1)), "unexpected mask_token"),
        (lambda state: state.update(cls_token=torch.zeros(1, 1, 8)), r"cls_token is \(1, 1, 8\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, change, message):
    state = dict(student().state_dict())
    change(state)
    with pytest.raises(UsageError, match=f"the weights do not fit {ARCHITECTURE}: {message}"):
        export_student(
            state, ARCHITECTURE, tmp_path / "s", model_args=ARGUMENTS, input_size=32, **INPUT
        )
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_leave_the_older_export_in_place(tmp_path, images):
    good = student()
    out = write(good, tmp_path / "student")
    broken = student()
    broken.blocks[0].mlp.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(RunError, match="was not kept"):
        write(broken, out)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert torch.equal(
        timm.create_model(f"local-dir:{out}", pretrained=True).eval()(images),
        features(good, images),
    )


def test_unknown_architectures_and_arguments_are_named(tmp_path):
    with pytest.raises(UsageError, match="has no architecture 'vit_none'"):
        export_student({}, "vit_none", tmp_path / "s", input_size=32, **INPUT)
    with pytest.raises(
        UsageError, match="vit_tiny_patch16_224 does not take these arguments: 'width'"
    ):
        write(student(), tmp_path / "s", model_args={**ARGUMENTS, "width": 3})
    with pytest.raises(UsageError, match=r"config.json takes numbers, texts, lists and tables"):
        write(student(), tmp_path / "s", description={"a": torch.zeros(1)})


def test_export_leaves_the_generators_alone(tmp_path):
    state = torch.get_rng_state()
    write(student(), tmp_path / "student")
    assert torch.equal(torch.get_rng_state(), state)


def test_export_copies_a_run_or_its_student_folder(tmp_path, images):
    model = student()
    write(model, tmp_path / "run" / "student", description={"epochs": 3})
    for source in ("run", "run/student"):
        out = export(tmp_path / source, tmp_path / "copies" / source.replace("/", "_"))
        loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        assert torch.equal(loaded(images), features(model, images))
        assert json.loads((out / "config.json").read_text())["img2vec"] == {"epochs": 3}


def test_export_refuses_to_write_over_its_source_or_over_something_else(tmp_path):
    write(student(), tmp_path / "run" / "student")
    for out in ("run", "run/student", "."):
        with pytest.raises(UsageError, match="is where the student is read from"):
            export(tmp_path / "run", tmp_path / out)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("a year of work")
    with pytest.raises(UsageError, match="exists and is no exported student"):
        export(tmp_path / "run", tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "a year of work"


def test_export_names_a_source_that_holds_no_student(tmp_path):
    with pytest.raises(UsageError, match="no such file or folder; expected OUT"):
        export(tmp_path / "none", tmp_path / "s")
    folder = write(student(), tmp_path / "student")
    nested = "[" * 10**5 + "]" * 10**5
    for text in ("{}", "[]", "{", nested, '{"architecture": ' + nested + "}", "\xff"):
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UsageError, match="is no timm configuration") as error:
            export(folder, tmp_path / "s")
        assert "\n" not in str(error.value)


def checkpoint_with(arguments: dict) -> dict:
    """The content of a pretraining checkpoint whose student has further arguments."""
    config = make_config(options=SMALL).to_dict()
    config["student_args"] = {"depth": 2, **arguments}
    progress = dataclasses.asdict(Progress())
    parts = {"config": config, "teacher": {"name": "small"}, "data": {}, "progress": progress}
    return {"model": make_model().state_dict(), "optimizer": {}, **parts}


def test_a_checkpoint_is_a_student_for_export_and_evaluation(tmp_path):
    source = tmp_path / "step-00000001.pt"
    content = checkpoint_with({})
    write_checkpoint(source, KIND, content)
    out = export(source, tmp_path / "copy")
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    weight = content["model"]["encoder.blocks.1.mlp.fc1.weight"]
    assert torch.equal(loaded.blocks[1].mlp.fc1.weight, weight)
    encoder = load_encoder(source, device="cpu", dtype="float32")
    assert torch.equal(encoder.module.blocks[1].mlp.fc1.weight, weight)
    assert encoder.size == 64


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "FILE"},
        {"pretrained_cfg": {"file": "FILE"}},
        {"pretrained_cfg_overlay": {"file": "FILE"}},
        {"pretrained": True},
        {"pretrained_strict": False},
        {"cache_dir": "FILE"},
        {"scriptable": True},
        {"features_only": True},
        {"act_layer": "os"},
        {"norm_layer": "torch.load"},
        {"block_fn": "FILE"},
    ],
    ids=str,
)
@pytest.mark.parametrize("route", ["config.json", "checkpoint"])
def test_arguments_that_load_files_are_refused_wherever_they_are_stored(tmp_path, arguments, route):
    """FILE is a pickle that would leave a mark."""

    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"state_dict": Attack()}, tmp_path / "attack.pth")
    text = json.dumps(arguments).replace("FILE", str(tmp_path / "attack.pth"))
    source = write(student(), tmp_path / "student")
    if route == "config.json":
        config = json.loads((source / "config.json").read_text())
        config["model_args"] |= json.loads(text)
        (source / "config.json").write_text(json.dumps(config))
    else:
        source = tmp_path / "step-00000001.pt"
        write_checkpoint(source, KIND, checkpoint_with(json.loads(text)))
    for use in (
        lambda: export(source, tmp_path / "copy"),
        lambda: load_encoder(str(source), device="cpu"),
    ):
        with pytest.raises(UsageError) as error:
            use()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "copy").exists()
