"""Results as files: names that are no UTF-8, full disks, folders that cannot be made."""

import csv
import errno
import json
import os
from pathlib import Path

import pytest

from img2vec.evaluate import Results, finetune, knn, probe
from tokdiv import run_dir
from tokdiv.errors import RunError


def results(**changes) -> Results:
    side = {"name": "train", "fingerprint": "0", "images": 2, "skipped": 1}
    fields = {
        "task": "knn",
        "model": "tiny",
        "metrics": {"top1_k5": 0.5, "loss": 1.25},
        "settings": {"k": [5, 10], "feature": "mean"},
        "data": {"train": side, "val": side, "classes": 2},
        "notes": ["a note"],
    }
    return Results(**{**fields, **changes})


def test_the_table_has_percent_data_and_notes():
    assert results().table().splitlines() == [
        "knn of tiny",
        "  top1_k5   50.00 %",
        "  loss         1.25",
        "  2 images, 2 classes; training images: 2; 2 unusable",
        "  note: a note",
    ]


def test_files_hold_what_the_results_hold(tmp_path):
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    run_dir.part_of(folder / "results.csv").write_text("left by a killed run")
    results().write(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["results.csv", "results.json"]
    stored = json.loads((folder / "results.json").read_text())
    assert Results(**{k: v for k, v in stored.items() if k != "schema"}) == results()
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["metric"], row["value"], row["k"]) for row in rows] == [
        ("top1_k5", "0.5", "5 10"),
        ("loss", "1.25", "5 10"),
    ]
    assert rows[0]["train_skipped"] == "1"


def test_a_full_disk_and_a_folder_that_cannot_be_made_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write '.*file/folder': Not a directory"):
        results().write(tmp_path / "file" / "folder")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_dir.os, "fsync", full)
    with pytest.raises(RunError, match=r"results\.json': the disk is full"):
        results().write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="paths are text elsewhere")
def test_paths_and_classes_that_are_no_utf_8_are_escaped(pictures, tiny, tmp_path):
    root = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(root)
    for part, folder in zip((b"train", b"val"), pictures):
        os.mkdir(root + b"/" + part)
        for name in sorted(os.listdir(folder)):
            given = b"\xff" + name.encode() if name == "cat" else name.encode()
            os.symlink(os.path.join(folder, name), root + b"/" + part + b"/" + given)
    data = [os.fsdecode(root + b"/" + part) for part in (b"train", b"val")]
    here = {"device": "cpu", "dtype": "float32", "workers": 1}
    found = knn(tiny, *data, tmp_path / "knn", k=[5], **here)
    assert found.data["train"]["name"].endswith(r"caf\udce9/train")
    probe(tiny, *data, tmp_path / "probe", solver="lbfgs", penalty=0.1, **here)
    finetune(tiny, *data, tmp_path / "finetune", epochs=1, warmup_epochs=0, **here)
    out = os.fsdecode(root + b"/out")  # and the folder lies under such a path
    finetune(tiny, *data, out, epochs=1, warmup_epochs=0, **here)
    assert (Path(out) / "model" / "model.safetensors").is_file()
    for task in ("knn", "probe", "finetune"):
        text = (tmp_path / task / "results.json").read_text(encoding="utf-8")
        json.loads(text)["data"]["train"]["name"].encode("utf-8")
        assert r"caf\udce9/train" in (tmp_path / task / "results.csv").read_text(encoding="utf-8")
        found.table().encode("utf-8")
    config = json.loads((tmp_path / "finetune" / "model" / "config.json").read_text())
    assert r"\udcffcat" in config["label_names"]
