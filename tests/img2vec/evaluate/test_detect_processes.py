"""Two gloo processes train together and evaluate each image once."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from coco_shapes import make_coco

from img2vec.evaluate import detect, load_detector
from img2vec.evaluate.coco import open_coco
from img2vec.evaluate.detection_eval import evaluate_detector
from tokdiv.dist import current_processes

TINY = "timm:vit_tiny_patch16_224@random:depth=2:embed_dim=32:num_heads=2"
FAST = {
    "image_size": 64, "channels": 8, "proposals": 16, "batch_size": 2, "micro_batch_size": 1,
    "warmup_steps": 1, "drop_path": 0.0, "workers": 0, "dtype": "float32", "device": "cpu", "lr": 1e-3,
}  # fmt: skip


def train_and_evaluate(coco: str, folder: Path) -> None:
    """Everything that is compared, into `folder`; called by every process."""
    # The sampling of anchors and proposals depends on the process; in order, it does not.
    torch.randperm = lambda n, **options: torch.arange(n, device=options.get("device"))
    detect(TINY, coco, coco, folder / "out", **FAST, max_steps=2)
    detector, _ = load_detector(folder / "out" / "model")
    detector.roi_heads.score_thresh = 0.0
    group = current_processes()
    metrics, by_class, skipped, shown = evaluate_detector(
        detector,
        open_coco(coco),
        batch_size=1,
        dtype="float32",
        workers=0,
        group=group,
        shown=(0, 1),
    )
    if group.rank == 0:
        found = {"metrics": metrics, "by_class": by_class, "skipped": list(skipped)}
        (folder / "evaluation.json").write_text(json.dumps(found))
        assert sorted(shown) == [0, 1]


def run_process(rank: int, port: int, coco: str, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    train_and_evaluate(coco, folder)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of one process and of two, on five images, one of them damaged."""
    root = tmp_path_factory.mktemp("processes")
    coco = make_coco(root / "coco", 5, crowd=(1,))
    (root / "coco" / "images" / "003.png").write_bytes(b"no image")
    for name in ("one", "two"):
        (root / name).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_process, args=(port, coco, root / "two"), nprocs=2, join=True)
    randperm = torch.randperm
    train_and_evaluate(coco, root / "one")
    torch.randperm = randperm
    return root / "one", root / "two"


def results(folder: Path) -> dict:
    return json.loads((folder / "out" / "results.json").read_text())


def test_the_losses_are_those_of_one_process(runs):
    one, two = (results(folder)["history"] for folder in runs)
    assert len(one) == len(two) == 1
    for name in ("loss", "loss_classifier", "loss_mask", "loss_objectness"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-3)


def test_counts_are_those_of_one_process(runs):
    one, two = (results(folder)["data"] for folder in runs)
    assert one == two
    assert one["val"]["images"] == 4 and one["val"]["skipped"] == 1


def test_the_evaluation_is_that_of_one_process(runs, tmp_path):
    # Of the same weights, to the last bit, on numbers of images that differ between the processes.
    one, two = (json.loads((folder / "evaluation.json").read_text()) for folder in runs)
    assert one["skipped"] == two["skipped"] == [3]
    detector, _ = load_detector(runs[1] / "out" / "model")
    detector.roi_heads.score_thresh = 0.0
    coco = results(runs[1])["data"]["val"]["name"]
    metrics, by_class, *_ = evaluate_detector(
        detector,
        open_coco(coco),
        batch_size=1,
        dtype="float32",
        workers=0,
        group=current_processes(),
    )
    assert metrics == two["metrics"] and by_class == two["by_class"]
