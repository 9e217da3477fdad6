"""`detect`: average precision against pycocotools, training, resuming, files, and mistakes in the call."""

import contextlib
import io
import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from coco_shapes import CATEGORIES, change, make_coco
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

import img2vec
import img2vec.cli
import tokdiv.cli
from img2vec.evaluate import load_detector, load_encoder
from img2vec.evaluate.coco import open_coco
from img2vec.evaluate.detection_data import read_sample
from img2vec.evaluate.detection_eval import evaluate_detector
from img2vec.evaluate.detection_train import (
    LOSSES,
    _black_sample,
    accumulate_gradient,
    learning_rate,
)
from img2vec.evaluate.detector import build_detector, detector_groups
from img2vec.evaluate.settings import DetectRecipe
from img2vec.export import export_student
from tokdiv.dist import current_processes
from tokdiv.errors import Interrupted, RunError, UsageError

TINY = "timm:vit_tiny_patch16_224@random:depth=2:embed_dim=32:num_heads=2"
CONVNET = "timm:test_resnet@random"
FAST = {
    "image_size": 64, "channels": 8, "proposals": 16, "batch_size": 2, "micro_batch_size": 2,
    "warmup_steps": 1, "workers": 0, "dtype": "float32", "device": "cpu",
}  # fmt: skip
GROUP = current_processes()


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> str:
    """Four images with two objects each, one of them with a crowd as well."""
    return make_coco(tmp_path_factory.mktemp("coco"), 4, crowd=(2,))


def tiny_detector(spec=TINY, **changes):
    settings = DetectRecipe(**{**FAST, **changes})
    torch.manual_seed(0)
    teacher = load_encoder(spec, image_size="native", device="cpu", dtype="float32")
    return build_detector(teacher, 2, settings)[0], settings


# Average precision -------------------------------------------------------------------------------


class Scripted(nn.Module):
    """A detector that gives prepared detections, image after image."""

    def __init__(self, detections):
        super().__init__()
        self.detections = iter(detections)

    def forward(self, images):
        return [next(self.detections) for _ in images]


def noisy_detections(data, seed: int):
    """The objects of each image, moved, some missing, some of another class, and some made up."""
    draw = np.random.default_rng(seed)
    found = []
    for position in range(len(data)):
        target = read_sample(data, position).target
        height, width = data.record(position)["size"]
        masks, boxes, labels = [], [], []
        for mask, box, label in zip(target["masks"], target["boxes"], target["labels"].tolist()):
            for _ in range(draw.integers(0, 4)):
                dy, dx = draw.integers(-4, 5, 2)
                masks.append(mask.roll((int(dy), int(dx)), (0, 1)))
                moved = (
                    box + torch.tensor([dx, dy, dx, dy]) + torch.from_numpy(draw.normal(0, 1, 4))
                )
                boxes.append(moved.clamp(min=0).float())
                labels.append(label if draw.random() < 0.9 else 3 - label)
        for _ in range(draw.integers(0, 4)):
            y, x = draw.integers(0, (height - 8, width - 8))
            mask = torch.zeros(height, width, dtype=torch.uint8)
            mask[y : y + 8, x : x + 8] = 1
            masks.append(mask)
            boxes.append(torch.tensor([x, y, x + 8, y + 8], dtype=torch.float32))
            labels.append(int(draw.integers(1, 3)))
        n = len(labels)
        scores = torch.from_numpy(np.round(draw.random(n), 1)).float()  # ties
        order = scores.argsort(descending=True, stable=True)
        found.append(
            {
                "boxes": (torch.stack(boxes) if n else torch.zeros(0, 4))[order],
                "labels": torch.tensor(labels, dtype=torch.int64)[order],
                "scores": scores[order],
                "masks": (torch.stack(masks) if n else torch.zeros(0, height, width))[
                    order
                ].float()[:, None],
            }
        )
    return found


def by_pycocotools(coco: str, detections) -> dict[str, list[float]]:
    """COCOeval on the JSON itself: its twelve numbers, and the precision by class."""
    ids = {1: CATEGORIES["box"], 2: CATEGORIES["disc"]}
    results = []
    for position, found in enumerate(detections):
        for box, label, score, mask in zip(
            found["boxes"], found["labels"], found["scores"], found["masks"][:, 0]
        ):
            x1, y1, x2, y2 = box.tolist()
            rle = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            common = {
                "image_id": 100 + position,
                "category_id": ids[int(label)],
                "score": float(score),
            }
            results.append(common | {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": rle})
    numbers = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(coco.partition(":annotations=")[2])
        for kind, theirs in (("box", "bbox"), ("mask", "segm")):
            # Without boxes, loadRes takes areas from masks.
            own = [{k: v for k, v in r.items() if kind == "box" or k != "bbox"} for r in results]
            own = [
                {k: v for k, v in r.items() if kind == "mask" or k != "segmentation"} for r in own
            ]
            judge = COCOeval(truth, truth.loadRes(own), theirs)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            numbers[kind] = judge.stats[:6].tolist()
            precision = judge.eval["precision"][:, :, :, 0, -1]
            numbers[kind + " by class"] = precision.mean(axis=(0, 1)).tolist()
    return numbers


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_that_of_pycocotools(tmp_path, seed):
    # Large images too, so that there are objects of all three sizes.
    coco = make_coco(tmp_path, 6, size=(240, 400), empty=(1, 4), crowd=(2, 4), seed=seed)
    data = open_coco(coco)
    detections = noisy_detections(data, seed)
    metrics, by_class, skipped, kept = evaluate_detector(
        Scripted(detections),
        data,
        batch_size=2,
        dtype="float32",
        workers=0,
        group=GROUP,
        shown=(3,),
    )
    expected = by_pycocotools(coco, detections)
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    for kind in ("box", "mask"):
        found = [metrics[f"{kind}_{name}"] for name in names]
        assert [-1 if v is None else v for v in found] == pytest.approx(expected[kind], abs=1e-6)
        assert [c[f"{kind}_ap"] for c in by_class] == pytest.approx(
            expected[kind + " by class"], abs=1e-6
        )
    assert [entry["class"] for entry in by_class] == ["box", "disc"]
    assert 0.05 < metrics["box_ap"] < 0.95
    assert skipped == {} and list(kept) == [3]


def test_perfect_detections_have_an_average_precision_of_one(coco):
    data = open_coco(coco)
    perfect = []
    for position in range(len(data)):
        target = read_sample(data, position).target
        own = target["iscrowd"] == 0
        perfect.append(
            {
                "boxes": target["boxes"][own],
                "labels": target["labels"][own],
                "scores": torch.ones(int(own.sum())),
                "masks": target["masks"][own].float()[:, None],
            }
        )
    metrics, *_ = evaluate_detector(
        Scripted(perfect), data, batch_size=4, dtype="float32", workers=0, group=GROUP
    )
    assert metrics["box_ap"] == metrics["mask_ap"] == pytest.approx(1)
    assert metrics["box_ap_large"] is None  # none of the objects is large


def test_an_image_that_cannot_be_used_counts_neither_way(tmp_path):
    coco = make_coco(tmp_path, 3)
    (tmp_path / "images" / "001.png").write_bytes(b"no image")
    data = open_coco(coco)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0),
             "masks": torch.zeros(0, 1, 48, 64)}  # fmt: skip
    metrics, _, skipped, _ = evaluate_detector(
        Scripted([empty] * 2), data, batch_size=2, dtype="float32", workers=0, group=GROUP
    )
    assert list(skipped) == [1] and metrics["box_ap"] == 0
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(RunError, match=r"none of its 3 images can be used, as '000.png': no known"):
        evaluate_detector(Scripted([]), data, batch_size=2, dtype="float32", workers=0, group=GROUP)


# Training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [TINY, CONVNET], ids=["vit", "convnet"])
def test_a_batch_whose_images_have_no_object_trains_what_it_can(spec):
    detector, recipe = tiny_detector(spec)
    detector.train()
    buffers = {name: b.clone() for name, b in detector.named_buffers()}
    losses = accumulate_gradient(detector, [_black_sample()] * 2, recipe, GROUP)
    assert losses.isfinite().all()
    by_name = dict(zip(LOSSES, losses.tolist()))
    assert by_name["loss_mask"] == by_name["loss_box_reg"] == by_name["loss_rpn_box_reg"] == 0
    assert by_name["loss_classifier"] > 0 and by_name["loss_objectness"] > 0
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(b.isfinite().all() for b in buffers.values())
    assert all(b.isfinite().all() for b in detector.buffers())


def test_a_batch_without_usable_images_moves_nothing():
    detector, recipe = tiny_detector()
    detector.train()
    unusable = _black_sample()._replace(image=None, reason="damaged")
    losses = accumulate_gradient(detector, [unusable], recipe, GROUP)
    assert losses.sum() == 0
    assert all(p.grad.abs().sum() == 0 for p in detector.parameters())


def test_small_forward_passes_accumulate_their_mean(coco):
    samples = [read_sample(open_coco(coco), position) for position in (0, 1)]
    gradients = []
    for parts in ([samples], [samples[:1], samples[1:]]):
        detector, recipe = tiny_detector(micro_batch_size=1, drop_path=0.0)
        detector.train()
        torch.manual_seed(0)  # the sampling of proposals
        losses = sum(accumulate_gradient(detector, part, recipe, GROUP) for part in parts)
        gradients.append(
            (losses / len(parts), [p.grad / len(parts) for p in detector.parameters()])
        )
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    for one, two in zip(gradients[0][1], gradients[1][1]):
        torch.testing.assert_close(one, two)


def test_learning_rates_fall_by_the_layer():
    detector, _ = tiny_detector()
    names = {id(p): name for name, p in detector.named_parameters()}
    seen = {}
    for group in detector_groups(detector, weight_decay=0.1, layer_decay=0.5):
        for parameter in group["params"]:
            seen[names[id(parameter)]] = group["lr_scale"], group["weight_decay"]
    assert set(seen) == set(names.values())
    assert seen["backbone.body.norm.weight"] == (0.5, 0.0)
    assert seen["backbone.body.blocks.1.mlp.fc1.weight"] == (0.5, 0.1)
    assert seen["backbone.body.blocks.0.mlp.fc1.weight"] == (0.25, 0.1)
    assert seen["backbone.body.patch_embed.proj.weight"] == (0.125, 0.1)
    assert seen["backbone.body.pos_embed"] == (0.125, 0.0)
    assert seen["roi_heads.box_predictor.cls_score.weight"] == (1.0, 0.1)
    assert seen["roi_heads.box_predictor.cls_score.bias"] == (1.0, 0.0)


def test_the_schedule_is_vitdets():
    rates = [learning_rate(step, 270, 10, 1e-4) for step in range(270)]
    assert rates[0] == pytest.approx(1e-5) and rates[9] == rates[100] == pytest.approx(1e-4)
    assert rates[239] == pytest.approx(1e-4) and rates[240] == pytest.approx(1e-5)
    assert rates[259] == pytest.approx(1e-5) and rates[260] == pytest.approx(1e-6)


def test_four_images_are_learned_by_heart(coco):
    options = FAST | {
        "channels": 32,
        "proposals": 32,
        "batch_size": 4,
        "micro_batch_size": 4,
        "warmup_steps": 10,
    }
    results = img2vec.detect(
        TINY, coco, coco, **options, max_steps=60, lr=2e-3, scale_min=1.0, scale_max=1.0, flip=0.0,
        drop_path=0.0, layer_decay=1.0,
    )  # fmt: skip
    assert results.metrics["box_ap50"] > 0.7 and results.metrics["mask_ap50"] > 0.7
    assert results.history[-1]["loss"] < results.history[0]["loss"] / 3


def test_what_it_writes(coco, tmp_path):
    before = torch.get_rng_state()
    out = tmp_path / "out"
    results = img2vec.detect(
        TINY, coco, coco, out, **FAST, epochs=2, eval_every=1, ema=0.5, clip_grad=1.0
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.name for p in out.iterdir() if not p.name.startswith((".", "events"))} == {
        "model", "predictions.png", "report.html", "results.csv", "results.json",
    }  # fmt: skip
    written = json.loads((out / "results.json").read_text())
    assert written["task"] == "detect" and written["metrics"] == results.metrics
    assert set(results.metrics) == {
        f"{kind}_{name}"
        for kind in ("box", "mask")
        for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    }
    assert written["data"]["train"]["objects"] == 8 and written["data"]["train"]["crowds"] == 1
    assert [entry["step"] for entry in results.history] == [2, 4]
    assert "val_box_ap" in results.history[0] and "val_box_ap" not in results.history[1]
    assert [entry["class"] for entry in written["by_class"]] == ["box", "disc"]
    rows = (out / "results.csv").read_text().splitlines()
    assert len(rows) == 13 and rows[1].startswith("box_ap,")
    page = (out / "report.html").read_text()
    assert "Average precision of boxes" in page and "data:image/png" in page
    assert list(out.glob("events.*"))

    detector, classes = load_detector(out / "model")
    assert classes == ["box", "disc"]
    data = open_coco(coco)
    again, *_ = evaluate_detector(
        detector, data, batch_size=2, dtype="float32", workers=0, group=GROUP
    )
    assert again == results.metrics
    with pytest.raises(UsageError, match="holds no detector"):
        load_detector(tmp_path)


@pytest.mark.parametrize("spec", [TINY, CONVNET], ids=["vit", "convnet"])
def test_an_interrupted_training_ends_as_if_it_had_not_been(coco, tmp_path, spec, monkeypatch):
    options = {**FAST, "max_steps": 5, "ema": 0.9}
    whole = img2vec.detect(spec, coco, coco, tmp_path / "whole", **options)
    module = sys.modules["img2vec.evaluate.detection_train"]
    step = module.train_step

    def step_and_signal(model, optimizer, samples, number, *rest):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(model, optimizer, samples, number, *rest)

    monkeypatch.setattr(module, "train_step", step_and_signal)
    with pytest.raises(Interrupted, match="interrupted after step 3"):
        img2vec.detect(spec, coco, coco, tmp_path / "cut", **options)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="is of a training with other settings"):
        img2vec.detect(spec, coco, coco, tmp_path / "cut", **options | {"seed": 1})
    resumed = img2vec.detect(spec, coco, coco, tmp_path / "cut", **options)
    assert resumed.history == whole.history
    assert resumed.metrics == whole.metrics
    weights = [load_detector(tmp_path / run / "model")[0].state_dict() for run in ("whole", "cut")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()


def test_a_damaged_checkpoint_is_named(coco, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UsageError, match=r"checkpoint.pt.*delete it to start anew"):
        img2vec.detect(TINY, coco, coco, tmp_path, **FAST)


def test_a_loss_that_is_not_finite_stops(coco):
    with pytest.raises(
        RunError, match=r"the loss of step .* is nan: use a lower --blr, --clip-grad 1"
    ):
        img2vec.detect(TINY, coco, coco, **FAST, max_steps=9, lr=1e30)


# Data with gaps ----------------------------------------------------------------------------------


def test_images_and_objects_that_are_left_out_are_counted(tmp_path):
    train = make_coco(tmp_path / "train", 5)
    change(train, lambda c: c["annotations"][0].update(bbox=[5, 5, 0, 9]))
    (tmp_path / "train" / "images" / "001.png").unlink()
    (tmp_path / "train" / "images" / "003.png").write_bytes(b"")
    val = make_coco(tmp_path / "val", 2)
    results = img2vec.detect(TINY, train, val, **FAST, epochs=2)
    side = results.data["train"]
    assert side["images"] == 3 and side["skipped"] == 2
    assert side["left_out"] == {"no_area": 1}
    assert "1 objects of train are left out: their boxes have no area" in results.notes
    assert any(note.startswith("1 images of train are not in ") for note in results.notes)


def test_a_class_without_training_objects_is_noted(tmp_path):
    train, val = make_coco(tmp_path / "train", 2), make_coco(tmp_path / "val", 2)

    def drop(content):
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 3]

    results = img2vec.detect(TINY, change(train, drop), val, **FAST, max_steps=1)
    assert "no training image has objects of disc, which val has" in results.notes


# The command line --------------------------------------------------------------------------------


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["img2vec", "detect", *map(str, arguments)])
    code = tokdiv.cli.run(img2vec.cli.app)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


SMALL = [
    "--image-size",
    "64",
    "--channels",
    "8",
    "--proposals",
    "16",
    "--max-steps",
    "1",
    "--workers",
    "0",
]


def test_the_command_takes_an_exported_student(coco, tmp_path, monkeypatch, capsys):
    teacher = load_encoder(TINY + ":size=64", device="cpu", dtype="float32")
    student = export_student(
        state_dict=teacher.module.state_dict(), architecture="vit_tiny_patch16_224",
        model_args={"img_size": 64, "depth": 2, "embed_dim": 32, "num_heads": 2},
        mean=(0.5,) * 3, std=(0.5,) * 3, input_size=64, description={}, out=tmp_path / "student",
    )  # fmt: skip
    for number, model in enumerate((student, CONVNET)):
        code, out, err = run(
            monkeypatch,
            capsys,
            model,
            "--train",
            coco,
            "--val",
            coco,
            "-o",
            tmp_path / f"{number}",
            *SMALL,
        )
        assert code == 0, err
        assert "box_ap50" in out and "4 images, 2 classes; training images: 4" in out


MISTAKES = {
    "no annotations": (["--train", "COCO_FOLDER"], "expected IMAGES_FOLDER:annotations=FILE.json"),
    "image size": (["--image-size", "100"], "--image-size 100: expected a multiple of 32, as 96"),
    "scales": (["--scale-min", "3"], "--scale-min 3.0: above --scale-max 2.0"),
    "window": (
        ["--window", "3"],
        "--window 3: expected auto, off, or a side that divides the grid of 4",
    ),
    "epochs": (["--epochs", "0"], "--epochs 0: expected a whole number of 1 or more"),
    "ema": (["--ema", "1"], "--ema 1.0: expected a number of 0 or more and below 1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(case, coco, tmp_path, monkeypatch, capsys):
    options, message = MISTAKES[case]
    options = [coco.partition(":")[0] if o == "COCO_FOLDER" else o for o in options]
    given = [TINY, "--train", coco, "--val", coco, *SMALL, *options]
    code, _, err = run(monkeypatch, capsys, *given)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and message in lines[-1], err
    assert "Traceback" not in err


def test_without_pycocotools_one_line_says_what_to_install(coco, monkeypatch, capsys):
    find_spec = img2vec.evaluate.detection_eval.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name == "pycocotools" else find_spec(name, *more),
    )
    code, _, err = run(monkeypatch, capsys, TINY, "--train", coco, "--val", coco)
    assert code == 2 and "pip install 'tokdiv[dense]'" in err


def test_no_objects_to_learn_from_is_an_error(tmp_path, coco):
    empty = make_coco(tmp_path, 2)
    change(empty, lambda c: [a.update(bbox=[0, 0, 0, 0]) for a in c["annotations"]])
    with pytest.raises(
        UsageError, match=r"has no objects to learn from .4 left out: their boxes have no area"
    ):
        img2vec.detect(TINY, empty, coco, **FAST)
