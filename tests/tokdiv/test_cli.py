"""The command line as its users meet it: files, exit codes, and one line for each mistake."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fakes import (
    ROOT,
    SIZE,
    coded_tar,
    environment,
    numbers_in_order,
    run_tokdiv,
    similarities,
    teacher_file,
)
from PIL import Image
from typer.testing import CliRunner

import tokdiv
from tokdiv import cli

COUNT = 150
(COLUMN,) = similarities(COUNT, 0.5)
TINY = ["--device", "cpu", "--dtype", "float32", "--image-size", SIZE, "--workers", 2]
COMMANDS = ("teachers", "rank", "maps", "depth")


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coded_tar(tmp_path_factory.mktemp("coded") / "images.tar", COUNT, broken=(9,))


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command in this process: (exit code, stdout, stderr)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tokdiv", *map(str, arguments)])
        code = cli.run(cli.app)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_one_line(stderr: str, said: str) -> None:
    assert "Traceback" not in stderr
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ") and said in lines[0], lines[0]


class TestRank:
    @pytest.fixture(scope="class")
    def run(
        self, coded: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Path, subprocess.CompletedProcess[str]]:
        folder = tmp_path_factory.mktemp("run")
        own = teacher_file(folder / "own.py", COLUMN)
        arguments = ["rank", coded, "-t", "pixels,gray=hog", "--teacher-module", own]
        arguments += ["-t", "noise=timm:test_vit@random", "-o", folder / "RUN", *TINY]
        return folder / "RUN", run_tokdiv(*arguments, "--certify", "none")

    def test_it_ends_well_and_writes_run(
        self, run: tuple[Path, subprocess.CompletedProcess[str]], coded: Path
    ) -> None:
        out, result = run
        assert result.returncode == 0, result.stderr
        ranking = json.loads((out / "ranking.json").read_text())
        assert ranking["best"] == "own"  # the only one that is no baseline
        assert {t["name"] for t in ranking["teachers"]} == {"pixels", "gray", "noise", "own"}
        own = next(t for t in ranking["teachers"] if t["name"] == "own")
        usable = [n for n in numbers_in_order(coded) if n != 9]
        mean = COLUMN[usable].astype(np.float64).mean()
        assert own["mean_similarity"] == pytest.approx(mean, abs=1e-6)
        scores = pd.read_parquet(out / "scores.parquet")
        np.testing.assert_allclose(scores["own"], COLUMN[usable], atol=1e-6)
        with Image.open(out / "similarity.png") as picture:
            assert min(picture.size) > 200

    def test_the_table_is_on_stdout_and_the_winner_last(
        self, run: tuple[Path, subprocess.CompletedProcess[str]]
    ) -> None:
        lines = run[1].stdout.strip().splitlines()
        heads = "RANK TEACHER DIVERSITY SIMILARITY INTERVAL CENTRED 7x7 CORRESP. IMAGES IMAGES/S"
        assert " ".join(lines[0].split()) == heads
        assert lines[1].lstrip().startswith("1 ")
        assert lines[-1].startswith("Best teacher: own (diversity 0.")

    def test_stderr_tells_of_unusable_images_and_of_the_users_code_and_shows_no_bar(
        self, run: tuple[Path, subprocess.CompletedProcess[str]]
    ) -> None:
        lines = run[1].stderr.strip().splitlines()
        assert lines[0].startswith("running your code:")
        assert lines[-1].startswith("warning: unusable images skipped: 1 ")
        assert "skipped.csv" in lines[-1]
        assert len(lines) == 2, run[1].stderr

    def test_best_says_that_the_winner_is_certified(
        self, coded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        own = teacher_file(tmp_path / "own.py", COLUMN)
        arguments = ["rank", coded, "-t", "pixels", "--teacher-module", own, *TINY]
        code, out, _ = call(
            capsys, *arguments, "-o", tmp_path / "R", "--certify", "best", "--allow-baselines"
        )
        assert code == 0
        assert "Winner certified at 0.99 confidence from 64 of 150 images" in out


class TestFailures:
    def test_no_usable_image_is_a_failure(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "images"
        folder.mkdir()
        for name in ("a.jpg", "b.png"):
            (folder / name).write_text("no picture")
        code, _, err = call(capsys, "rank", folder, "-t", "pixels", "-o", tmp_path / "R", *TINY)
        assert code == 1
        assert_one_line(err, "none of the 2 images")

    def test_nan_is_a_failure_that_names_teacher_and_image(
        self, coded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        own = teacher_file(tmp_path / "own.py", COLUMN, spoiled=[33])
        arguments = ["rank", coded, "--teacher-module", own, "-o", tmp_path / "R", *TINY]
        code, _, err = call(capsys, *arguments)
        assert code == 1
        assert_one_line(err.replace(f"running your code: {own}\n", ""), "own gives NaN")
        assert "0033.png" in err

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["-t", "pixels", "-t", "pixels"], "the label 'pixels' names 2 teachers"),
            (["-t", "a=pixels,a=hog"], "the label 'a' names 2 teachers"),
            ([], "no teacher given"),
            (["-t", "dino_resnet51"], "dino_resnet50"),
            (["-t", "timm:no_such_net@random"], "no_such_net"),
            (["-t", "timm:test_vit@gone.pth"], "gone.pth"),
            (["-t", "pixels", "--certify", "all"], "expected one of order, best, none"),
            (
                ["-t", "pixels", "--confidence", "0.5"],
                "--confidence 0.5: expected a number above 0.5 and below 1",
            ),
            (["-t", "pixels", "--confidence", "1"], "--confidence 1.0: expected"),
            (["-t", "pixels", "--confidence", "nan"], "--confidence nan: expected"),
            (["-t", "pixels", "--confidence", "high"], "--confidence"),
            (["-t", "pixels", "--tie", "-0.1"], "--tie -0.1: expected a number of 0 or more"),
            (
                ["-t", "pixels", "--batch-size", "0"],
                "--batch-size 0: expected a whole number of 1 or more, or auto",
            ),
            (["-t", "pixels", "--max-images", "0"], "--max-images 0"),
            (["-t", "pixels", "--workers", "-1"], "--workers -1"),
            (["-t", "pixels", "--seed", "-1"], "--seed -1"),
            (["-t", "pixels", "--dtype", "float16"], "float16"),
            (["-t", "pixels", "--compile", "yes"], "yes"),
            (["-t", "pixels", "--device", "tpu"], "--device tpu"),
            (["-t", "pixels", "--seed", str(2**64)], "--seed 18446744073709551616"),
            (
                ["-t", "pixels", "--batch-size", "many"],
                "--batch-size many: expected a whole number",
            ),
            (["-t", "pixels", "--image-size", "big"], "--image-size big: expected a whole number"),
            (["-t", "pixels", "--image-size", "0"], "--image-size 0: expected a whole number of 1"),
            (["-t", "pixels", "--image-size", "50"], "50 px is not a multiple"),
            (["-t", "timm:test_resnet@random", "--image-size", "32"], "K = 1"),
            (["-t", "pixels", "--no-such-option"], "--no-such-option"),
        ],
    )
    def test_a_mistake_in_the_call_is_one_line_and_exit_code_2(
        self,
        coded: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        said: str,
    ) -> None:
        sizes = [] if "--image-size" in arguments else ["--image-size", SIZE]
        code, out, err = call(capsys, "rank", coded, *arguments, *sizes, "-o", tmp_path / "R")
        assert code == 2 and out == ""
        assert_one_line(err, said)
        assert not (tmp_path / "R").exists()

    @pytest.mark.parametrize(
        ("command", "said"),
        [
            ([], "Missing argument"),
            (["gone"], "gone"),
            (["."], "."),
        ],
    )
    def test_data_that_are_not_there(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        command: list[str],
        said: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("rank", "depth"):
            code, _, err = call(capsys, name, *command, "-t", "pixels", "-o", tmp_path / "R")
            assert code == 2
            assert_one_line(err, said)

    def test_a_missing_run_is_asked_for(
        self, coded: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, _, err = call(capsys, "rank", coded, "-t", "pixels")
        assert code == 2
        assert_one_line(err, "Missing option '--out' / '-o'")

    def test_a_place_below_a_file(
        self, coded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").touch()
        out = tmp_path / "file" / "RUN"
        for command in (["rank", *TINY], ["depth", "--image-size", SIZE]):
            code, _, err = call(capsys, command[0], coded, *command[1:], "-t", "pixels", "-o", out)
            assert code == 2
            assert_one_line(err, "cannot be written to")

    @pytest.mark.parametrize(
        "body", ["pass", "raise ValueError('two\\nlines')", "return 5", "1 / 0"]
    )
    def test_a_teacher_module_that_fails_is_named(
        self, coded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str
    ) -> None:
        file = tmp_path / "own.py"
        file.write_text(f"def make():\n    {body}\n")
        code, _, err = call(
            capsys, "rank", coded, "--teacher-module", f"{file}:make", "-o", tmp_path / "R"
        )
        assert code == 2
        assert_one_line(err.replace(f"running your code: {file}:make\n", ""), f"{file}:make")


class TestMapsAndDepth:
    @pytest.fixture
    def image(self, tmp_path: Path) -> Path:
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image.png")
        return tmp_path / "image.png"

    def test_maps_writes_the_picture_and_says_where(
        self, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "maps.png"
        arguments = ["-t", "pixels", "-o", out, "--image-size", 64, "--query", "0.2,0.9"]
        code, said, err = call(capsys, "maps", image, image, *arguments)
        assert (code, said.strip(), err) == (0, str(out), "")
        assert out.stat().st_size > 1000

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--query", "0.5"], "--query 0.5: expected ROW,COL"),
            (["--query", "a,b"], "expected ROW,COL"),
            (["--query", "0.5,1.5"], "from 0 (top, left)"),
            (["--query", "4,0"], "--query 4,0: the finest grid has 4 x 4 patches"),
            (["--query", "nan,0"], "from 0 (top, left)"),
            (["--dtype", "float64"], "--dtype float64"),
            (["-t", "pixels"], "names 2 teachers"),
        ],
    )
    def test_mistakes_of_maps(
        self,
        image: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        said: str,
    ) -> None:
        out = tmp_path / "o.png"
        code, _, err = call(
            capsys, "maps", image, "-t", "pixels", "-o", out, "--image-size", 64, *arguments
        )
        assert code == 2
        assert_one_line(err, said)
        assert not out.exists()

    def test_depth_prints_its_table(
        self, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "depth"
        arguments = ["-t", "timm:test_vit@random", "-o", out, "--image-size", 64]
        code, said, err = call(capsys, "depth", image.parent, *arguments)
        assert (code, err) == (0, "")
        assert said.split()[:3] == ["teacher", "block", "norm"]
        assert said.strip().splitlines()[-1] == f"figure: {out / 'depth.png'}"


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGUSR1, 143, "terminated"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_a_signal_outside_of_the_measuring_ends_with_its_code(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
    said: str,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(tokdiv, "rank", lambda *a, **k: os.kill(os.getpid(), number))
    try:
        ended, _, err = call(capsys, "rank", "photos", "-t", "pixels", "-o", "RUN")
    except SystemExit as error:
        ended, err = error.code, capsys.readouterr().err
    assert ended == code
    assert_one_line(err, said)
    assert signal.getsignal(signal.SIGTERM) == before


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_and_option_has_help(self, command: str) -> None:
        result = CliRunner().invoke(cli.app, [command, "--help"])
        assert result.exit_code == 0
        assert len(result.stdout) > 100
        import typer.main

        for option in typer.main.get_command(cli.app).commands[command].params:
            assert getattr(option, "help", None) or option.name == "help", option.name

    def test_the_first_page_names_the_commands(self) -> None:
        result = CliRunner().invoke(cli.app, ["--help"])
        assert all(command in result.stdout for command in COMMANDS)

    def test_no_argument_shows_the_help_as_it_is(self) -> None:
        result = run_tokdiv()
        assert "Usage:" in result.stdout + result.stderr
        assert result.returncode == 2 and "error: Usage" not in result.stderr
        assert len((result.stdout + result.stderr).splitlines()) > 5

    @pytest.mark.parametrize(
        "arguments", [["--help"], ["rank", "--help"], ["teachers"], ["--version"]]
    )
    def test_it_comes_without_torch(self, arguments: list[str]) -> None:
        code = (
            f"import sys\n"
            f"sys.argv = ['tokdiv', *{arguments!r}]\n"
            f"from tokdiv import cli\n"
            f"code = cli.run(cli.app)\n"
            f"heavy = {{'torch', 'timm', 'torchvision', 'pandas', 'matplotlib'}} & set(sys.modules)\n"
            f"print(sorted(heavy), file=sys.stderr)\n"
            f"sys.exit(code)\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert (result.returncode, result.stderr) == (0, "[]\n")
        assert result.stdout

    def test_the_zoo_as_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = call(capsys, "teachers", "--json")
        rows = json.loads(out)
        assert code == 0 and len(rows) > 20
        names = {row["name"] for row in rows}
        assert {
            "dino_resnet50",
            "mae_vit_base",
            "mae_vit_large",
            "dino_vit_base",
            "pixels",
        } <= names
        required = {
            "method",
            "architecture",
            "num_tokens",
            "dim",
            "parameters",
            "weights",
            "license",
        }
        assert all(required | {"cached"} <= set(row) for row in rows)
        code, table, _ = call(capsys, "teachers")
        assert code == 0 and all(name in table for name in names)
        assert "paper = mae_vit_base mae_vit_large dino_vit_base dino_resnet50" in table
