"""The tar reader against Python's tarfile, and against tars that no honest program writes."""

import bz2
import gzip
import io
import lzma
import tarfile
import tracemalloc

import numpy as np
import pytest

from tokdiv.data.members import DamagedTar, NotATar, Tar, decompressed

FORMATS = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}


def pack(members: list[tuple[tarfile.TarInfo, bytes]], kind: str = "gnu") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[kind]) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **more) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    for key, value in more.items():
        setattr(info, key, value)
    return info


def read(data: bytes, seekable: bool) -> tuple[list[tuple], str]:
    """(name, kind, link, content) of the members, and what ended the walk."""
    tar = Tar(io.BytesIO(data), len(data) if seekable else None)
    found = []
    try:
        for one in tar.members():
            found.append((one.name, one.kind, one.link, tar.read(one.size)))
    except DamagedTar as damage:
        return found, str(damage)
    return found, ""


def by_tarfile(data: bytes) -> list[tuple]:
    """The same by Python's tarfile."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            file = tar.extractfile(info) if info.isreg() else None
            kind = "file" if info.isreg() else "link" if info.islnk() else "other"
            name = info.name.removeprefix("./").lstrip("/") + ("/" if info.isdir() else "")
            link = info.linkname.removeprefix("./").lstrip("/")
            found.append((name, kind, link, file.read() if file else b""))
    return found


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("seekable", [True, False])
def test_members_are_those_of_tarfile(kind, seekable):
    rng = np.random.default_rng(0)
    members = []
    for number in range(60):
        length = int(rng.choice([5, 90, 99, 100, 101, 140]))
        folder = "d" * (length // 2)
        name = f"{folder}/{number:03d}{'n' * (length - length // 2)}.png"
        members.append((member(name), rng.bytes(int(rng.choice([0, 1, 511, 512, 513, 3000])))))
    members.append((member("./relative.png", mtime=1.5, uname="b\u00e4r"), b"x"))
    members.append((member("/absolute.png"), b"y"))
    members.append((member("folder", tarfile.DIRTYPE), b""))
    members.append((member("hard.png", tarfile.LNKTYPE, "./relative.png"), b""))
    members.append((member("soft.png", tarfile.SYMTYPE, "relative.png"), b""))
    members.append((member("device", tarfile.CHRTYPE), b""))
    if kind != "ustar":
        members.append((member("caf\u00e9/\u65e5\u672c.png"), b"z"))
        members.append((member("l" * 3000 + ".png"), b"long"))
        members.append((member("hard2.png", tarfile.LNKTYPE, "l" * 3000 + ".png"), b""))
    data = pack(members, kind)
    found, damage = read(data, seekable)
    assert damage == ""
    assert found == by_tarfile(data)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cut_tar_gives_what_is_complete_and_says_so(kind):
    members = [(member(f"{n}{'n' * 120}/x.png"), bytes([n]) * 700) for n in range(5)]
    data = pack(members, kind)
    complete = by_tarfile(data)
    for seekable in (True, False):
        for length in range(0, len(data), 97):
            found, damage = read(data[:length], seekable)
            assert found == complete[: len(found)]
            # The end mark is one block of zeros; more of them are padding.
            assert damage or found == complete


def test_damage_anywhere_is_no_crash_and_no_hang():
    """Counts of what random damage leads to; every walk ends, with a message of one line."""
    rng = np.random.default_rng(0)
    members = [(member(f"{'a' * 150}{n}.png", mtime=0.5), bytes(600)) for n in range(4)]
    members.append((member("hard.png", tarfile.LNKTYPE, "a"), b""))
    for kind in ("gnu", "pax"):
        data = pack(members, kind)
        for _ in range(400):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), rng.choice([1, 3, 30])):
                damaged[at] = rng.integers(256)
            for seekable in (True, False):
                found, damage = read(bytes(damaged), seekable)
                assert len(found) <= len(data) // 512
                assert "\n" not in damage


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A header with any bytes for its size, and the right checksum."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def number(value: int) -> bytes:
    return (value % 2**96 | (0 if value < 0 else 1 << 95)).to_bytes(12, "big")


@pytest.mark.parametrize("seekable", [True, False])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no tar"),
        (b"\xee" * 1024, "is no tar"),
        (header("a.png", number(-512)), "is no tar"),
        (header("a.png", number(2**80)), "is no tar"),
        (header("a.png", b"12a"), "is no tar"),
        (header("a.png", number(60 * 2**30)) + bytes(512), "cut off"),
        (header("L", number(60 * 2**30), b"L") + bytes(512), "a header of more than a megabyte"),
        (header("x", number(2**40), b"x"), "a header of more than a megabyte"),
        (header("x", b"14", b"x") + b"0 path=\n".ljust(512, b"\0"), "is damaged"),
        (header("x", b"30", b"x") + b"19 size=-1\n".ljust(512, b"\0"), "is damaged"),
        (
            header("x", b"30", b"x") + b"19 size=9999999999999999999999\n".ljust(512, b"\0"),
            "is damaged",
        ),
        (header("S.png", b"0", b"S")[:482] + b"\1", "cut off"),
    ],
    ids=range(12),
)
def test_headers_that_lie_end_the_walk(data, message, seekable):
    found, damage = read(data, seekable)
    assert message in damage or damage in ("is no tar", "has no end mark and may be cut off")
    assert found == [] or message == "cut off"


def test_chains_of_headers_take_no_memory():
    long_name = header("L", b"144", b"L") + b"n" * 100 + bytes(412)  # octal 144 is 100
    sparse = bytearray(header("s.png", b"0", b"S"))
    sparse[482] = 1
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    extension = bytearray(b"1" * 512)
    pax = b"30 SCHILY.xattr.user=" + b"x" * 8 + b"\n"
    records = header("x", b"36", b"x") + pax.ljust(512, b"\0")
    for data in (long_name * 30_000, bytes(sparse) + bytes(extension) * 30_000, records * 30_000):
        tracemalloc.start()
        tar = Tar(io.BytesIO(data), None)
        with pytest.raises(DamagedTar):
            list(tar.members())
        assert tracemalloc.get_traced_memory()[1] < 3e6
        tracemalloc.stop()


def test_records_of_digits_take_no_time():
    """The regular expressions of Python's tarfile need hours for this (CVE-2024-6232)."""
    digits = b"1" * 2**20
    data = header("x", number(len(digits)), b"x") + digits + pack([(member("a.png"), b"x")])
    assert read(data, True)[1] in ("is damaged", "")


@pytest.mark.parametrize("packer", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars_are_read_as_streams(packer):
    data = pack([(member(f"{n}.png"), bytes([n]) * 3000) for n in range(20)])
    content, compressed = decompressed(io.BytesIO(packer(data)))
    assert compressed
    names = [one.name for one in Tar(content, None).members()]
    assert names == [f"{n}.png" for n in range(20)]
    cut, _ = decompressed(io.BytesIO(packer(data)[:-30]))
    with pytest.raises(DamagedTar, match=r"damaged|cut off"):
        list(Tar(cut, None).members())
    plain, compressed = decompressed(io.BytesIO(data))
    assert not compressed
    assert len(list(Tar(plain, None).members())) == 20
    with pytest.raises(DamagedTar, match="zstd"):
        decompressed(io.BytesIO(b"\x28\xb5\x2f\xfd" + bytes(20)))


def test_a_compressed_bomb_is_not_passed_over(monkeypatch):
    monkeypatch.setenv("TOKDIV_MAX_IMAGE_BYTES", "1000000")
    bomb = header("a.bin", number(2**22)) + bytes(2**22) + pack([(member("b.png"), b"x")])
    content, _ = decompressed(io.BytesIO(gzip.compress(bomb)))
    with pytest.raises(DamagedTar, match="a member of more than 1,000,000 bytes"):
        list(Tar(content, None).members())
    assert [name for name, *_ in read(bomb, True)[0]] == ["a.bin", "b.png"]


def test_not_even_a_tar():
    with pytest.raises(NotATar):
        list(Tar(io.BytesIO(b"no tar at all" * 100), None).members())
