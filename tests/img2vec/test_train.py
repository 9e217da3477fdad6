import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
from small import SMALL, make_teacher

import img2vec
import img2vec.step as step
from img2vec.checkpoint import write_checkpoint
from img2vec.resume import load_last, student_from_checkpoint
from tokdiv.errors import Interrupted, RunError, UsageError


def _metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _weights(out: Path) -> dict[str, torch.Tensor]:
    found = load_last(out)
    assert found is not None
    return found[1]["model"]


def _pretrain(data, out, teacher="pixels", **options):
    return img2vec.pretrain(data, teacher, out, **(SMALL | options))


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory) -> Path:
    """A run of 4 epochs of 3 steps of 2 forward passes, with drop path, saved at every second step."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    _pretrain(photos, out, **RESUMABLE)
    return out


RESUMABLE = {
    "accumulate": 2,
    "student_args": {"depth": 2, "drop_path_rate": 0.3},
    "save_every": 2,
    "keep": 100,
}


def test_a_run_leaves_what_it_promises(photos, tmp_path):
    out = tmp_path / "run"
    result = _pretrain(photos, out, knn_every=2)
    lines = _metrics(out)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 25))
    assert [line["epoch"] for line in steps] == [e for e in range(4) for _ in range(6)]
    needed = {"step", "epoch", "loss", "patch_loss", "global_loss", "lr", "images_per_second"}
    for line in steps:
        assert needed <= set(line)
        assert line["loss"] == pytest.approx(line["patch_loss"] + 0.5 * line["global_loss"])
        assert all(not isinstance(value, (dict, list)) for value in line.values())
    assert -1 / 5 <= steps[0]["token_similarity"] <= 1
    evaluations = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in evaluations] == [12, 24]
    assert all(0 <= line["knn_accuracy"] <= 1 for line in evaluations)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert (result.step, result.epoch, result.loss) == (24, 4, steps[-1]["loss"])
    settings = json.loads((out / "config.json").read_text())
    assert settings["teacher"]["name"] == "pixels"
    assert settings["config"]["mask_unit"] == 16
    assert (out / "loss.png").stat().st_size > 1000
    assert list(out.glob("events.out.tfevents.*"))
    assert (out / "checkpoints" / "last").read_text().strip() == "step-00000024.pt"
    assert len(list((out / "checkpoints").glob("*.pt"))) == 3
    loaded = timm.create_model(f"local-dir:{out / 'student'}", pretrained=True, num_classes=0)
    weights = _weights(out)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, weights[f"encoder.{name}"])


def test_the_student_of_a_checkpoint_is_what_export_takes(undisturbed):
    last = student_from_checkpoint(undisturbed)
    named = student_from_checkpoint(undisturbed / "checkpoints" / "last")
    assert named["description"] == last["description"]
    assert (last["architecture"], last["input_size"]) == ("test_vit", 64)
    assert last["model_args"]["depth"] == 2
    assert all(
        torch.equal(v, _weights(undisturbed)[f"encoder.{k}"]) for k, v in last["state_dict"].items()
    )
    first = student_from_checkpoint(undisturbed / "checkpoints" / "step-00000002.pt")
    assert first["description"]["steps"] == 2
    with pytest.raises(UsageError, match="no checkpoint"):
        student_from_checkpoint(undisturbed / "student")


def test_the_teacher_is_bit_identical_afterwards_and_in_no_checkpoint(photos, tmp_path):
    teacher = make_teacher()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    _pretrain(photos, tmp_path / "run", teacher, epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any("teacher" in name for name in _weights(tmp_path / "run"))


def test_the_callers_random_state_is_left_alone(photos, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _pretrain(photos, tmp_path / "run", max_steps=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("stops", [[5], [3, 4, 8, 11]])
def test_interrupted_anywhere_and_resumed_it_ends_with_the_same_bits(
    photos, tmp_path, undisturbed, stops
):
    out = tmp_path / "run"
    for stop in [*stops, None]:
        result = _pretrain(photos, out, **RESUMABLE, max_steps=stop)
        assert stop is None or result.step == stop
    expected = _weights(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(out).items())
    drop = {"images_per_second"}
    expected_lines, lines = (
        [{k: v for k, v in line.items() if k not in drop} for line in _metrics(folder)]
        for folder in (undisturbed, out)
    )
    assert lines == expected_lines


def test_killed_in_the_middle_of_accumulation_it_repeats_no_step_and_ends_with_the_same_bits(
    photos, tmp_path, undisturbed, monkeypatch
):
    out = tmp_path / "run"
    calls = 0
    original = step.image_losses

    def dies(*arguments):
        nonlocal calls
        calls += 1
        if calls == 12:  # the second forward pass of step 6; the last checkpoint is of step 4
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(step, "image_losses", dies)
    with pytest.raises(KeyboardInterrupt):
        _pretrain(photos, out, **RESUMABLE)
    monkeypatch.undo()
    assert _metrics(out)[-1]["step"] == 5
    _pretrain(photos, out, **RESUMABLE)
    assert [line["step"] for line in _metrics(out)] == list(range(1, 13))
    expected = _weights(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(out).items())


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    photos, tmp_path, undisturbed, damage, caplog
):
    out = tmp_path / "run"
    _pretrain(photos, out, **RESUMABLE, max_steps=6)
    last = out / "checkpoints" / "step-00000006.pt"
    data = bytearray(last.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    last.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "empty": b""}[damage])
    _pretrain(photos, out, **RESUMABLE)
    why = "is damaged" if damage == "flipped" else "is no complete checkpoint"
    assert re.search(rf"step-00000006.pt' {why}.*'step-00000004.pt' is taken\n", caplog.text)
    expected = _weights(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(out).items())


def test_only_damaged_checkpoints_are_an_error_that_names_the_remedy(photos, tmp_path, caplog):
    _pretrain(photos, tmp_path / "run", max_steps=1)
    (tmp_path / "run" / "checkpoints" / "step-00000001.pt").write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"none of the 1 checkpoints.*--no-resume"):
        _pretrain(photos, tmp_path / "run")
    assert "step-00000001.pt' is no complete checkpoint" in caplog.text


def test_a_missing_checkpoint_is_reported(photos, tmp_path, caplog):
    _pretrain(photos, tmp_path / "run", **RESUMABLE, max_steps=4)
    (tmp_path / "run" / "checkpoints" / "step-00000004.pt").unlink()
    _pretrain(photos, tmp_path / "run", **RESUMABLE, max_steps=4)
    assert "step-00000004.pt' is gone; 'step-00000002.pt' is taken" in caplog.text
    assert "resuming at step 2" in caplog.text


@pytest.mark.parametrize(
    "content", [b"", b"step", b"\x00" * 64, b"PK\x03\x04 not a zip", b"\x80\x02."]
)
def test_what_is_no_checkpoint_is_said(tmp_path, content):
    file = tmp_path / "other.pt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"other.pt' is no complete checkpoint"):
        student_from_checkpoint(file)


def test_a_checkpoint_without_pickles_of_code(undisturbed):
    for path in (undisturbed / "checkpoints").glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert state["teacher"]["architecture"] == "pixels"


def test_no_resume_moves_the_old_run_aside(photos, tmp_path):
    _pretrain(photos, tmp_path / "run", max_steps=1)
    _pretrain(photos, tmp_path / "run", max_steps=2, resume=False)
    assert (tmp_path / "run.bak-1" / "metrics.jsonl").is_file()
    assert [line["step"] for line in _metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_ends_the_run(photos, tmp_path, name):
    out = tmp_path / "run"

    def send() -> None:
        while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").stat().st_size:
            time.sleep(0.01)
        os.kill(os.getpid(), getattr(signal, name))

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(Interrupted, match=r"after step \d+; the same command") as caught:
        _pretrain(photos, out, epochs=1000)
    sender.join()
    assert caught.value.signal == getattr(signal, name)
    last = _metrics(out)[-1]["step"]
    assert (out / "checkpoints" / "last").read_text().strip() == f"step-{last:08d}.pt"
    assert signal.getsignal(getattr(signal, name)) in (signal.SIG_DFL, signal.default_int_handler)


def test_an_evaluation_that_a_signal_prevented_is_made_on_resuming(photos, tmp_path, monkeypatch):
    settings = {"epochs": 2, "knn_every": 1}
    _pretrain(photos, tmp_path / "undisturbed", **settings)
    original, calls = step.image_losses, 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls in (6, 12):  # the last steps of both epochs
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(step, "image_losses", interrupted)
    for done in ([], [6]):
        with pytest.raises(Interrupted):
            _pretrain(photos, tmp_path / "run", **settings)
        found = _metrics(tmp_path / "run")
        assert [line["step"] for line in found if "loss" not in line] == done
    for _ in range(2):  # once it is measured, no second time
        _pretrain(photos, tmp_path / "run", **settings)
        expected, found = (
            [line for line in _metrics(tmp_path / name) if "loss" not in line]
            for name in ("undisturbed", "run")
        )
        assert [line["step"] for line in expected] == [6, 12]
        assert found == expected


def test_a_loss_that_is_not_finite_skips_the_step(photos, tmp_path, monkeypatch, caplog):
    original, calls = step.image_losses, 0

    def spoilt(*arguments):
        nonlocal calls
        calls += 1
        patch, image, tokens = original(*arguments)
        return (patch * float("nan") if calls in (3, 4) else patch), image, tokens

    monkeypatch.setattr(step, "image_losses", spoilt)
    _pretrain(photos, tmp_path / "run", epochs=2, save_every=1, keep=100)
    lines = _metrics(tmp_path / "run")
    assert [line["loss"] is None for line in lines] == [step in (3, 4) for step in range(1, 13)]
    assert lines[-1]["skipped_steps"] == 2
    assert "2 of 12 steps were skipped: their loss was not finite" in caplog.text
    checkpoints = tmp_path / "run" / "checkpoints"
    second, fourth = (
        torch.load(checkpoints / f"step-0000000{n}.pt", weights_only=True)["model"] for n in (2, 4)
    )
    assert all(torch.equal(value, fourth[name]) for name, value in second.items())


def test_ten_such_steps_in_a_row_stop_the_run_and_name_the_last_checkpoint(
    photos, tmp_path, monkeypatch
):
    original, calls = step.image_losses, 0

    def spoilt(*arguments):
        nonlocal calls
        calls += 1
        patch, image, tokens = original(*arguments)
        return (patch * float("inf") if calls > 6 else patch), image, tokens

    monkeypatch.setattr(step, "image_losses", spoilt)
    with pytest.raises(RunError, match=r"not finite 10 steps in a row.*step-00000012.pt"):
        _pretrain(photos, tmp_path / "run")
    assert len(_metrics(tmp_path / "run")) == 16


def test_a_teacher_with_damaged_weights_is_named(photos, tmp_path):
    teacher = make_teacher()
    teacher.module[0].weight.fill_(torch.nan)
    with pytest.raises(RunError, match="the teacher small gives tokens that are not finite"):
        _pretrain(photos, tmp_path / "run", teacher)


def test_a_run_without_one_step_is_a_failure(photos, tmp_path):
    teacher = make_teacher()
    teacher.module[0].weight.fill_(torch.nan)
    with pytest.raises(RunError, match="not one of the 2 steps could be made"):
        _pretrain(photos, tmp_path / "run", teacher, max_steps=2)
    assert not (tmp_path / "run" / "student").exists()


def test_unusable_images_are_listed_and_count_nothing(photos, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))[:8]):
        (data / f"{number}.png").write_bytes(path.read_bytes())
    (data / "cut.png").write_bytes((data / "0.png").read_bytes()[:200])
    _pretrain(data, tmp_path / "run", batch_size=9, epochs=2)
    lines = _metrics(tmp_path / "run")
    assert [line["images"] for line in lines] == [8, 8]
    listed = (tmp_path / "run" / "skipped.csv").read_text().splitlines()
    assert listed[0] == "key,reason"
    assert len(listed) == 2
    assert listed[1].startswith("cut.png,")

    # The loss is the mean over the eight: the very one of a run in which the black one weighs nothing.
    assert lines[0]["loss"] < 1


def test_gradients_of_a_batch_with_unusable_images_are_the_mean_over_the_others(
    photos, tmp_path, monkeypatch
):
    """Accumulated over one or two forward passes, the unusable image's weight stays with the others."""
    data = tmp_path / "data"
    data.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))[:7]):
        (data / f"{number}.png").write_bytes(path.read_bytes())
    (data / "cut.png").write_bytes(b"\x89PNG")
    for name, split in (("whole", (8, 1)), ("split", (2, 4))):
        _pretrain(
            data,
            tmp_path / name,
            batch_size=split[0],
            accumulate=split[1],
            max_steps=3,
            warmup_epochs=0,
        )
    first, second = (_metrics(tmp_path / name) for name in ("whole", "split"))
    for a, b in zip(first, second):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_batch_larger_than_the_data_says_what_it_does(photos, tmp_path, caplog):
    _pretrain(photos, tmp_path / "run", batch_size=100, max_steps=1)
    expected = "a batch of 100 images is larger than the data: each step takes all 24 images once"
    assert expected in caplog.text
    assert "global batch: 24" in caplog.text


def test_without_a_global_loss_it_is_zero_and_its_head_is_gone(photos, tmp_path):
    _pretrain(photos, tmp_path / "run", global_weight=0.0, max_steps=2)
    assert [line["global_loss"] for line in _metrics(tmp_path / "run")] == [0, 0]
    assert not any("global_head" in name for name in _weights(tmp_path / "run"))


def test_a_teacher_of_another_size_sees_the_same_view_resized(photos, tmp_path, caplog):
    seen = []
    teacher = make_teacher(stride=32, size=128)
    forward = teacher.forward
    teacher.forward = lambda images: seen.append(images.shape) or forward(images)
    _pretrain(photos, tmp_path / "run", teacher, max_steps=1)
    assert seen == [(4, 3, 128, 128)]
    assert "resized from 64 to 128" in caplog.text


def test_a_ranking_means_its_winner_with_a_remark_where_it_is_not_certified(
    photos, tmp_path, caplog, monkeypatch
):
    import tokdiv.hand_over
    from tokdiv import parse_specs

    @dataclasses.dataclass
    class Found:
        best = parse_specs(["hog"])[0]
        certified = False
        best_certified = False
        teachers = ("hog", "pixels")

        def remarks(self):
            return ["hog and pixels are tied"]

    asked = []
    monkeypatch.setattr(
        tokdiv.hand_over, "load_ranking", lambda path: asked.append(path) or Found()
    )
    ranked = tmp_path / "ranked"
    ranked.mkdir()
    (ranked / "ranking.json").write_text("{}")
    for number, given in enumerate([str(ranked), ranked / "ranking.json"]):
        _pretrain(photos, tmp_path / f"run{number}", given, max_steps=1)
        assert "teacher: hog, the winner of" in caplog.text
        assert "not certified" in caplog.text
        assert "hog and pixels are tied" in caplog.text
        caplog.clear()
    assert len(asked) == 2
    Found.best_certified = True
    _pretrain(photos, tmp_path / "run2", ranked, max_steps=1)
    assert "winner is certified, the order of its other teachers is not" in caplog.text
    with pytest.raises(UsageError, match=r"a folder without ranking.json"):
        _pretrain(photos, tmp_path / "other", str(tmp_path))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mask_ratio": 0.5}, "begun with --mask-ratio 0.6, now it is 0.5"),
        ({"student_args": {"depth": 3}}, "begun with --student-args"),
        ({"teacher": "hog"}, "begun with the teacher pixels"),
    ],
)
def test_a_folder_of_another_run_is_refused(photos, tmp_path, change, expected):
    _pretrain(photos, tmp_path / "run", max_steps=1)
    before = hashlib.sha256((tmp_path / "run" / "metrics.jsonl").read_bytes()).digest()
    with pytest.raises(UsageError, match=expected):
        _pretrain(photos, tmp_path / "run", **({"max_steps": 2} | change))
    after = hashlib.sha256((tmp_path / "run" / "metrics.jsonl").read_bytes()).digest()
    assert before == after


def test_other_data_is_refused(photos, tmp_path):
    _pretrain(photos, tmp_path / "run", max_steps=1)
    with pytest.raises(UsageError, match="begun on other data"):
        _pretrain(photos / "disc", tmp_path / "run", max_steps=2)


def test_a_checkpoint_of_another_student_is_refused(photos, tmp_path):
    _pretrain(photos, tmp_path / "run", max_steps=1)
    _pretrain(photos, tmp_path / "wide", max_steps=1, student_args={"depth": 3})
    for name in ("step-00000001.pt",):
        source = tmp_path / "wide" / "checkpoints" / name
        (tmp_path / "run" / "checkpoints" / name).write_bytes(source.read_bytes())
    with pytest.raises(UsageError, match=r"--student-args|another model"):
        _pretrain(photos, tmp_path / "run", max_steps=2)


def test_a_folder_with_other_files_is_refused(photos, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty and holds no run"):
        _pretrain(photos, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"image_size": 72}, "--image-size 72 is not a multiple"),
        ({"image_size": 80, "mask_unit": 32}, "80 is not a multiple of --mask-unit"),
        ({"student": "resnet18"}, "plain VisionTransformer"),
        ({"mask_ratio": 0.01}, "leaves none masked"),
        ({"mask_ratio": 1.5}, "--mask-ratio 1.5: expected a number above 0 and below 1"),
        ({"blocks": "7"}, "--blocks '7'"),
        ({"epochs": 0}, "--epochs 0: expected a whole number of 1 or more"),
        ({"warmup_epochs": 9}, "--warmup-epochs 9 is longer than the 4 epochs"),
        ({"decoder_dim": 100}, "--decoder-dim 100: expected a multiple of 32"),
        ({"epoch_size": 100}, "--epoch-size 100: .* holds 24 images"),
        ({"shard": True}, "--shard spreads the student over processes"),
        ({"bloks": "all"}, "unknown setting 'bloks' .did you mean blocks"),
        ({"batch_size": "many"}, "batch_size = 'many': expected a whole number"),
        ({"preset": "vit_giant"}, "unknown preset 'vit_giant'"),
    ],
)
def test_a_mistake_in_the_call_is_one_line_and_leaves_nothing(photos, tmp_path, options, expected):
    with pytest.raises(UsageError, match=expected) as caught:
        _pretrain(photos, tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_running_out_of_memory_says_which_batch_to_try(photos, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(step, "image_losses", full)
    with pytest.raises(
        RunError, match=r"for 4 images at a time: try --batch-size 2 --accumulate 2"
    ):
        _pretrain(photos, tmp_path / "run")


def test_a_full_disk_leaves_the_checkpoints_before_it_whole(photos, tmp_path, monkeypatch):
    import img2vec.checkpoint as checkpoints

    _pretrain(photos, tmp_path / "run", max_steps=1)

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(RunError, match=r"the disk is full.*is whole"):
        _pretrain(photos, tmp_path / "run", max_steps=2)
    monkeypatch.undo()
    found = load_last(tmp_path / "run")
    assert found is not None
    assert found[1]["progress"]["step"] == 1
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_stream_without_a_length_asks_for_one(photos, tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, path in enumerate(sorted(photos.rglob("*.png"))):
            entry = tarfile.TarInfo(f"{number:03d}.png")
            entry.size = path.stat().st_size
            tar.addfile(entry, io.BytesIO(path.read_bytes()))
    data = f"wds/{tmp_path / 'shard.tar'}"
    with pytest.raises(UsageError, match="give --epoch-size N"):
        _pretrain(data, tmp_path / "run", max_steps=1)
    _pretrain(data, tmp_path / "run", max_steps=3, epoch_size=8)
    _pretrain(data, tmp_path / "cut", max_steps=1, epoch_size=8)
    _pretrain(data, tmp_path / "cut", max_steps=3, epoch_size=8)
    first, second = _weights(tmp_path / "run"), _weights(tmp_path / "cut")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_kept_bytes_give_the_same_run(photos, tmp_path):
    _pretrain(photos, tmp_path / "disk", epochs=2, workers=1)
    _pretrain(photos, tmp_path / "memory", epochs=2, workers=3, cache_ram=True)
    first, second = _weights(tmp_path / "disk"), _weights(tmp_path / "memory")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_clipping_bounds_the_step_and_not_the_reported_norm(photos, tmp_path):
    _pretrain(photos, tmp_path / "run", clip_grad=1e-9, max_steps=3, warmup_epochs=0)
    _pretrain(photos, tmp_path / "free", max_steps=3, warmup_epochs=0)
    first, second = (_metrics(tmp_path / name)[0]["grad_norm"] for name in ("run", "free"))
    assert first == pytest.approx(second)


def test_importing_either_way_gives_the_function(photos):
    code = (
        "import sys, img2vec; assert 'torch' not in sys.modules;"
        "from img2vec import pretrain; import img2vec.train; assert img2vec.train.pretrain is pretrain"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("damage", ["shape", "dtype", "missing key", "missing parameter", "type"])
def test_an_optimizer_state_that_does_not_fit_is_one_line_and_no_crash(photos, tmp_path, damage):
    _pretrain(photos, tmp_path / "run", max_steps=2)
    path = next((tmp_path / "run" / "checkpoints").glob("step-*.pt"))
    state = torch.load(path, weights_only=True)
    name = next(n for n, m in state["optimizer"].items() if m["exp_avg"].ndim == 2)
    moments = state["optimizer"][name]
    if damage == "shape":
        moments["exp_avg"] = moments["exp_avg"][:1]
    elif damage == "dtype":
        moments["exp_avg_sq"] = moments["exp_avg_sq"].half()
    elif damage == "missing key":
        del moments["exp_avg_sq"]
    elif damage == "missing parameter":
        del state["optimizer"][name]
    else:
        state["optimizer"][name] = [1, 2]
    write_checkpoint(path, state["kind"], state)
    with pytest.raises(UsageError, match="the optimizer's state does not fit the model"):
        _pretrain(photos, tmp_path / "run", max_steps=3)
