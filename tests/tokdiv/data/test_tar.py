"""Tars by index: members, labels, and what damage costs."""

import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_files import keys, png, refusal, write_tar

import tokdiv.data.source
import tokdiv.data.stream
from tokdiv.data.loader import permutation, read_batches
from tokdiv.data.open import open_source


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


def test_of_a_damaged_tar_the_complete_members_are_used(tmp_path):
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
    assert "before its first complete file" in refusal(path)
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


def labels(path) -> list[int] | None:
    found = open_source(str(path)).labels
    return None if found is None else found.tolist()


def numbered(names: list[str]) -> list[tuple[str, bytes]]:
    """An image and a .cls of its own for each name, in this order."""
    pairs = []
    for number, name in enumerate(names):
        pairs += [(name, png(number)), (os.path.splitext(name)[0] + ".cls", str(number).encode())]
    return pairs


@pytest.mark.parametrize(
    "names",
    [
        [f"cat.{n}.png" for n in range(4)],
        [f"shot.{n:04d}.png" for n in range(4)],
        ["www.site.com_1.jpg", "www.site.com_2.jpg", "J. K. Rowling.jpg", "J. R. R. Tolkien.jpg"],
        ["Screen at 10.32.11.png", "Screen at 10.32.12.png", "a.b/c.d.png", "a.b/c.e.png"],
    ],
)
def test_dotted_names_keep_their_own_labels(tmp_path, names):
    in_pairs = numbered(names)
    backwards = [in_pairs[at] for at in (1, 0, 3, 2, 5, 4, 7, 6)]
    apart = sorted(in_pairs, key=lambda pair: pair[0].endswith(".cls"))
    for number, files in enumerate((in_pairs, backwards, apart, apart[::-1])):
        path = write_tar(tmp_path / f"{number}.tar", files)
        source = open_source(str(path))
        assert sorted(keys(source)) == sorted(names)
        assert source.labels is not None
        assert [names[label] for label in source.labels] == keys(source)
        assert [source.read(i) for i in range(4)] == [png(label) for label in source.labels]


def test_names_that_come_again_keep_their_own_labels(tmp_path):
    """Shards joined from parts that each count from 0."""
    files = [("a.png", png(0)), ("a.cls", b"0"), ("b.png", png(1)), ("b.cls", b"1")]
    again = [("a.cls", b"2"), ("a.png", png(2)), ("b.png", png(3)), ("b.cls", b"3")]
    assert labels(write_tar(tmp_path / "t.tar", files + again)) == [0, 1, 2, 3]


def test_an_image_that_accompanies_another_is_left_out_with_a_warning(tmp_path):
    files = [("7.depth.png", png(9)), ("7.png", png(7)), ("7.seg.png", png(9)), ("7.cls", b"7")]
    files += [("8.left.png", png(8)), ("8.right.png", png(8)), ("8.cls", b"8")]
    files += [("9.png", png(9)), ("9.1.png", png(9)), ("9.cls", b"9")]
    source = open_source(str(write_tar(tmp_path / "t.tar", files)))
    names = ["7.png", "8.left.png", "8.right.png", "9.png", "9.1.png"]
    assert keys(source) == names
    assert source.labels is not None
    assert source.labels.tolist() == [7, 8, 8, 9, 9]
    assert [source.read(i) for i in range(5)] == [png(int(name[0])) for name in names]
    assert "2 images that accompany another one of their sample" in (source.warning or "")


@pytest.mark.parametrize(
    "content",
    [b"9" * 20, b"-" + b"9" * 20, b"9" * 5000, b"", b"cat", b"\xff", b"1 2"],
    ids=["long", "negative", "very long", "empty", "text", "bytes", "two"],
)
def test_a_label_that_is_no_class_number_is_none(tmp_path, content):
    assert labels(write_tar(tmp_path / "t.tar", [("a.png", png()), ("a.cls", content)])) is None


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 60_000,
        b'{"label": ' * 6_000,
        b'{"label": 99999999999999999999}',
        b'{"label": true}',
        b'{"label": NaN}',
        b"[1]",
        b'{"label": "cat"}',
    ],
    ids=range(7),
)
def test_json_without_a_class_number_is_no_label(tmp_path, content):
    assert labels(write_tar(tmp_path / "t.tar", [("a.png", png()), ("a.json", content)])) is None


def test_labels_of_some_images_only_are_not_used_with_a_warning(tmp_path):
    files = [("a/1.png", png()), ("a/1.cls", b"5"), ("b/2.png", png(1))]
    source = open_source(str(write_tar(tmp_path / "t.tar", files)))
    assert source.classes == ["a", "b"]
    assert "1 of 2 images have no class number" in (source.warning or "")


def test_class_numbers_around_a_billion_are_no_list_of_names(tmp_path):
    files = [("a.png", png()), ("a.cls", b"1000000007"), ("b.png", png()), ("b.cls", b"5")]
    assert labels(write_tar(tmp_path / "t.tar", files)) == [1000000007, 5]


def test_tars_in_a_tar_are_to_be_unpacked(tmp_path):
    inner = write_tar(tmp_path / "inner.tar", [("a.png", png())]).read_bytes()
    path = write_tar(tmp_path / "t.tar", [(f"n0144076{n}.tar", inner) for n in range(3)])
    assert "found 3 .tar" in refusal(path)
    assert "unpack the .tar files in it" in refusal(path)
    path = write_tar(tmp_path / "u.tar", [("n01440764.tar", inner), ("a.png", png())])
    assert "1 .tar files inside are left out: unpack them" in (open_source(str(path)).warning or "")


def test_joined_tars_are_warned_about(tmp_path):
    first = write_tar(tmp_path / "1.tar", [("a.png", png(1))]).read_bytes()
    second = write_tar(tmp_path / "2.tar", [("b.png", png(2))]).read_bytes()
    (tmp_path / "t.tar").write_bytes(first + second)
    source = open_source(str(tmp_path / "t.tar"))
    assert keys(source) == ["a.png"]
    assert "more data after its end mark" in (source.warning or "")
    (tmp_path / "t.tar").write_bytes(first + bytes(50_000))
    assert open_source(str(tmp_path / "t.tar")).warning is None


def test_what_is_no_file_in_a_tar_is_counted(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(png())
        tar.addfile(info, io.BytesIO(png()))
        for name, kind, link in (
            ("s.png", tarfile.SYMTYPE, "a.png"),
            ("h.png", tarfile.LNKTYPE, "gone.png"),
            ("f.png", tarfile.FIFOTYPE, ""),
            ("../../h.png", tarfile.LNKTYPE, "a.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
    source = open_source(str(tmp_path / "t.tar"))
    assert keys(source) == ["a.png", "../../h.png"]  # a name, never a path on this disk
    assert "3 members with names of images that are links" in (source.warning or "")


def test_an_image_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "t.tar"
    info = tarfile.TarInfo("huge.png")
    info.size = 60 * 2**30
    end = 512 + info.size
    with path.open("wb") as file:  # sparse on the disk
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(end)
        file.write(write_tar(tmp_path / "2.tar", [("a.png", png(3))]).read_bytes())
    source = open_source(str(path))
    (batch,) = read_batches(source, None, [np.arange(2)], {8}, workers=2)
    assert batch.keys == ["huge.png", "a.png"]
    assert "too large: 64,424,509,440 encoded bytes" in (batch.reasons[0] or "")
    assert batch.usable.tolist() == [False, True]


def test_a_name_that_is_no_utf8_can_be_stored(tmp_path):
    name = os.fsdecode(b"caf\xe9/1.png")
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size = len(png())
        tar.addfile(info, io.BytesIO(png()))
    source = open_source(str(tmp_path / "t.tar"))
    assert source.key(0).encode() == b"caf\\udce9/1.png"
    assert source.read(0) == png()
