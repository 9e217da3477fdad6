"""Folders: which files are found, under which names, and what is left out."""

import json
import os
import shutil
import time
import tracemalloc

import numpy as np
import pytest
from image_files import keys, png, refusal, write

from tokdiv.data.decode import UnusableImage, image_extensions
from tokdiv.data.loader import read_batches
from tokdiv.data.open import open_source


def test_a_nested_folder_gives_sorted_paths_and_class_labels(tmp_path):
    names = ["b/x.PNG", "a/2.jpeg", "a/10.jpg", "a-b/1.webp", "a/deep/er/0.tif", "b/y.bmp"]
    write(tmp_path, dict.fromkeys(names, b"x") | {"a/notes.txt": b"", "b/.hidden.png": b""})
    write(tmp_path, {".git/z.png": b""})
    source = open_source(str(tmp_path))
    assert keys(source) == sorted(names)
    assert source.count == 6
    assert source.permutable
    assert source.classes == ["a", "a-b", "b"]
    assert source.labels is not None
    assert [source.classes[label] for label in source.labels] == [
        name.split("/")[0] for name in sorted(names)
    ]
    assert source.warning is None
    assert source.read(0) == b"x"


def test_the_pictures_of_runs_are_left_out_with_a_warning(tmp_path):
    config = json.dumps({"data": {"fingerprint": "0" * 64}, "versions": {}}).encode()
    runs = dict.fromkeys(["ranked/similarity.png", "ranked/state/x", "out/loss.png"], b"x")
    runs |= dict.fromkeys(["ranked/config.json", "out/config.json"], config)
    write(tmp_path, dict.fromkeys(["1.png", "photos/2.png"], b"x") | runs)
    source = open_source(str(tmp_path))
    assert keys(source) == ["1.png", "photos/2.png"]
    assert "2 folders of earlier runs are left out, as 'out'" in (source.warning or "")


@pytest.mark.parametrize(
    "config",
    [b"x", b"{}", b"[]", b'{"data": 1}', b'{"data": {"fingerprint": 1}}', b"[" * 100_000],
    ids=range(6),
)
def test_a_folder_that_is_no_run_is_data(tmp_path, config):
    """A class named `state` beside a config.json of another program was dropped without a word."""
    names = ["set/state/1.png", "set/checkpoints/2.png", "set/__metadata__/3.png"]
    others = {"set/config.json": config, "set/ranking.json": b""}
    write(tmp_path, dict.fromkeys(names, b"x") | others)
    source = open_source(str(tmp_path))
    assert keys(source) == sorted(names)
    assert open_source(str(tmp_path / "set")).classes == ["__metadata__", "checkpoints", "state"]
    assert source.warning is None


def test_a_flat_folder_has_no_labels(tmp_path):
    source = open_source(str(write(tmp_path, {"b.png": b"1", "a.ppm": b"2", "c/d.png": b"3"})))
    assert keys(source) == ["a.ppm", "b.png", "c/d.png"]
    assert source.labels is None
    assert source.classes is None
    assert [source.read(index) for index in range(3)] == [b"2", b"1", b"3"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path, {"data/a/1.png": b"1", "elsewhere/2.png": b"2"})
    root = tmp_path / "data"
    (root / "a" / "again").symlink_to(root)
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "gone.png").symlink_to(tmp_path / "nothing")
    source = open_source(str(root))
    assert keys(source) == ["a/1.png", "b/2.png", "gone.png"]
    with pytest.raises(FileNotFoundError):
        source.read(2)


def test_each_folder_is_read_once_however_many_links_lead_to_it(tmp_path):
    root = tmp_path / "data"
    write(tmp_path, {"data/z/1.png": b"1", "elsewhere/2.png": b"2", "data/.hidden/3.png": b"3"})
    (root / "a").symlink_to(root / "z")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "d").symlink_to(root / ".hidden")
    source = open_source(str(root))
    assert keys(source) == ["b/2.png", "d/3.png", "z/1.png"]
    assert source.classes == ["b", "d", "z"]
    warning = source.warning or ""
    assert "2 links to folders that are read anyway are left out, as 'a'" in warning


def test_a_tree_of_links_is_walked_at_once(tmp_path):
    """Each of 25 folders holds two links to the next one: 2^25 paths lead to the last."""
    for level in range(25):
        folder = tmp_path / "chain" / str(level)
        folder.mkdir(parents=True)
        for name in "ab":
            (folder / name).symlink_to(tmp_path / "chain" / str(level + 1))
    write(tmp_path, {"chain/25/1.png": b"1"})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "first").symlink_to(tmp_path / "chain" / "0")
    assert open_source(str(tmp_path / "data")).count == 1
    assert open_source(str(tmp_path / "chain")).count == 1


def test_a_link_to_itself_is_one_unusable_image(tmp_path):
    write(tmp_path, {"1.png": png(1)})
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    source = open_source(str(tmp_path))
    assert keys(source) == ["1.png", "loop.png"]
    (batch,) = read_batches(source, None, [np.arange(2)], {8}, workers=1)
    assert batch.usable.tolist() == [True, False]
    assert "Too many levels of symbolic links" in (batch.reasons[1] or "")


def test_only_regular_files_are_read(tmp_path):
    write(tmp_path, {"data/1.png": png(1)})
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "data" / "fifo.png").symlink_to(tmp_path / "fifo")
    (tmp_path / "data" / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "data" / "pipe.jpg")
    source = open_source(str(tmp_path / "data"))
    assert keys(source) == ["1.png"]
    assert "3 FIFOs, sockets or devices are left out" in (source.warning or "")
    # A file that has become one meanwhile is not waited for either.
    (tmp_path / "data" / "1.png").unlink()
    os.mkfifo(tmp_path / "data" / "1.png")
    with pytest.raises(UnusableImage, match="not a regular file"):
        source.read(0)


def test_a_file_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    write(tmp_path, {"1.png": png(1)})
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(60 * 2**30)
    source = open_source(str(tmp_path))
    (batch,) = read_batches(source, None, [np.arange(2)], {8}, workers=1)
    assert batch.usable.tolist() == [True, False]
    assert batch.reasons[1] == (
        "too large: 64,424,509,440 encoded bytes, at most 536,870,912 are read "
        "(TOKDIV_MAX_IMAGE_BYTES)"
    )
    monkeypatch.setenv("TOKDIV_MAX_IMAGE_BYTES", str(len(png(1))))
    assert source.read(0) == png(1)
    monkeypatch.setenv("TOKDIV_MAX_IMAGE_BYTES", str(len(png(1)) - 1))
    with pytest.raises(UnusableImage, match="too large"):
        source.read(0)
    for wrong in ("0", "-1", "many", "", "9" * 30):
        monkeypatch.setenv("TOKDIV_MAX_IMAGE_BYTES", wrong)
        assert f"TOKDIV_MAX_IMAGE_BYTES={wrong}: expected a number of bytes" in refusal(tmp_path)


def test_images_that_cannot_be_read_here_are_counted(tmp_path):
    names = ["a.jpg", "b.heic", "c.HEIC", "d.jp2", "notes.txt", "e.avif"]
    write(tmp_path, dict.fromkeys(names, b"x"))
    source = open_source(str(tmp_path))
    warning, readable = source.warning or "", image_extensions()
    assert "1 .jp2 file is left out: convert them to PNG, TIFF or JPEG" in warning
    assert "txt" not in warning
    assert ("e.avif" in keys(source)) == (".avif" in readable) == (".avif" not in warning)
    if ".heic" not in readable:
        assert "2 .heic files are left out: pip install pillow-heif, or convert them" in warning
        write(tmp_path / "heic", {"a.heic": b"x"})
        assert "pip install pillow-heif" in refusal(tmp_path / "heic")


def test_a_name_that_is_no_utf8_can_be_stored_and_read(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(b"x")
    source = open_source(str(tmp_path))
    assert source.key(0) == "caf\\udce9.png"
    assert source.key(0).encode()
    assert source.read(0) == b"x"


def test_the_fingerprint_is_of_the_data_and_not_of_its_place(tmp_path):
    write(tmp_path / "one", {"a/1.png": b"1", "b/2.png": b"22"})
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two/a/1.png", (0, 0))
    first = open_source(str(tmp_path / "one")).fingerprint
    assert len(first) == 64
    assert open_source(str(tmp_path / "two")).fingerprint == first
    write(tmp_path / "two", {"a/1.png": b"123"})
    assert open_source(str(tmp_path / "two")).fingerprint != first
    write(tmp_path / "two", {"a/1.png": b"1"})
    (tmp_path / "two/b").rename(tmp_path / "two/c")
    assert open_source(str(tmp_path / "two")).fingerprint != first


def test_a_folder_that_may_not_be_read_is_an_error_and_not_left_out(tmp_path, monkeypatch):
    write(tmp_path, {"a/1.png": b"1", "b/2.png": b"2"})
    scandir = os.scandir

    def forbid(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    message = refusal(tmp_path)
    assert "Permission denied" in message
    assert "/b'" in message


def test_an_index_is_small_and_quick(tmp_path):
    (tmp_path / "first.JPEG").write_bytes(b"x")
    for folder in range(10):
        (tmp_path / "data" / f"n{folder:08d}").mkdir(parents=True)
        for number in range(500):
            name = f"n{folder:08d}/n{folder:08d}_{number}.JPEG"
            os.link(tmp_path / "first.JPEG", tmp_path / "data" / name)
    tracemalloc.start()
    begin = time.process_time()
    source = open_source(str(tmp_path / "data"))
    seconds = time.process_time() - begin
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.count == 5000
    assert current / 5000 < 150
    assert seconds / 5000 < 200e-6
