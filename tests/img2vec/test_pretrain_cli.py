import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small import SMALL
from typer.testing import CliRunner

import img2vec.cli as cli
from tokdiv.cli import run

ROOT = Path(__file__).parents[2]
CONTRACT = (
    "--preset --config --student --epochs --max-steps --batch-size --accumulate --blr --lr --warmup-epochs "
    "--weight-decay --mask-ratio --mask-unit --decoder-depth --decoder-dim --blocks --global-weight "
    "--target-norm --align --image-size --device --dtype --compile --workers --seed --save-every --keep "
    "--resume --no-resume --teacher --shard --cache-ram --wandb"
)


def _call(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["img2vec", *(str(a) for a in arguments)])
    return run(cli.app)


def test_help_shows_the_commands_without_loading_torch():
    code = (
        "import sys; sys.argv = ['img2vec', '--help']; import img2vec.cli;"
        "from tokdiv.cli import run; run(img2vec.cli.app);"
        "assert not {'torch', 'timm', 'matplotlib'} & set(sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True
    )
    for command in ("pretrain", "knn", "probe", "finetune", "export"):
        assert command in shown.stdout


def test_every_option_of_the_contract_is_there():
    shown = CliRunner().invoke(cli.app, ["pretrain", "--help"], env={"COLUMNS": "200"}).stdout
    words = set(shown.replace(",", " ").split())
    assert not [option for option in CONTRACT.split() if option not in words]


def test_options_go_before_the_file_and_the_file_before_the_preset(
    photos, tmp_path, monkeypatch, capsys
):
    settings = tmp_path / "small.yaml"
    settings.write_text(yaml.safe_dump(SMALL | {"preset": "sample", "epochs": 3}))
    out = tmp_path / "run"
    code = _call(
        monkeypatch, "pretrain", photos, "--teacher", "pixels", "-o", out, "--config", settings,
        "--max-steps", 2, "--batch-size", 6,
    )  # fmt: skip
    assert code == 0
    used = json.loads((out / "config.json").read_text())["config"]
    assert (used["batch_size"], used["epochs"], used["mask_unit"]) == (6, 3, 16)
    assert used["mask_ratio"] == 0.6
    printed = capsys.readouterr().out
    assert f"Student: {out / 'student'}" in printed


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--mask-ratio", "0"], 2, "--mask-ratio 0.0: expected a number between 0 and 1"),
        (["--epochs", "some"], 2, "--epochs"),
        (["--dtype", "int8"], 2, "dtype = 'int8': expected one of auto, float32, bfloat16"),
        (["--config", "none.yaml"], 2, "'none.yaml': no such file"),
        (["--student", "resnet18"], 2, "plain VisionTransformer"),
        (["--teacher", "pixles"], 2, "pixels"),
        (["--device", "cuda"], 2, "--device cuda: torch sees no CUDA device"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    photos, tmp_path, monkeypatch, capsys, arguments, code, expected
):
    common = ["pretrain", photos, "--preset", "sample", "-o", tmp_path / "run"]
    teacher = [] if "--teacher" in arguments else ["--teacher", "pixels"]
    assert _call(monkeypatch, *common, *teacher, *arguments) == code
    errors = capsys.readouterr().err.splitlines()
    assert expected in errors[-1]
    assert len(errors) == 1


def test_an_unknown_key_of_the_file_names_the_nearest(photos, tmp_path, monkeypatch, capsys):
    settings = tmp_path / "typo.yaml"
    settings.write_text("mask_ration: 0.5\n")
    common = ["pretrain", photos, "-t", "pixels", "-o", tmp_path / "run", "--config", settings]
    assert _call(monkeypatch, *common) == 2
    assert "unknown setting 'mask_ration' (did you mean mask_ratio" in capsys.readouterr().err
