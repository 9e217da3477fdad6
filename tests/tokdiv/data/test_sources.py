"""Sources: what is found, under which names, in which order, and what is refused."""

import io
import json
import os
import shutil
import sys
import tarfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tokdiv.data.source
import tokdiv.data.stream
import tokdiv.data.tar
from tokdiv.data.loader import permutation, read_batches
from tokdiv.data.open import open_source
from tokdiv.errors import RunError, UsageError


def png(level: int = 0, side: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (level % 256, level // 256, 7)).save(file, "PNG")
    return file.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def keys(source) -> list[str]:
    return [source.key(index) for index in range(source.count)]


def refusal(data: object) -> str:
    with pytest.raises(UsageError) as caught:
        open_source(str(data))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Order


def test_the_permutation_is_stable_and_uniform():
    # These numbers may never change: a run that is resumed would measure other images.
    assert permutation(8, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    draws = np.array([permutation(5, seed) for seed in range(4000)])
    counts = np.stack([(draws == value).sum(axis=0) for value in range(5)])
    assert (np.abs(counts - 800) < 5 * np.sqrt(800 * 0.8)).all()
    assert permutation(1000, 3).dtype == np.int64
    assert np.array_equal(np.sort(permutation(1000, 3)), np.arange(1000))
    assert permutation(0, 1).shape == (0,)


# Folders


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


def test_the_pictures_of_runs_are_no_data(tmp_path):
    runs = ["ranked/config.json", "ranked/similarity.png", "ranked/state/x", "out/config.json"]
    runs += ["out/loss.png", "out/checkpoints/last"]
    names = ["1.png", "photos/2.png", "photos/config.json"]
    write(tmp_path, dict.fromkeys([*names, *runs], b"x"))
    assert keys(open_source(str(tmp_path))) == ["1.png", "photos/2.png"]


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
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "gone.png").symlink_to(tmp_path / "nothing")
    source = open_source(str(root))
    assert keys(source) == ["a/1.png", "b/2.png", "c/2.png", "gone.png"]
    with pytest.raises(FileNotFoundError):
        source.read(3)


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
    begin = time.perf_counter()
    source = open_source(str(tmp_path / "data"))
    seconds = time.perf_counter() - begin
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.count == 5000
    assert current / 5000 < 150
    assert seconds / 5000 < 200e-6


# Tars


def test_a_tar_is_read_at_random(tmp_path):
    files = [(f"./photos/{n % 3}/{n}.png", png(n)) for n in range(20)]
    path = write_tar(tmp_path / "t.tar", [*files, ("photos/readme.txt", b"x" * 5000)])
    source = open_source(str(path))
    assert keys(source) == [name[2:] for name, _ in files]
    assert source.classes == ["0", "1", "2"]
    assert source.labels is not None
    assert source.labels.tolist() == [n % 3 for n in range(20)]
    with ThreadPoolExecutor(8) as pool:
        order = permutation(20, 0).tolist() * 20
        for index, content in zip(order, pool.map(source.read, order)):
            assert content == files[index][1]


def test_shards_are_indexed_together(tmp_path):
    for shard in range(3):
        samples = []
        for n in range(4):
            samples += [
                (f"{shard}{n}.jpg", png(n)),
                (f"{shard}{n}.cls", str(10 * shard + n).encode()),
            ]
        write_tar(tmp_path / f"train-{shard:04d}.tar", samples)
    for data in (tmp_path, f"{tmp_path}/train-{{0000..0002}}.tar", f"{tmp_path}/train-*.tar"):
        source = open_source(str(data))
        assert source.count == 12
        assert source.key(5) == "train-0001.tar/11.jpg"
        assert source.labels is not None
        assert source.labels.tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
        assert source.classes is None
        assert source.read(7) == png(3)
    assert "no such shard" in refusal(f"{tmp_path}/train-{{0000..0005}}.tar")
    assert "no file matches" in refusal(f"{tmp_path}/val-*.tar")


def test_labels_of_a_tar_come_from_json_too_and_need_every_image(tmp_path):
    samples = [("a.json", json.dumps({"label": 4}).encode()), ("a.png", png())]
    more = [("b.left.png", png(1)), ("b.right.png", png(1)), ("b.json", b'{"cls": 2}')]
    both = [("c.json", b'{"label": 5}'), ("c.cls", b"6\n"), ("c.1.png", png()), ("c.2.png", png())]
    source = open_source(str(write_tar(tmp_path / "t.tar", samples + more + both)))
    assert source.labels is not None
    assert source.labels.tolist() == [4, 2, 2, 6, 6]
    source = open_source(str(write_tar(tmp_path / "u.tar", [*samples, ("b.png", png(1))])))
    assert source.labels is None


def test_equal_names_in_a_tar_are_told_apart(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("a.png", png(n)) for n in range(3)] + [("a.png#2", b"")])
    assert keys(open_source(str(path))) == ["a.png", "a.png#2", "a.png#3"]
    names = ["a", "a#2", "a", "a", "a#2"]
    assert tokdiv.data.source.unique(names) == ["a", "a#2", "a#3", "a#4", "a#2#2"]


def test_hard_links_in_a_tar_are_images_too(tmp_path):
    (tmp_path / "1.png").write_bytes(png(1))
    os.link(tmp_path / "1.png", tmp_path / "2.png")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(tmp_path / "1.png", "1.png")
        tar.add(tmp_path / "2.png", "2.png")
    source = open_source(str(tmp_path / "t.tar"))
    assert keys(source) == ["1.png", "2.png"]
    assert source.read(1) == png(1)


def test_of_a_damaged_tar_the_whole_members_are_used(tmp_path):
    path = write_tar(tmp_path / "t.tar", [(f"{n}.png", png(n)) for n in range(9)])
    content = path.read_bytes()
    members = 1024  # header and one block of data each
    path.write_bytes(content[: 5 * members + 520])
    source = open_source(str(path))
    assert source.count == 5
    assert "cut off after 5 files" in (source.warning or "")
    path.write_bytes(content[: 5 * members])
    assert "no end mark" in (open_source(str(path)).warning or "")
    path.write_bytes(content[: 4 * members] + b"\xee" * 512 + content[4 * members + 512 :])
    source = open_source(str(path))
    assert source.count == 4
    assert "damaged after 4 files" in (source.warning or "")
    path.write_bytes(content[:520])
    assert "before its first whole file" in refusal(path)
    path.write_bytes(b"\xee" * 2048)
    assert "is no .tar" in refusal(path)
    path.write_bytes(b"")
    assert "is no .tar" in refusal(path)


def test_a_compressed_tar_is_refused_with_a_remedy(tmp_path):
    write_tar(tmp_path / "t.tar", [("a.png", png())])
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "t.tar", "a.png")
    assert "unpack it" in refusal(tmp_path / "t.tar.gz")
    (tmp_path / "t.tar.gz").rename(tmp_path / "disguised.tar")
    assert "unpack it" in refusal(tmp_path / "disguised.tar")


def test_a_tar_without_images_is_refused(tmp_path):
    message = refusal(write_tar(tmp_path / "t.tar", [("a.txt", b""), ("b.txt", b"")]))
    assert "holds no images: found 2 .txt" in message


def test_a_tar_that_shrinks_meanwhile_fails_for_its_images_only(tmp_path):
    path = write_tar(tmp_path / "t.tar", [(f"{n}.png", png(n)) for n in range(3)])
    source = open_source(str(path))
    os.truncate(path, 1024)
    assert source.read(0) == png(0)
    with pytest.raises(OSError, match="ends before the image"):
        source.read(2)


# Shard streams


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    for shard in range(4):
        samples = []
        for n in range(50):
            key = f"{shard}-{n:03d}"
            samples.append((f"{key}.png", png(50 * shard + n)))
            samples.append((f"{key}.seg.png", png(1)))
            samples.append((f"{key}.cls", str(rng.integers(10)).encode()))
        write_tar(tmp_path / f"s-{shard}.tar", samples)
    return tmp_path


def test_a_stream_is_shuffled_whole_and_the_same_for_a_seed(shards):
    source = open_source(f"wds/{shards}")
    assert not source.permutable
    assert source.count is None
    assert source.labels is None
    assert source.warning is None
    first = list(source.stream(seed=3))
    assert first == list(source.stream(seed=3))
    assert first != list(source.stream(seed=4))
    assert len({key for key, _ in first}) == 200
    assert dict(first)["s-2.tar/2-007.png"] == png(107)
    shards_seen = [key[:3] for key, _ in first[:50]]
    assert len(set(shards_seen)) == 4  # the buffer holds all of this small stream
    other = open_source(f"wds/{shards}/s-{{0..3}}.tar")
    assert other.fingerprint == source.fingerprint
    assert sorted(other.stream(3)) == sorted(first)


def test_the_buffer_is_bounded_by_images_and_by_bytes(shards, monkeypatch):
    source = open_source(f"wds/{shards}")
    monkeypatch.setattr(tokdiv.data.stream, "BUFFER_IMAGES", 20)
    order = [key for key, _ in source.stream(0)]
    assert len(set(order)) == 200
    assert len({key[:3] for key in order[:30]}) == 1  # 30 drawn from the first 50 only
    monkeypatch.setattr(tokdiv.data.stream, "BUFFER_IMAGES", 10_000)
    monkeypatch.setattr(tokdiv.data.stream, "BUFFER_BYTES", 10 * len(png()))
    order = [key for key, _ in source.stream(0)]
    assert len(set(order)) == 200
    assert len({key[:3] for key in order[:30]}) == 1


def test_the_count_and_the_split_come_from_an_info_file(shards):
    info = {
        "train": {
            "name": "train",
            "num_samples": 150,
            "filenames": ["s-0.tar", "s-1.tar", "s-2.tar"],
        },
        "val": {"name": "val", "num_samples": 50, "filenames": ["s-3.tar"]},
    }
    (shards / "_info.json").write_text(json.dumps({"splits": info}))
    assert open_source(f"wds/{shards}").count == 150
    source = open_source(f"wds/{shards}:split=val")
    assert source.count == 50
    assert len(list(source.stream(0))) == 50
    assert "train, val" in refusal(f"wds/{shards}:split=test")


def test_class_sorted_shards_are_warned_about(tmp_path):
    def samples(label_of):
        files = []
        for n in range(40):
            files += [(f"{n:03d}.png", png()), (f"{n:03d}.cls", str(label_of(n)).encode())]
        return files

    for name, labels in {
        "by shard": [lambda n: 0, lambda n: 1],
        "within": [lambda n: n // 10, lambda n: 4 + n // 10],
        "mixed": [lambda n: n * 7 % 10, lambda n: n * 3 % 10],
        "one class": [lambda n: 0, lambda n: 0],
    }.items():
        (tmp_path / name).mkdir()
        for number, label_of in enumerate(labels):
            write_tar(tmp_path / name / f"{number}.tar", samples(label_of))
        warning = open_source(f"wds/{tmp_path / name}").warning
        assert ("class-sorted shards" in (warning or "")) == (name in ("by shard", "within"))


def test_a_damaged_shard_costs_only_its_rest(shards):
    path = shards / "s-1.tar"
    path.write_bytes(path.read_bytes()[:20_000])
    source = open_source(f"wds/{shards}")
    found = [key for key, _ in source.stream(0)]
    assert 150 < len(found) < 200
    assert sum(key.startswith("s-1") for key in found) == len(found) - 150
    assert "s-1.tar is damaged" in (source.warning or "")
    list(source.stream(1))
    assert len(source.warnings) == 1


def test_a_stream_without_an_image_is_an_error(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"")])
    with pytest.raises(RunError, match="no image in any shard"):
        list(open_source(f"wds/{tmp_path}").stream(0))


def test_compressed_shards_can_be_streamed(shards, tmp_path):
    folder = tmp_path / "packed"
    folder.mkdir()
    with tarfile.open(folder / "s.tar.gz", "w:gz") as tar:
        for n in range(3):
            info = tarfile.TarInfo(f"{n}.png")
            info.size = len(png(n))
            tar.addfile(info, io.BytesIO(png(n)))
    assert len(list(open_source(f"wds/{folder}").stream(0))) == 3


def test_commands_and_odd_urls_are_refused(tmp_path, monkeypatch):
    for data in ("wds/pipe:cat x.tar", "pipe:cat x.tar", "wds/a.tar|cat"):
        assert "shell command" in refusal(data)
    assert "no such shard" in refusal(f"wds/{tmp_path}/none-{{0..3}}.tar")
    assert "no .tar files" in refusal(f"wds/{tmp_path}")


def test_a_command_put_together_by_braces_is_refused_and_not_run(tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    script.chmod(0o755)
    for data in (
        f"wds/{{,}}pipe:{script}&://",
        f"wds/{{pi,}}pe:{script}&://",
        f"wds/{{p,}}{{ipe:,}}{script}&://.tar",
        f"wds/PIPE:{script}&://",
        f"wds/{{http://host/a.tar,pipe:{script}&://}}",
    ):
        assert "shell command" in refusal(data) or "URLs and some are files" in refusal(data)
    assert "not from 's3://" in refusal("wds/s3://bucket/a.tar")
    assert "not from 'file://" in refusal("wds/file:///a.tar")
    assert not (tmp_path / "ran").exists()


def test_a_pattern_of_too_many_shards_is_refused_at_once():
    assert "more than 1,000,000 shards" in refusal("wds/" + "{a,b}" * 24 + ".tar")
    assert "more than 1,000,000 shards" in refusal("wds/a-{0..999999999}.tar")


def test_shards_at_a_url_are_streamed(shards, monkeypatch):
    monkeypatch.setattr(
        "urllib.request.urlopen",
        lambda url, timeout: (shards / url.rpartition("/")[2]).open("rb"),
    )
    source = open_source("wds/https://host/data/s-{0..3}.tar")
    assert len(list(source.stream(0))) == 200


# Data sets of other packages


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["cat", "dog"]), "image": datasets.Image()}
    )
    rows = [{"bytes": png(n), "path": f"{n % 8}.png"} for n in range(10)]
    return datasets.Dataset.from_dict(
        {"label": [n % 2 for n in range(10)], "image": rows}, features=features
    )


def check_hugging_face(source) -> None:
    assert source.count == 10
    assert source.permutable
    assert source.labels.tolist() == [0, 1] * 5
    assert source.classes == ["cat", "dog"]
    assert keys(source)[:3] == ["0.png", "1.png", "2.png"]
    assert source.key(8) == "0.png#2"
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, range(10))) == [png(n) for n in range(10)]


def test_a_hugging_face_data_set_from_disk(hugging_face, tmp_path):
    hugging_face.save_to_disk(str(tmp_path / "saved"))
    source = open_source(f"hfds/{tmp_path / 'saved'}")
    check_hugging_face(source)
    hugging_face.save_to_disk(str(tmp_path / "again"))
    assert open_source(f"hfds/{tmp_path / 'again'}").fingerprint == source.fingerprint


def test_splits_of_a_hugging_face_data_set(hugging_face, tmp_path):
    import datasets

    splits = datasets.DatasetDict(train=hugging_face.select([0]), test=hugging_face)
    splits.save_to_disk(str(tmp_path / "saved"))
    check_hugging_face(open_source(f"hfds/{tmp_path / 'saved'}:split=test"))
    assert "['train', 'test']" in refusal(f"hfds/{tmp_path / 'saved'}:split=val")


def test_a_folder_of_parquet_files(hugging_face, tmp_path):
    (tmp_path / "parquet").mkdir()
    hugging_face.to_parquet(str(tmp_path / "parquet" / "train-0.parquet"))
    check_hugging_face(open_source(f"hfds/{tmp_path / 'parquet'}"))
    assert "val" in refusal(f"hfds/{tmp_path / 'parquet'}:split=val")


def test_a_hugging_face_image_folder_is_read_from_its_files(hugging_face, tmp_path):
    write(tmp_path / "images", {"cat/1.png": png(1), "dog/2.png": png(2)})
    source = open_source(f"hfds/{tmp_path / 'images'}")
    assert sorted(keys(source)) == ["cat/1.png", "dog/2.png"]
    assert source.read(keys(source).index("dog/2.png")) == png(2)


def test_a_hugging_face_stream_is_told_its_length(hugging_face, tmp_path):
    (tmp_path / "set").mkdir()
    hugging_face.to_parquet(str(tmp_path / "set" / "train-0.parquet"))
    data = f"hfids/{tmp_path / 'set'}"
    assert "num_samples=N" in refusal(data)
    for wrong in ("0", "many"):
        assert "with N of 1 or more" in refusal(f"{data}:num_samples={wrong}")
    assert "hfids/NAME:num_samples" in refusal("tfds/mnist:num_samples=3")
    source = open_source(f"{data}:num_samples={len(hugging_face)}")
    assert source.count == len(list(source.stream(0))) == len(hugging_face)
    assert not source.permutable


def test_an_unknown_or_unreachable_hugging_face_data_set_is_one_line(hugging_face):
    assert "hfds/nobody/nothing-here" in refusal("hfds/nobody/nothing-here")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install tokdiv[hf]" in refusal("hfds/name")
    pytest.importorskip("timm")
    if "tensorflow_datasets" not in sys.modules:
        assert "tensorflow" in refusal("tfds/mnist")


def test_a_torchvision_data_set(tmp_path):
    write(tmp_path, {"a/1.png": png(1), "b/2.png": png(2), "b/3.png": png(3)[:-20]})
    source = open_source(f"torch/image_folder:root={tmp_path}")
    assert source.count == 3
    assert source.permutable
    assert source.classes == ["a", "b"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 1]
    assert keys(source) == ["0", "1", "2"]
    batch = next(read_batches(source, None, [np.arange(2)], [8], workers=2))
    assert batch.usable.all()
    assert batch.views[8][1, 0].unique().tolist() == [2]
    message = refusal(f"torch/cifar10:root={tmp_path}:split=test")
    assert "cifar10" in message
    assert ":root=" in message
    assert "cannot be opened" in refusal("torch/unheard_of")


def test_what_timm_reads_as_a_stream(monkeypatch):
    import timm.data

    class Stream:
        def __iter__(self):
            for n in range(30):
                yield Image.new("RGB", (4, 4), (n, 0, 0)), n

    opened = []

    def create_dataset(name, **options):
        opened.append((name, options["split"]))
        return Stream()

    monkeypatch.setattr(timm.data, "create_dataset", create_dataset)
    source = open_source("tfds/mnist:split=test")
    assert opened == [("tfds/mnist", "test")]
    assert source.count is None
    assert not source.permutable
    first = [key for key, _ in source.stream(1)]
    assert sorted(first, key=int) == [str(n) for n in range(30)]
    assert first != sorted(first, key=int)
    assert first == [key for key, _ in source.stream(1)]
    batch = next(read_batches(source, None, [np.arange(5)], [8], workers=2, seed=1))
    assert batch.keys == first[:5]
    assert batch.views[8][:, 0, 0, 0].tolist() == [int(key) for key in first[:5]]


def test_a_path_wins_over_a_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"torch/cifar10/a.png": png(), "odd:split=1/a.png": png()})
    assert keys(open_source("torch/cifar10")) == ["a.png"]
    assert keys(open_source("odd:split=1")) == ["a.png"]
