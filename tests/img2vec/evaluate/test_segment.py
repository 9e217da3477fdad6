"""img2vec segment end to end: results and pictures, interruption, two processes, the command line."""

import csv
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from PIL import Image
from shapes import SEGMENTER, draw_shapes

import img2vec
import img2vec.evaluate.segment
import tokdiv.cli
from img2vec.cli import app
from img2vec.evaluate import segment_finetune
from img2vec.evaluate.confusion import IGNORED
from img2vec.evaluate.segmentation_figures import class_colors, paint, paint_errors
from tokdiv.errors import Interrupted, UsageError

segment_module: Any = sys.modules["img2vec.evaluate.segment"]  # its name is the function's
HERE = {"image_size": 32, "workers": 1, "device": "cpu", "dtype": "float32"}
UPERNET = HERE | {
    "head": "upernet", "max_steps": 6, "batch_size": 4, "channels": 16, "save_every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(train, val) as SEG."""
    root = draw_shapes(tmp_path_factory.mktemp("shapes") / "data", {"train": 9, "val": 5})
    (root / "classes.txt").write_text("ground\nsquare\ndot & <dash>\n")
    return f"{root}:split=train", f"{root}:split=val"


@pytest.fixture
def without_pictures(monkeypatch):
    """Without pictures and page, which take longer than these small runs."""
    monkeypatch.setattr(segment_module, "write_report", lambda *given: None)


def read(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def text_of(page):
    return " ".join(re.sub(r"<[^>]+>", " ", page.split("</style>")[1]).split())


# Results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "options", "lowest"),
    [
        ("linear", {"max_steps": 150, "blocks": "1,3"}, 0.35),
        ("linear", {"max_steps": 60, "mode": "slide", "stride": 16}, 0.35),
        ("knn", {"tokens_per_class": 20}, 0.35),
        ("upernet", {"max_steps": 3, "batch_size": 4, "channels": 16}, 0.0),
    ],
)
@pytest.mark.usefixtures("without_pictures")
def test_results_of_every_head(data, tmp_path, head, options, lowest):
    results = img2vec.segment(SEGMENTER, *data, tmp_path, **HERE, head=head, **options)
    found = read(tmp_path)
    assert found["metrics"] == results.metrics and found["task"] == "segment"
    assert set(results.metrics) == {"miou", "pixel_accuracy", "mean_class_accuracy"}
    assert lowest <= results.metrics["miou"] <= 1
    assert [row["name"] for row in found["by_class"]] == ["ground", "square", "dot & <dash>"]
    ious = [row["iou"] for row in found["by_class"]]
    assert np.mean(ious) == pytest.approx(results.metrics["miou"])
    assert found["data"]["val"]["images"] == 5 and found["data"]["classes"] == 3
    assert found["settings"]["head"] == head and found["settings"]["image_size"] == 32
    assert ("k" in found["settings"]) == (head == "knn")
    assert "k-NN" not in results.table() and "miou" in results.table()
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (
        float(rows[0]["value"]) == pytest.approx(results.metrics["miou"])
        and rows[0]["metric"] == "miou"
    )
    if head != "knn":
        assert found["history"][-1]["step"] == options["max_steps"]
        assert found["history"][-1]["loss"] < 2
    assert not (tmp_path / "skipped.csv").exists()
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert (tmp_path / "checkpoint.pt").exists() == (head == "upernet")


def test_pictures_and_page(data, tmp_path):
    results = img2vec.segment(SEGMENTER, *data, tmp_path, **HERE, max_steps=120)
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.width > 400
    page = (tmp_path / "report.html").read_text()
    text = text_of(page)
    share = f"{100 * results.metrics['miou']:.1f}%"
    assert f"Mean IoU {share} over 3 classes on 5 validation images" in text
    assert "Most frequent mistakes" in text and "Loss over the steps" in page
    assert "dot &amp; &lt;dash&gt;" in page and "<dash>" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_nothing_is_written_without_out(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = img2vec.segment(SEGMENTER, *data, **HERE, head="knn")
    assert results.metrics["miou"] > 0.3 and not list(tmp_path.iterdir())


def test_an_exported_student_and_a_convnet_are_taken(data, tmp_path):
    from img2vec.export import export_student
    from tokdiv import load_teacher

    teacher = load_teacher("timm:test_vit@random", image_size=32)
    folder = export_student(
        teacher.module.state_dict(),
        "test_vit",
        tmp_path / "student",
        model_args={"img_size": 32},
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        input_size=32,
    )
    short = HERE | {"max_steps": 2}
    assert img2vec.segment(folder, *data, **short).settings["image_size"] == 32
    assert img2vec.segment("timm:test_resnet@random", *data, **short).metrics["miou"] > 0
    assert img2vec.segment("pixels", *data, **short).metrics["miou"] > 0


def test_colors_are_fixed_and_told_apart():
    colors = class_colors(150)
    assert np.array_equal(class_colors(11), colors[:11])
    assert len({tuple(color) for color in colors}) > 145
    near = np.abs(colors[:12, None].astype(int) - colors[:12]).sum(axis=2) + 999 * np.eye(
        12, dtype=int
    )
    assert near.min() > 40
    labels = np.array([[0, 1], [IGNORED, 2]])
    assert paint(labels, colors).tolist() == [
        [colors[0].tolist(), colors[1].tolist()], [[255, 255, 255], colors[2].tolist()],
    ]  # fmt: skip
    right, wrong, ignored = (222, 226, 228), (232, 0, 11), (255, 255, 255)
    painted = paint_errors(labels, np.array([[0, 2], [1, 2]]))
    assert [tuple(p) for p in painted.reshape(-1, 3).tolist()] == [right, wrong, ignored, right]


# Interruption ------------------------------------------------------------------------------------


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


@pytest.mark.usefixtures("without_pictures")
def test_an_interrupted_fine_tuning_goes_on_to_the_same_weights(data, tmp_path, monkeypatch):
    whole = img2vec.segment(SEGMENTER, *data, tmp_path / "whole", **UPERNET)
    step = segment_finetune.upernet_step
    calls = []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(segment_finetune, "upernet_step", stopping)
    with pytest.raises(Interrupted, match="step 3; the same command goes on"):
        img2vec.segment(SEGMENTER, *data, tmp_path / "cut", **UPERNET)
    resumed = img2vec.segment(SEGMENTER, *data, tmp_path / "cut", **UPERNET)
    assert len(calls) == 6
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.metrics == whole.metrics
    # Once more: nothing is left to train, and the result is the same.
    assert img2vec.segment(SEGMENTER, *data, tmp_path / "cut", **UPERNET).metrics == whole.metrics
    assert len(calls) == 6
    with pytest.raises(
        UsageError, match=r"checkpoint.pt' is of another run \(lr differ\): delete it"
    ):
        img2vec.segment(SEGMENTER, *data, tmp_path / "cut", **UPERNET, lr=0.5)
    (tmp_path / "cut" / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"no complete checkpoint.*delete it to start anew"):
        img2vec.segment(SEGMENTER, *data, tmp_path / "cut", **UPERNET)


# Processes ---------------------------------------------------------------------------------------


def segment_all(data: tuple[str, str], folder: Path) -> None:
    """Every head, into `folder`; called by every process."""
    segment_module.write_report = lambda *given: None  # also in the processes that are started here
    linear = HERE | {"max_steps": 40, "batch_size": 3}
    img2vec.segment(SEGMENTER, *data, folder / "knn", **HERE, head="knn", mode="slide")
    img2vec.segment(SEGMENTER, *data, folder / "linear", **linear)
    img2vec.segment(SEGMENTER, *data, folder / "anew", **linear, cache_gib=0.0)
    img2vec.segment(SEGMENTER, *data, folder / "upernet", **UPERNET | {"drop_path": 0.0})


def run_process(rank: int, port: int, data: tuple[str, str], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    segment_all(data, folder)
    with pytest.raises(UsageError, match="no folder annotations"):  # on every process
        img2vec.segment(SEGMENTER, data[0], str(folder), **HERE)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The folders of one process and of two."""
    root = tmp_path_factory.mktemp("processes")
    for name in ("one", "two"):
        (root / name).mkdir()
    (root / "two" / "images").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_process, args=(port, data, root / "two"), nprocs=2, join=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_module, "write_report", None)  # `segment_all` sets it
        segment_all(data, root / "one")
    return root / "one", root / "two"


@pytest.mark.parametrize("head", ["knn", "linear", "anew"])
def test_two_processes_find_what_one_finds(runs, head):
    one, two = (read(folder / head) for folder in runs)
    assert two["data"] == one["data"]
    assert two["by_class"] == one["by_class"] and two["metrics"] == one["metrics"]
    losses = [[line["loss"] for line in found["history"]] for found in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_two_processes_fine_tune_on_the_same_batches(runs):
    one, two = (read(folder / "upernet") for folder in runs)
    assert two["data"] == one["data"]
    # BatchNorm and dropout are each process's own on a CPU.
    for first, second in zip(one["history"], two["history"]):
        assert second["loss"] == pytest.approx(first["loss"], rel=0.2)


# Command line ------------------------------------------------------------------------------------


def run(*words):
    before, sys.argv = sys.argv, ["img2vec", "segment", *map(str, words)]
    try:
        return tokdiv.cli.run(app)
    finally:
        sys.argv = before


def test_the_command_prints_its_table_and_repeats_itself_in_the_report(data, tmp_path, capsys):
    words = (SEGMENTER, "--train", data[0], "--val", data[1], "-o", tmp_path, "--image-size", 32)
    assert run(*words, "--head", "knn", "--k", 5, "--workers", 1) == 0
    output = capsys.readouterr().out
    assert "miou" in output and "5 images, 3 classes; training images: 9" in output
    page = text_of((tmp_path / "report.html").read_text())
    assert f"img2vec segment {SEGMENTER} --train" in page and "--head knn --k 5" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head", "dpt"], "expected one of linear, knn, upernet"),
        (["--blocks", "last"], "--blocks last: expected numbers of blocks"),
        (["--stride", "99"], "--stride 99: expected at most the view's side, 32 px"),
        (["--head", "upernet", "--batch-size", "1"], "BatchNorm needs two or more"),
        (["--head", "upernet", "--micro-batch-size", "1"], "BatchNorm needs two or more"),
        (["--max-steps", "0"], "--max-steps 0: expected a whole number"),
        (["--temperature", "0"], "--temperature 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(data, options, message, capsys):
    words = (SEGMENTER, "--train", data[0], "--val", data[1], "--image-size", 32, "--workers", 1)
    assert run(*words, *options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_wrong_mask_is_one_line_and_exit_code_2(data, tmp_path, capsys):
    root = draw_shapes(tmp_path / "data", {"train": 2})
    Image.new("RGB", (40, 48)).save(root / "annotations/train/0.png")
    words = (SEGMENTER, "--train", f"{root}:split=train", "--val", data[1], "--workers", 1)
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert "annotations/train/0.png' is a color image (RGB)" in error and "Traceback" not in error


# Real data ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_camvid(data_folder):
    """A linear layer on frozen tokens is at 0.45 or more, nearest neighbors at 0.35 or more."""
    weights = data_folder / "weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    seg = [f"{data_folder / 'camvid'}:split={split}:ignore=11" for split in ("train", "val")]
    model = f"timm:vit_tiny_patch16_224@{weights}:mean=0.5:std=0.5"
    assert img2vec.segment(model, *seg).metrics["miou"] >= 0.45
    assert img2vec.segment(model, *seg, head="knn").metrics["miou"] >= 0.35
