"""Batches: the right images in the right rows, bounded memory, and an end without hanging threads."""

import errno
import io
import os
import resource
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokdiv.data.loader
from tokdiv.data.loader import Batch, Source, center_view, decode_image, permutation, read_batches
from tokdiv.data.open import open_source
from tokdiv.errors import RunError

DATA = os.environ.get("TOKDIV_DATA")


def png(level: int, side: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (level % 256, level // 256, 7)).save(file, "PNG")
    return file.getvalue()


def numbered(count: int, broken: frozenset[int] = frozenset()) -> Source:
    """A source whose image i has i in its first two channels; the broken ones are cut."""
    return Source(
        name="numbered",
        count=count,
        fingerprint="",
        key_of=lambda index: f"image {index}",
        reader=lambda index: png(index)[:-3] if index in broken else png(index),
    )


def numbered_stream(count: int) -> Source:
    return Source(
        name="stream",
        count=None,
        fingerprint="",
        permutable=False,
        open_stream=lambda seed: ((f"image {n}", png(n)) for n in range(count)),
    )


def blocks(count: int, size: int) -> list[np.ndarray]:
    return [np.arange(begin, min(begin + size, count)) for begin in range(0, count, size)]


def numbers(batch: Batch, size: int = 8) -> list[int]:
    """Which images the rows of the views are."""
    view = batch.views[size].int()
    assert torch.equal(view[:, 2], torch.full_like(view[:, 2], 7))
    return (view[:, 0, 3, 3] + 256 * view[:, 1, 3, 3]).tolist()


def resident_bytes() -> int:
    """What of this process is in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def reading_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("tokdiv-")]


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test():
    yield
    deadline = time.monotonic() + 5
    while reading_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not reading_threads()


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_batches_come_in_order_with_their_own_images(workers):
    order = permutation(300, seed=5)
    batches = list(read_batches(numbered(300), order, blocks(300, 32), {8}, workers=workers))
    assert [len(batch) for batch in batches] == [32] * 9 + [12]
    assert np.concatenate([batch.positions for batch in batches]).tolist() == list(range(300))
    for batch in batches:
        indices = order[batch.positions]
        assert batch.keys == [f"image {index}" for index in indices]
        assert numbers(batch) == indices.tolist()
        assert batch.usable.all()
        assert batch.reasons == [None] * len(batch)
        assert batch.views[8].is_contiguous()
        assert batch.views[8].dtype == torch.uint8


def test_positions_may_leave_out_others():
    order = permutation(100, seed=1)
    for rank in range(3):
        mine = [np.arange(rank, 60, 3), np.arange(60 + rank, 100, 3)]
        batches = list(read_batches(numbered(100), order, mine, {8}, workers=2))
        assert [numbers(batch) for batch in batches] == [order[block].tolist() for block in mine]


def test_each_image_is_decoded_once_for_all_sizes(monkeypatch):
    decoded = []
    monkeypatch.setattr(
        tokdiv.data.loader, "decode_image", lambda data: decoded.append(1) or decode_image(data)
    )
    order = np.arange(20)
    (batch,) = read_batches(numbered(20), order, [order], [16, 8, 8], workers=2)
    assert len(decoded) == 20
    assert set(batch.views) == {8, 16}
    assert numbers(batch) == numbers(batch, 16) == list(range(20))
    assert batch.views[16].shape == (20, 3, 16, 16)


def test_unusable_images_are_left_out_of_the_views_and_named():
    broken = frozenset({0, 3, 4, 11})
    order = np.arange(12)
    (batch,) = read_batches(numbered(12, broken), order, [order], {8}, workers=3)
    assert np.flatnonzero(~batch.usable).tolist() == sorted(broken)
    assert [n for n, reason in enumerate(batch.reasons) if reason] == sorted(broken)
    assert batch.reasons[3] == "truncated PNG"
    assert batch.keys[3] == "image 3"
    assert numbers(batch) == [n for n in range(12) if n not in broken]
    (batch,) = read_batches(numbered(4, frozenset(range(4))), None, [np.arange(4)], {8}, workers=2)
    assert batch.views[8].shape == (0, 3, 8, 8)


def test_a_batch_splits_with_its_views():
    order = np.arange(10)
    (batch,) = read_batches(numbered(10, frozenset({1, 6})), order, [order], {8}, workers=2)
    for k in range(11):
        first, second = batch.split(k)
        assert (len(first), len(second)) == (k, 10 - k)
        assert first.positions.tolist() + second.positions.tolist() == list(range(10))
        assert first.keys + second.keys == batch.keys
        assert first.reasons + second.reasons == batch.reasons
        assert numbers(first) == [n for n in range(k) if n not in (1, 6)]
        assert numbers(second) == [n for n in range(k, 10) if n not in (1, 6)]
        assert int(first.usable.sum()) == len(first.views[8])


def test_a_file_that_is_gone_is_unusable_with_its_reason(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    source = open_source(str(tmp_path))
    (tmp_path / "2.png").unlink()
    (tmp_path / "3.png").unlink()
    (tmp_path / "3.png").mkdir()
    (batch,) = read_batches(source, permutation(4, 0), [np.arange(4)], {8}, workers=2)
    reasons = dict(zip(batch.keys, batch.reasons))
    assert reasons["2.png"] == "cannot be read: No such file or directory"
    assert reasons["3.png"] == "not a regular file"
    assert sorted(numbers(batch)) == [0, 1]


def failing(count: int, bad: dict[int, OSError]) -> Source:
    """A source some of whose images cannot be read."""

    def read(index: int) -> bytes:
        if index in bad:
            raise bad[index]
        return png(index)

    return Source("data", count, "", key_of=str, reader=read)


def give(batches: Iterable[Batch], given: list[int]) -> None:
    """Note the images of batches, all of which have to be usable."""
    for batch in batches:
        assert batch.usable.all()
        given += numbers(batch)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_a_failing_disk_ends_the_run_and_nothing_of_it_is_given(batch_size, prefetch):
    """Also where what was read before can still be read, from a cache."""
    source = failing(50, {n: OSError(errno.EIO, "Input/output error") for n in range(20, 50)})
    batches = read_batches(source, None, blocks(50, batch_size), {8}, workers=3, prefetch=prefetch)
    given: list[int] = []
    with pytest.raises(RunError, match=r"'data' cannot be read any more .*Input/output error"):
        give(batches, given)
    assert given == list(range(20 // batch_size * batch_size))


def test_single_images_that_fail_are_unusable():
    """Two sectors of a disk, whatever the order; a third one far off does not count with them."""
    bad = {n: OSError(errno.EIO, "Input/output error") for n in (4, 5, 7, 8, 19)}
    for batch_size in (1, 3, 20):
        batches = list(read_batches(failing(20, bad), None, blocks(20, batch_size), {8}, workers=2))
        usable = np.concatenate([batch.usable for batch in batches])
        assert np.flatnonzero(~usable).tolist() == sorted(bad)


def test_files_that_are_gone_alone_are_unusable():
    bad = {n: FileNotFoundError(errno.ENOENT, "No such file or directory") for n in range(5, 15)}
    bad[18] = PermissionError(errno.EACCES, "Permission denied")
    (batch,) = read_batches(failing(20, bad), None, [np.arange(20)], {8}, workers=2)
    assert np.flatnonzero(~batch.usable).tolist() == sorted(bad)


@pytest.mark.parametrize("kind", ["folder", "tar", "links"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_data_that_vanishes_ends_the_run_and_nothing_of_it_is_given(tmp_path, kind, batch_size):
    (tmp_path / "data").mkdir()
    for n in range(30):
        (tmp_path / "data" / f"{n:02d}.png").write_bytes(png(n))
    data, moved = tmp_path / "data", tmp_path / "data"
    if kind == "tar":
        data = moved = tmp_path / "data.tar"
        with tarfile.open(data, "w") as tar:
            tar.add(tmp_path / "data", "x")
    if kind == "links":  # DATA stays, and what its links lead to goes
        data = tmp_path / "links"
        data.mkdir()
        for n in range(30):
            (data / f"{n:02d}.png").symlink_to(tmp_path / "data" / f"{n:02d}.png")
    source = open_source(str(data))
    given: list[int] = []

    def blocks_until_it_vanishes():
        for block in blocks(30, batch_size):
            if block[0] == 12:
                moved.rename(tmp_path / "away")
            yield block

    batches = read_batches(source, None, blocks_until_it_vanishes(), {8}, workers=1)
    with pytest.raises(RunError, match=r"cannot be read any more .*the same command goes on"):
        give(batches, given)
    assert given == list(range(len(given)))
    (tmp_path / "away").rename(moved)
    rest = np.arange(len(given), 30)
    (batch,) = read_batches(source, None, [rest], {8}, workers=1)
    assert numbers(batch) == rest.tolist()


def test_the_last_images_of_data_that_vanishes_are_not_unusable(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    source = open_source(str(tmp_path))
    batches = read_batches(source, None, blocks(4, 2), {8}, workers=1, prefetch=1)
    assert numbers(next(batches)) == [0, 1]
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(RunError, match="cannot be read any more"):
        list(batches)


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, None])
def test_a_shortage_of_the_machine_is_an_error_everywhere(error):
    """In pretraining and in fine-tuning, images that were not read for want of handles were left out."""
    from img2vec.data import View, plan_epoch, read_epoch
    from img2vec.evaluate.augment import crop_and_flip, training_steps
    from img2vec.evaluate.labeled import LabeledData
    from img2vec.masking import plan_layout

    def read(index: int) -> bytes:
        raise MemoryError if error is None else OSError(error, os.strerror(error))

    source = Source("x", 4, "", key_of=str, reader=read)
    labeled = LabeledData(source, np.arange(4), np.zeros(4, np.int64), ["a"])
    view = View(32, (0.2, 1.0), plan_layout(32, 16, 16, 0.5, (2, 2)), seed=0)
    steps = training_steps(
        labeled,
        crop_and_flip(8),
        batch_size=4,
        micro_batch_size=4,
        epochs=1,
        seed=0,
        workers=2,
    )
    for batches in (
        read_batches(source, None, [np.arange(4)], {8}, workers=2),
        read_epoch(source, plan_epoch(4, 4, 1, 1), view, 0, workers=2),
        (batch for step in steps for batch in step.batches),
    ):
        with pytest.raises(RunError, match="use fewer --workers"):
            list(batches)


def test_a_stream_is_read_over_what_others_take():
    stream = numbered_stream(50)
    batches = list(
        read_batches(stream, None, [np.arange(0, 20, 3), np.arange(21, 40, 3)], {8}, workers=3)
    )
    assert [numbers(batch) for batch in batches] == [list(range(0, 20, 3)), list(range(21, 40, 3))]
    assert batches[0].keys[1] == "image 3"


@pytest.mark.parametrize("count", [0, 1, 39, 40, 41])
def test_at_the_end_of_a_stream_the_batch_is_short_and_the_last(count):
    drawn = []

    def endless():
        begin = 0
        while True:
            drawn.append(begin)
            yield np.arange(begin, begin + 20)
            begin += 20

    batches = list(read_batches(numbered_stream(count), None, endless(), {8}, workers=3))
    assert [number for batch in batches for number in numbers(batch)] == list(range(count))
    assert all(len(batch) == 20 for batch in batches[:-1])
    assert all(len(batch) > 0 for batch in batches)
    assert len(drawn) <= count // 20 + 3


def test_an_error_in_a_stream_is_raised():
    def broken(seed: int):
        yield "a", png(1)
        raise RunError("the shard server is gone")

    source = Source("s", None, "", permutable=False, open_stream=broken)
    with pytest.raises(RunError, match="server is gone"):
        list(read_batches(source, None, blocks(10, 5), {8}, workers=2))


def test_an_error_of_the_blocks_is_raised():
    def failing():
        yield np.arange(5)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(read_batches(numbered(5), np.arange(5), failing(), {8}, workers=2))


def test_an_error_that_is_no_images_fault_is_raised():
    def read(index: int) -> bytes:
        if index == 7:
            raise MemoryError
        return png(index)

    source = Source("x", 100, "", key_of=str, reader=read)
    with pytest.raises(RunError, match="use fewer --workers"):
        list(read_batches(source, None, blocks(100, 10), {8}, workers=3))


def test_closing_stops_the_threads_at_once():
    def read(index: int) -> bytes:
        time.sleep(0.01)
        return png(index)

    source = Source("slow", 10_000, "", key_of=str, reader=read)
    batches = read_batches(source, None, blocks(10_000, 50), {8}, workers=2)
    next(batches)
    begin = time.monotonic()
    batches.close()
    assert time.monotonic() - begin < 0.5
    assert not reading_threads()


def test_an_error_in_the_loop_that_reads_stops_the_threads():
    def loop() -> None:
        for _ in read_batches(numbered(1000), None, blocks(1000, 10), {8}, workers=2):
            raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        loop()


def test_an_interrupt_ends_a_process_at_once(tmp_path):
    script = """
import os, signal, sys, threading, time
import numpy as np
from tokdiv.data.loader import Source, read_batches
def read(index):
    time.sleep(0.05)
    return b""
source = Source("slow", 10000, "", key_of=str, reader=read)
blocks = (np.arange(500 * n, 500 * n + 500) for n in range(20))
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
begin = time.monotonic()
try:
    list(read_batches(source, None, blocks, {8}, workers=4))
except KeyboardInterrupt:
    sys.exit(130 if time.monotonic() - begin < 2 else 1)
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, timeout=60, check=False)
    assert done.returncode == 130


def test_no_more_blocks_are_drawn_than_may_be_in_memory():
    drawn = 0
    most_ahead = 0

    def counted():
        nonlocal drawn
        for block in blocks(200, 10):
            drawn += 1
            yield block

    for done, _ in enumerate(
        read_batches(numbered(200), None, counted(), {8}, workers=2, prefetch=3)
    ):
        time.sleep(0.005)
        most_ahead = max(most_ahead, drawn - done)
    assert most_ahead <= 3 + 1
    assert drawn == 20


def test_an_empty_block_gives_an_empty_batch():
    order = np.arange(4)
    batches = list(read_batches(numbered(4), order, [order[:0], order], {8}, workers=2))
    assert [len(batch) for batch in batches] == [0, 4]
    batches = list(read_batches(numbered_stream(4), None, [order[:0], order], {8}, workers=2))
    assert [len(batch) for batch in batches] == [0, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_views_are_pinned_where_asked():
    order = np.arange(4)
    (batch,) = read_batches(
        numbered(4, frozenset({1})), order, [order], {8}, workers=2, pin_memory=True
    )
    assert batch.views[8].is_pinned()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
@pytest.mark.parametrize("scheme", ["", "wds/"])
def test_twenty_thousand_images_stream_in_bounded_memory(tmp_path, scheme):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    contents = []
    for kind in ("JPEG", "PNG"):
        file = io.BytesIO()
        photo.save(file, kind)
        contents.append(file.getvalue())
    path = tmp_path / "tiny.tar"
    with tarfile.open(path, "w") as tar:
        for n in range(20_000):
            info = tarfile.TarInfo(f"{n:05d}.{('jpg', 'png')[n % 2]}")
            info.size = len(contents[n % 2])
            tar.addfile(info, io.BytesIO(contents[n % 2]))
    source = open_source(f"{scheme}{path}")
    order = permutation(20_000, 0) if source.permutable else None
    size, batch_size, prefetch = 64, 64, 2
    batches = read_batches(
        source, order, blocks(20_000, batch_size), {size}, workers=2, prefetch=prefetch
    )
    num_images, most, when_warm = 0, 0, 0
    for step, batch in enumerate(batches):
        num_images += len(batch.views[size])
        most = max(most, resident_bytes())
        if step == 20:  # warm: decoders, threads and the shuffle buffer have what they need
            when_warm = resident_bytes()
    assert num_images == 20_000
    # All views together are 245 MB, all files 45 MB; the batches that may be in memory are 3 MB.
    assert most - when_warm < 20e6


@pytest.mark.skipif(DATA is None, reason="TOKDIV_DATA is not set")
def test_real_photographs_in_batches():
    assert DATA is not None
    source = open_source(str(Path(DATA, "imagenet_1000")))
    assert source.count == 1000
    assert source.classes is not None
    assert len(source.classes) == 1000
    order = permutation(1000, seed=0)
    num_seen = 0
    for batch in read_batches(source, order, blocks(96, 32), {224}, workers=2):
        assert batch.usable.all()
        for row, key in enumerate(batch.keys[:4]):
            data = Path(DATA, "imagenet_1000", key).read_bytes()
            expected = center_view(decode_image(data), 224)
            assert torch.equal(batch.views[224][row], expected)
        num_seen += len(batch)
    assert num_seen == 96
