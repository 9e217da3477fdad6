"""Opening DATA: what is taken, in which order, and what is refused."""

import os

import numpy as np
from image_files import keys, png, refusal, write

from tokdiv.data.loader import permutation
from tokdiv.data.open import open_source


def test_the_permutation_is_stable_and_uniform():
    # These numbers may never change: a run that is resumed would measure other images.
    assert permutation(8, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    draws = np.array([permutation(5, seed) for seed in range(4000)])
    counts = np.stack([(draws == value).sum(axis=0) for value in range(5)])
    assert (np.abs(counts - 800) < 5 * np.sqrt(800 * 0.8)).all()
    assert permutation(1000, 3).dtype == np.int64
    assert np.array_equal(np.sort(permutation(1000, 3)), np.arange(1000))
    assert permutation(0, 1).shape == (0,)


def test_what_is_no_data_is_refused_with_a_remedy(tmp_path, monkeypatch):
    assert "no such folder or file" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "found nothing" in refusal(tmp_path / "empty")
    write(tmp_path / "texts", {"a.txt": b"", "b.txt": b"", "c": b""})
    message = refusal(tmp_path / "texts")
    assert "2 .txt, 1 without extension" in message
    assert ".jpeg" in message
    write(tmp_path, {"one.png": png(), "notes.txt": b"hello" * 300})
    assert "single image" in refusal(tmp_path / "one.png")
    assert "is no .tar" in refusal(tmp_path / "notes.txt")
    assert "DATA is empty" in refusal("")
    assert "name the folder itself" in refusal(f"{tmp_path}/nothing:split=val")
    assert "wds/https://" in refusal("https://host/a.tar")
    os.mkfifo(tmp_path / "pipe")
    assert "neither a folder nor a file" in refusal(tmp_path / "pipe")


def test_a_path_wins_over_a_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"torch/cifar10/a.png": png(), "odd:split=1/a.png": png()})
    assert keys(open_source("torch/cifar10")) == ["a.png"]
    assert keys(open_source("odd:split=1")) == ["a.png"]
