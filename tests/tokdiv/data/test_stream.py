"""Shards as streams: their order, their buffer, and which shards are meant."""

import gzip
import io
import json
import os
import tarfile

import numpy as np
import pytest
from image_files import png, refusal, write_tar

import tokdiv.data.source
import tokdiv.data.stream
from tokdiv.data.loader import read_batches
from tokdiv.data.open import open_source
from tokdiv.errors import RunError


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
    assert "s-1.tar is cut off (after 7 images" in (source.warning or "")
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


def names_in(data) -> list[str]:
    return sorted(key.partition("/")[2] for key, _ in open_source(f"wds/{data}").stream(0))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        [f"shot.{n:04d}.png" for n in range(200)],
        [f"{animal}.{n}.jpg" for animal in ("cat", "dog") for n in range(50)],
        ["J. K. Rowling.jpg", "J. R. R. Tolkien.jpg", "a.b/c.d.png", "a.b/c.e.png"],
        [f"scan.page-{chr(97 + n // 26)}{chr(97 + n % 26)}.png" for n in range(200)],
        ["8.left.png", "8.right.png", "9.left.png", "9.right.png"],
    ],
    ids=["numbers", "Kaggle", "initials", "many letters", "two views"],
)
def test_dotted_names_are_images_of_their_own(tmp_path, names, packed):
    path = write_tar(tmp_path / "s.tar", [(name, png(n)) for n, name in enumerate(names)])
    if packed:
        (tmp_path / "s.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert names_in(tmp_path) == sorted(names)
    found = dict(open_source(f"wds/{tmp_path}").stream(0))
    shard = "s.tar.gz" if packed else "s.tar"
    assert all(found[f"{shard}/{name}"] == png(n) for n, name in enumerate(names))


def test_an_image_that_accompanies_another_is_no_image_of_its_own(tmp_path):
    files = [("7.depth.png", png(9)), ("7.png", png(7)), ("7.seg.png", png(9)), ("7.cls", b"7")]
    files += [("8.depth.png", png(8)), ("8.1.png", png(8))]
    files += [("dir/9.jpg", png(9)), ("dir/9.mask.jpg", png(1))]
    write_tar(tmp_path / "s.tar", files)
    assert names_in(tmp_path) == ["7.png", "8.1.png", "8.depth.png", "dir/9.jpg"]


def test_what_was_held_of_a_damaged_shard_is_not_lost(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.left.png", png(1)), ("b.png", png(2))])
    path.write_bytes(path.read_bytes()[:1540])
    assert names_in(tmp_path) == ["a.left.png"]


def test_images_beyond_the_limit_are_listed(tmp_path, monkeypatch):
    small = len(png(1))
    files = [("1.png", png(1)), ("2.png", bytes(small + 1)), ("3.png", png(3))]
    write_tar(tmp_path / "s.tar", files)
    monkeypatch.setenv("TOKDIV_MAX_IMAGE_BYTES", str(small))
    source = open_source(f"wds/{tmp_path}")
    (batch,) = read_batches(source, None, [np.arange(3)], {8}, workers=2)
    reasons = dict(zip(batch.keys, batch.reasons))
    assert "too large" in (reasons["s.tar/2.png"] or "")
    assert [reasons[f"s.tar/{n}.png"] for n in (1, 3)] == [None, None]


def test_joined_tars_and_other_formats_are_warned_about(tmp_path):
    first = write_tar(tmp_path / "1.tar", [("a.png", png(1)), ("b.jp2", b"x")]).read_bytes()
    second = write_tar(tmp_path / "2.tar", [("b.png", png(2))]).read_bytes()
    for path in tmp_path.iterdir():
        path.unlink()
    for name, content in (("t.tar", first + second), ("t.tar.gz", gzip.compress(first + second))):
        (tmp_path / name).write_bytes(content)
        source = open_source(f"wds/{tmp_path / name}")
        assert [key for key, _ in source.stream(0)] == [f"{name}/a.png"]
        assert "more data after its end mark" in (source.warning or "")
        assert "1 .jp2 file is left out" in (source.warning or "")


def test_a_shard_that_cannot_be_read_ends_the_stream(shards, monkeypatch):
    """Without it, other images would stand at the positions that follow once it can be read again."""
    source = open_source(f"wds/{shards}")
    (shards / "s-2.tar").unlink()
    with pytest.raises(RunError, match=r"s-2.tar' cannot be read: .*make it available again"):
        list(source.stream(0))


def test_shards_that_cannot_be_fetched_end_the_stream_at_the_third_in_a_row(shards, monkeypatch):
    gone = {"s-1.tar"}

    def urlopen(url, timeout):
        if (name := url.rpartition("/")[2]) in gone:
            raise ConnectionRefusedError(111, "Connection refused")
        return (shards / name).open("rb")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    source = open_source("wds/https://host/data/s-{0..3}.tar")
    assert len(list(source.stream(0))) == 150
    assert "s-1.tar cannot be read: Connection refused" in (source.warning or "")
    gone |= {"s-0.tar", "s-2.tar", "s-3.tar"}
    with pytest.raises(RunError, match="Connection refused"):
        list(source.stream(0))


def test_a_folder_of_shards_has_no_pipes(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", png())])
    os.mkfifo(tmp_path / "b.tar")
    assert open_source(str(tmp_path)).count == 1
    assert len(list(open_source(f"wds/{tmp_path}").stream(0))) == 1
