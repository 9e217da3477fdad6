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
    "--resume --no-resume --teacher --teacher-module --shard --cache-ram --wandb"
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
        (["--mask-ratio", "0"], 2, "--mask-ratio 0.0: expected a number above 0 and below 1"),
        (["--epochs", "some"], 2, "--epochs"),
        (["--dtype", "int8"], 2, "--dtype int8: expected one of auto, float32, bfloat16"),
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


@pytest.fixture
def own_network(tmp_path) -> str:
    """FILE.py:FUNCTION that makes a small network, with what it imports beside it."""
    (tmp_path / "sizes_of_mine.py").write_text("DIM = 12\n")
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "from sizes_of_mine import DIM\n"
        "from tokdiv import Teacher\n"
        "def make(seed=3):\n"
        "    torch.manual_seed(seed)\n"
        "    return Teacher(torch.nn.Conv2d(3, DIM, 16, 16), size=64, name='mine')\n"
        "def other():\n"
        "    return make(4)\n"
    )
    return f"{tmp_path / 'own.py'}:make"


@pytest.fixture
def small_file(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def test_a_teacher_of_the_users_own_code_is_run_said_and_resumed(
    photos, tmp_path, monkeypatch, capsys, own_network, small_file
):
    common = ["pretrain", photos, "--config", small_file, "--teacher-module", own_network]
    for out, steps in (("cut", 2), ("cut", 5), ("whole", 5)):
        assert _call(monkeypatch, *common, "-o", tmp_path / out, "--max-steps", steps) == 0
        said = capsys.readouterr().err
        assert f"running your code: {own_network}" in said
        expected = "mine is made by code of your own: without that code this run cannot be resumed"
        assert expected in said
    assert "resuming" not in said
    cut, whole = (
        [
            json.loads(line)["loss"]
            for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        ]
        for out in ("cut", "whole")
    )
    assert cut == whole and len(cut) == 5
    teacher = json.loads((tmp_path / "whole" / "config.json").read_text())["teacher"]
    assert (teacher["name"], teacher["architecture"]) == ("mine", "custom")

    # Other weights under the same name are another teacher.
    other = own_network.replace(":make", ":other")
    common[-1] = other
    assert _call(monkeypatch, *common, "-o", tmp_path / "cut", "--max-steps", 6) == 2
    assert "was begun with the teacher mine (sha256" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "no teacher given: expected either --teacher SPEC_or_RUN, or --teacher-module"),
        (["-t", "pixels", "--teacher-module", "own.py:make"], "two teachers given"),
        (["--teacher-module", "none.py:make"], "none.py:make: expected FILE.py:FUNCTION"),
    ],
)
def test_it_takes_exactly_one_teacher(photos, tmp_path, monkeypatch, capsys, given, expected):
    assert _call(monkeypatch, "pretrain", photos, "-o", tmp_path / "run", *given) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_ranking_won_by_the_users_own_code_names_the_option_that_brings_it(
    photos, tmp_path, monkeypatch, capsys, own_network
):
    import tokdiv
    from tokdiv.teachers.load import teacher_from_file

    tokdiv.rank(
        photos,
        ["pixels", teacher_from_file(own_network)],
        tmp_path / "ranked",
        image_size=64,
        workers=1,
        device="cpu",
        dtype="float32",
        certify="none",
    )
    for given in (tmp_path / "ranked", tmp_path / "ranked" / "ranking.json"):
        code = _call(
            monkeypatch,
            "pretrain",
            photos,
            "-t",
            given,
            "-o",
            tmp_path / "run",
            "--preset",
            "sample",
        )
        assert code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "its winner 'mine' was made by code of your own" in said
        assert "--teacher-module FILE.py:FUNCTION" in said
    assert not (tmp_path / "run").exists()
