import dataclasses

import pytest

from img2vec.config import PRESETS, Config, make_config
from tokdiv.errors import UsageError


def test_presets_are_those_of_the_contract():
    assert list(PRESETS) == ["vit_small", "vit_base", "vit_large", "vit_huge", "sample"]
    assert make_config() == PRESETS["vit_base"]
    assert [PRESETS[name].decoder_depth for name in PRESETS] == [2, 2, 4, 4, 2]


def test_a_config_survives_being_written_and_read():
    for config in PRESETS.values():
        assert Config.from_dict(config.to_dict()) == config


def test_yaml_is_read_as_the_fields_types(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(
        "preset: sample\nblr: 1e-4\ncompile: off\nblocks: [2, 5]\nclip-grad: 3\n"
        "student_args: {depth: 4}\ncrop_scale: [0.3, 1]\nlr: null\n"
    )
    config = make_config(file=file)
    assert (config.blr, config.compile, config.blocks, config.clip_grad) == (
        1e-4,
        "off",
        "2,5",
        3.0,
    )
    assert (config.student_args, config.crop_scale, config.lr) == ({"depth": 4}, (0.3, 1.0), None)
    assert config.decoder_dim == PRESETS["sample"].decoder_dim
    assert make_config("vit_base", file).decoder_dim == 512


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: 1.5", "epochs = 1.5: expected a whole number"),
        ("epochs: true", "epochs = True: expected a whole number"),
        ("shard: maybe", "shard = 'maybe': expected true or false"),
        ("align: both", "expected one of pool-student, resample-teacher"),
        ("mean: [0.5]", "mean = .*: expected 3 numbers"),
        ("- epochs", "holds no settings"),
        ("a: [", "is not valid YAML"),
        ("preset: [a]", "unknown preset"),
        ("epochs: .inf", "epochs = inf: expected a whole number"),
        ("weight_decay: .inf", "--weight-decay inf: expected a number of 0 or more"),
        ("global_weight: .nan", "--global-weight nan: expected a number of 0 or more"),
        ("preset: vit_bsae", "unknown preset 'vit_bsae' .did you mean vit_base"),
    ],
)
def test_what_a_file_cannot_mean_is_said_in_one_line(tmp_path, text, expected):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=expected) as caught:
        make_config(file=file)
    assert "\n" not in str(caught.value)


def test_another_student_than_the_presets_is_taken_whole(tmp_path):
    assert make_config("sample").student_args == {"depth": 6}
    named = {"student": PRESETS["sample"].student, "epochs": 3}
    assert make_config("sample", options=named).student_args == {"depth": 6}
    other = {"student": "vit_base_patch32_224"}
    assert make_config("sample", options=other).student_args == {}
    args = {"student_args": {"depth": 3}}
    assert make_config("sample", options=other | args).student_args == {"depth": 3}
    file = tmp_path / "settings.yaml"
    file.write_text("preset: sample\nstudent: vit_small_patch16_224\n")
    assert make_config(file=file).student_args == {}


def test_what_may_change_on_resuming_is_what_does_not_change_the_weights():
    free = {field.name for field in dataclasses.fields(Config) if field.metadata.get("free")}
    assert free == {
        "max_steps", "compile", "checkpoint_blocks", "shard", "device", "workers", "cache_ram", "save_every",
        "keep", "knn_every", "wandb",
    }  # fmt: skip


def test_each_setting_has_a_help_text():
    assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(Config))
