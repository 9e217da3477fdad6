"""Two gloo processes find what one finds, on data that does not divide evenly."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from img2vec.evaluate import extract_features, finetune, knn, load_encoder, open_labeled, probe
from tokdiv.dist import current_processes


def evaluate_all(tiny: str, pictures: tuple[str, str], folder: Path) -> None:
    """Everything that is compared, into `folder`; called by every process."""
    encoder = load_encoder(tiny, device="cpu", dtype="float32")
    train, _ = open_labeled(*pictures)
    features = extract_features(encoder, train, 32, batch_size=8, workers=1)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(features.__dict__, folder / "features.pt")
    here = {"device": "cpu", "dtype": "float32"}
    knn(tiny, *pictures, folder / "knn", k=(5, 20), workers=1, **here)
    probe(
        tiny,
        *pictures,
        folder / "lbfgs",
        solver="lbfgs",
        penalty=0.01,
        workers=1,
        device="cpu",
        dtype="float32",
    )
    probe(tiny, *pictures, folder / "lars", epochs=3, lr=60.0, batch_size=16, workers=0, **here)
    finetune(
        tiny,
        *pictures,
        folder / "finetune",
        epochs=2,
        batch_size=16,
        lr=1e-2,
        warmup_epochs=0,
        mixup=0.0,
        cutmix=0.0,
        drop_path=0.0,
        smoothing=0.0,
        workers=0,
        **here,
    )


def run_process(rank: int, port: int, tiny: str, pictures: tuple[str, str], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    rows = torch.arange(3 * rank + 2)[:, None].repeat(1, 2) + 10 * rank
    gathered = current_processes().gather_rows(rows)
    assert gathered[:, 0].tolist() == [0, 1, 10, 11, 12, 13, 14]
    evaluate_all(tiny, pictures, folder)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(pictures, tiny, tmp_path_factory):
    """The folders of one process and of two."""
    root = tmp_path_factory.mktemp("processes")
    for name in ("one", "two"):
        (root / name).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(
        run_process, args=(port, tiny, pictures, root / "two"), nprocs=2, join=True
    )
    evaluate_all(tiny, pictures, root / "one")
    return root / "one", root / "two"


def results(folder: Path, task: str) -> dict:
    return json.loads((folder / task / "results.json").read_text())


def test_features_are_those_of_one_process(runs):
    one, two = (torch.load(folder / "features.pt", weights_only=False) for folder in runs)
    torch.testing.assert_close(one["features"], two["features"], rtol=1e-5, atol=1e-6)
    assert torch.equal(one["positions"], two["positions"])
    assert torch.equal(one["labels"], two["labels"])
    assert len(one["positions"]) == 49
    assert one["skipped"] == two["skipped"] == 1


@pytest.mark.parametrize("task", ["knn", "lbfgs", "lars"])
def test_accuracies_and_counts_are_those_of_one_process(runs, task):
    one, two = (results(folder, task) for folder in runs)
    assert two["metrics"] == one["metrics"]
    assert two["data"] == one["data"]
    assert two["data"]["val"]["images"] == 23


def test_the_probes_loss_is_that_of_one_process(runs):
    one, two = (results(folder, "lars")["history"] for folder in runs)
    assert [entry["loss"] for entry in two] == pytest.approx(
        [entry["loss"] for entry in one], rel=1e-4
    )


def test_fine_tuning_takes_the_steps_of_one_process(runs):
    one, two = (results(folder, "finetune") for folder in runs)
    assert two["data"] == one["data"]
    for first, second in zip(one["history"], two["history"]):
        # Where one process has the damaged picture, its part of the mean weighs a little more.
        assert second["loss"] == pytest.approx(first["loss"], rel=0.02)
        assert second["val_loss"] == pytest.approx(first["val_loss"], rel=0.05)
