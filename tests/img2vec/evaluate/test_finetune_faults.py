"""Fine-tuning on full disks, with damaged checkpoints, and with two processes in one folder."""

import errno
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from img2vec.checkpoint import read_checkpoint, write_checkpoint
from img2vec.evaluate import finetune
from img2vec.evaluate.finetune import KIND
from tokdiv import run_dir
from tokdiv.errors import RunError, UsageError

FAST = {"epochs": 2, "batch_size": 16, "warmup_epochs": 1, "workers": 1, "dtype": "float32"}


@pytest.fixture(scope="module")
def cut(pictures, tiny, tmp_path_factory) -> Path:
    """A fine-tuning that ended after the first of its two epochs."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    module = sys.modules["img2vec.evaluate.finetune"]

    def write_and_stop(*arguments):
        write_checkpoint(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_checkpoint", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(tiny, *pictures, folder, **FAST)
    assert (folder / "checkpoint.pt").is_file()
    return folder


@pytest.fixture
def run(cut, tmp_path) -> Path:
    return Path(shutil.copytree(cut, tmp_path / "run"))


def fill_disk(monkeypatch, after: int) -> None:
    """Every file takes so many bytes; then the disk is full."""
    written = {}
    write = run_dir._Watched.write

    def limited(self, data):
        written[self.file] = written.get(self.file, 0) + memoryview(data).nbytes
        if written[self.file] > after:
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.error
        return write(self, data)

    monkeypatch.setattr(run_dir._Watched, "write", limited)


@pytest.mark.parametrize("after", [0, 100_000])
def test_a_full_disk_is_named_and_leaves_the_checkpoint_before_it(
    run, pictures, tiny, monkeypatch, after
):
    before = (run / "checkpoint.pt").read_bytes()
    assert len(before) > 100_000
    with monkeypatch.context() as patch:
        fill_disk(patch, after)
        with pytest.raises(RunError, match=r"checkpoint\.pt': the disk is full.*free some space"):
            finetune(tiny, *pictures, run, **FAST)
    assert (run / "checkpoint.pt").read_bytes() == before
    assert sorted(p.name for p in run.iterdir()) == [".lock", "checkpoint.pt"]
    assert len(finetune(tiny, *pictures, run, **FAST).history) == 2


def test_every_flipped_bit_of_a_checkpoint_is_refused(run, pictures, tiny):
    path = run / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    draw = np.random.default_rng(0)
    positions = [*draw.integers(0, len(content), 100), *range(len(content) - 73, len(content))]
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(draw.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(UsageError):
            read_checkpoint(path, KIND)
    with pytest.raises(
        UsageError, match=r"delete it to start anew, or give another folder with -o"
    ):
        finetune(tiny, *pictures, run, **FAST)
    path.write_bytes(content[:-1000])
    with pytest.raises(UsageError, match=r"checkpoint\.pt' is no complete checkpoint"):
        finetune(tiny, *pictures, run, **FAST)


def forge(state, kind):
    weights, moments = state["model"], state["optimizer"]
    if kind == "a moment of another shape":
        moments["head.weight"]["exp_avg"] = torch.zeros(2, 2)
    elif kind == "a weight of another dtype":
        weights["head.bias"] = weights["head.bias"].double()
    elif kind == "a missing weight":
        del weights["head.bias"]
    elif kind == "no optimizer":
        del state["optimizer"]
    elif kind == "progress of other fields":
        state["progress"] = {"history": []}
    elif kind == "progress that is none":
        state["progress"] = [1, 2, 3]
    elif kind == "a history of other entries":
        state["progress"]["history"] = ["an epoch"]
    else:
        state["progress"]["history"] *= 10**3


@pytest.mark.parametrize(
    "kind",
    [
        "a moment of another shape",
        "a weight of another dtype",
        "a missing weight",
        "no optimizer",
        "progress of other fields",
        "progress that is none",
        "a history of other entries",
        "more epochs than there are",
    ],
)
def test_a_forged_checkpoint_is_refused_in_one_line(run, pictures, tiny, kind):
    path = run / "checkpoint.pt"
    state = read_checkpoint(path, KIND)
    forge(state, kind)
    write_checkpoint(path, KIND, {k: v for k, v in state.items() if k not in ("format", "kind")})
    with pytest.raises(UsageError, match="delete it to start anew") as error:
        finetune(tiny, *pictures, run, **FAST)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_pretraining_is_none_of_fine_tuning(run, pictures, tiny):
    path = run / "checkpoint.pt"
    write_checkpoint(path, "img2vec pretrain", {"model": {}})
    with pytest.raises(UsageError, match=r"is no checkpoint of img2vec finetune; delete it"):
        finetune(tiny, *pictures, run, **FAST)


def test_two_fine_tunings_do_not_share_a_folder(run, pictures, tiny):
    with (
        run_dir.locked(run / ".lock", wait=False),
        pytest.raises(UsageError, match=r"-o .*run: another process is writing to it; wait for it"),
    ):
        finetune(tiny, *pictures, run, **FAST)


def test_what_a_killed_run_left_is_removed(run, pictures, tiny):
    left = run_dir.part_of(run / "checkpoint.pt")
    left.write_bytes(b"half a checkpoint")
    folder = run_dir.part_of(run / "model")
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half a model")
    finetune(tiny, *pictures, run, **FAST)
    assert sorted(p.name for p in run.iterdir()) == [
        ".lock",
        "model",
        "results.csv",
        "results.json",
    ]


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_named(pictures, tiny, tmp_path, out):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"-o .*file.*give a"):
        finetune(tiny, *pictures, tmp_path / out, **FAST)
