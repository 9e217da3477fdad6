"""What a run tells Weights & Biases: to a stand-in that takes notes, and, where installed, to the real one."""

import json
import sys
import types
from pathlib import Path

import pytest
from small import SMALL

import img2vec
import img2vec.log
import img2vec.step
import img2vec.train
from tokdiv.dist import current_processes
from tokdiv.errors import UsageError


class Reporter(types.ModuleType):
    """As much of wandb as is used. Where `reachable` is False, an online start fails."""

    class errors:  # noqa: N801
        class Error(Exception):
            pass

    class Settings:
        model_fields = ("init_timeout", "finish_timeout")

        def __init__(self, **settings):
            self.settings = settings

    def __init__(self, reachable=True):
        super().__init__("wandb")
        self.reachable = reachable
        self.started, self.logged, self.axes, self.ended = [], [], [], []

    def init(self, mode="online", **options):
        if mode == "online" and not self.reachable:
            raise self.errors.Error("Timed out.\nConsider increasing")
        self.started.append(options | {"mode": mode})
        return self

    def teardown(self):
        self.ended.append("service")

    def define_metric(self, name, step_metric):
        self.axes.append((name, step_metric))

    def log(self, values, step=None):
        assert step is None, "wandb's own counter cannot go back after a kill"
        self.logged.append(values)

    def finish(self, exit_code):
        self.ended.append(exit_code)


@pytest.fixture
def reporter(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    stand_in = Reporter()
    monkeypatch.setitem(__import__("sys").modules, "wandb", stand_in)
    monkeypatch.setattr(img2vec.log, "check_wandb", lambda: None)
    monkeypatch.setattr(img2vec.train, "check_wandb", lambda: None)
    return stand_in


def _pretrain(data: Path, out: Path, **options):
    return img2vec.pretrain(data, "pixels", out, **(SMALL | {"wandb": True} | options))


def test_a_resumed_run_goes_on_under_its_id_and_another_has_another(photos, tmp_path, reporter):
    _pretrain(photos, tmp_path / "a" / "run", max_steps=12, knn_every=1)
    _pretrain(photos, tmp_path / "a" / "run", max_steps=20, knn_every=1, keep=5)
    _pretrain(photos, tmp_path / "b" / "run", max_steps=1)
    first, second, other = reporter.started
    assert (
        first["id"] == second["id"] != other["id"]
    )  # not the folder's name, which others may have
    assert first["name"] == other["name"] == "run"
    assert first["resume"] == "allow"
    assert first["project"] == "img2vec"
    assert first["config"]["mask_ratio"] == 0.6
    assert first["config"]["teacher"]["name"] == "pixels"
    assert second["config"]["keep"] == 5 and second["allow_val_change"]
    assert reporter.ended == [0, 0, 0]
    assert reporter.axes == [("*", "step")] * 3
    json.dumps(first["config"])
    lines = [
        json.loads(line)
        for line in (tmp_path / "a" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    shown = {v["step"]: v["train/loss"] for v in reporter.logged[:-1] if "train/loss" in v}
    assert shown == {step: losses[step] for step in (1, 10, 20)}
    measured = {line["step"]: line["knn_accuracy"] for line in lines if "loss" not in line}
    key = "evaluation/knn_accuracy"
    assert {v["step"]: v[key] for v in reporter.logged if key in v} == measured
    assert len(measured) == 3


@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_failed_run_is_marked_as_failed(photos, tmp_path, reporter, monkeypatch, failure):
    def fails(*arguments):
        raise failure

    monkeypatch.setattr(img2vec.step, "image_losses", fails)
    with pytest.raises(type(failure)):
        _pretrain(photos, tmp_path / "run")
    assert reporter.ended == [1]


def test_what_cannot_be_reached_is_recorded_offline_with_a_remark(
    photos, tmp_path, reporter, caplog
):
    reporter.reachable = False
    _pretrain(photos, tmp_path / "run", max_steps=1)
    assert [(s["mode"], s["resume"]) for s in reporter.started] == [("offline", "allow")]
    expected = "Weights & Biases: Timed out; the run is recorded offline: upload it with"
    assert expected in caplog.text
    assert reporter.started[0]["settings"].settings["init_timeout"] <= 60
    assert reporter.ended == ["service", 0]


def test_without_the_option_nothing_is_reported(photos, tmp_path, reporter):
    _pretrain(photos, tmp_path / "run", max_steps=1, wandb=False)
    assert not reporter.started and not (tmp_path / "run" / "wandb").exists()


def test_not_installed_it_is_a_mistake_before_anything_is_written(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(img2vec.log.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--wandb: wandb is not installed; pip install wandb"):
        _pretrain(photos, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_picture_that_cannot_be_drawn_costs_no_run(photos, tmp_path, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(img2vec.log, "plot_loss", full)
    result = _pretrain(photos, tmp_path / "run", max_steps=1, wandb=False)
    assert (result.student / "model.safetensors").is_file()
    assert "loss.png was not drawn: [Errno 28] No space left" in caplog.text


def test_the_real_one_offline_keeps_one_id_over_a_resumption(photos, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (1, 2):
        _pretrain(photos, tmp_path / "run", max_steps=steps)
    (id_file,) = (tmp_path / "run" / "wandb").glob("id")
    runs = list((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{id_file.read_text()}.wandb"))
    assert runs and all(path.stat().st_size > 100 for path in runs)


def test_a_tensorboard_that_cannot_be_imported_is_a_remark(tmp_path, monkeypatch, caplog):
    class Broken:
        def find_spec(self, name, *given):
            if name.startswith(("tensorboard", "torch.utils.tensorboard")):
                raise AttributeError("np.string_ was removed in the NumPy 2.0 release")

    for name in [
        n for n in sys.modules if n.startswith(("tensorboard", "torch.utils.tensorboard"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    run = {"config": {"wandb": False}}
    with img2vec.log.RunLog(tmp_path, 0, 1, current_processes(), run):
        pass
    assert "tensorboard cannot be used (np.string_ was removed" in caplog.text
