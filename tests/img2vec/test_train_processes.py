"""Several processes over gloo, started as torchrun starts them, through the command line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from small import SMALL

from img2vec.resume import load_last

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def _start(world: int, arguments: list[str]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "img2vec", "pretrain", *arguments],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def _finish(started: list[subprocess.Popen], code: int = 0) -> list[str]:
    said = []
    for process in started:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors[-3000:]
        said.append(output + errors)
    return said


def _run(world: int, *arguments: object, code: int = 0) -> list[str]:
    return _finish(_start(world, [str(a) for a in arguments]), code)


def _metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_with_half_the_batch_give_the_losses_of_one(photos, tmp_path, settings):
    # Not a large learning rate: AdamW makes steps of its full size of gradients that are rounding
    # errors alone, so that at larger rates two orders of summation drift apart.
    common = [photos, "-t", "pixels", "--config", settings, "--epochs", 10, "--max-steps", 20]
    common += ["--lr", 3e-4]
    alone = _start(1, [str(a) for a in (*common, "--batch-size", 8, "-o", tmp_path / "one")])
    _run(2, *common, "--batch-size", 4, "-o", tmp_path / "two")
    _finish(alone)
    one, two = _metrics(tmp_path / "one"), _metrics(tmp_path / "two")
    assert [line["step"] for line in two] == list(range(1, 21))
    for a, b in zip(one, two):
        for key in ("loss", "patch_loss", "global_loss"):
            assert a[key] == pytest.approx(b[key], abs=1e-5)
        assert a["lr"] == b["lr"]
        assert b["images"] == 8
    assert one[-1]["loss"] < one[0]["loss"] - 0.005


def test_sharded_and_accumulated_the_losses_are_the_same(photos, tmp_path, settings):
    common = [photos, "-t", "hog", "--config", settings, "--epochs", 5]
    alone = _start(
        1, [str(a) for a in (*common, "--max-steps", 6, "--batch-size", 8, "-o", tmp_path / "one")]
    )
    split = [*common, "--batch-size", 2, "--accumulate", 2, "--shard", "--knn-every", 1]
    split += ["--clip-grad", 100, "-o", tmp_path / "two"]
    _run(2, *split, "--max-steps", 4)
    _finish(alone)
    _run(2, *split, "--max-steps", 6)  # resumed, sharded again
    one, two = _metrics(tmp_path / "one"), _metrics(tmp_path / "two")
    measured = [line for line in two if "loss" not in line]
    assert [line["step"] for line in measured] == [3, 6]
    two = [line for line in two if "loss" in line]
    assert [line["step"] for line in two] == list(range(1, 7))
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    first, second = (load_last(tmp_path / name)[1] for name in ("one", "two"))
    for name, value in first["model"].items():
        torch.testing.assert_close(value, second["model"][name], atol=1e-4, rtol=1e-3)
    assert set(first["optimizer"]) == set(second["optimizer"])
    assert (tmp_path / "two" / "student" / "model.safetensors").is_file()


def test_another_number_of_processes_goes_on_at_the_next_epoch(photos, tmp_path, settings):
    common = [photos, "-t", "pixels", "--config", settings, "-o", tmp_path / "run"]
    _run(1, *common, "--max-steps", 4, "--batch-size", 8)  # one step into the second epoch
    said = _run(2, *common, "--batch-size", 4)
    assert "begun on 1 processes, now there are 2: on to the next epoch" in said[0]
    lines = _metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3]


def test_a_signal_to_one_process_ends_all_of_them_after_saving(photos, tmp_path, settings):
    out = tmp_path / "run"
    common = [photos, "-t", "pixels", "--config", settings, "--epochs", 5000, "-o", out]
    started = _start(2, [str(a) for a in common])
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size:
            break
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    said = _finish(started, 143)
    step = _metrics(out)[-1]["step"]
    assert f"interrupted after step {step}" in said[0]
    assert load_last(out)[1]["progress"]["step"] == step


def test_a_mistake_is_said_once_and_exit_code_2_on_every_process(photos, tmp_path, settings):
    wrong = [photos, "-t", "pixels", "--config", settings, "-o", tmp_path]  # holds small.yaml
    first, second = _run(2, *wrong, code=2)
    assert "not empty and holds no run" in first.splitlines()[-1]
    assert "Traceback" not in first + second
