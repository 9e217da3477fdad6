"""One process or several: the same images, the same scores, the same table."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from fakes import (
    SIZE,
    coded_tar,
    coded_teacher,
    numbers_in_order,
    run_tokdiv,
    similarities,
    teacher_file,
)

import tokdiv
from tokdiv.dist import choose_device, choose_dtype, lost_peers, processes
from tokdiv.errors import LostPeer, UsageError

COUNT = 1003  # uneven for any number of processes
BROKEN = (1, 500, 707, 1002)
(COLUMN,) = similarities(COUNT, 0.9, sd=0.03)
OPTIONS = ["--device", "cpu", "--dtype", "float32", "--image-size", SIZE, "--workers", 1]


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = coded_tar(tmp_path_factory.mktemp("coded") / "images.tar", COUNT, BROKEN)
    first = numbers_in_order(data)[:256]
    assert set(first) & set(BROKEN), "one of the unusable images is to be among the first 256"
    return data


def one_process(data: Path, out: Path, **settings: object) -> tokdiv.Ranking:
    teachers = ["pixels", coded_teacher("own", COLUMN)]
    settings = {"dtype": "float32", "device": "cpu", "image_size": SIZE, "workers": 1, **settings}
    return tokdiv.rank(data, teachers, out, **settings)


def content(run: Path) -> dict:
    """ranking.json without what a user may change between one run and the next."""
    ranking = json.loads((run / "ranking.json").read_text())
    for name in ("batch_size", "device"):
        ranking["settings"].pop(name)
    return ranking


def assert_same(run: Path, other: Path) -> None:
    """The same images and table; values to the float32 rounding of another batch."""
    first, second = (pd.read_parquet(folder / "scores.parquet") for folder in (run, other))
    pd.testing.assert_frame_equal(first, second, atol=1e-6, rtol=0)
    tables = [pd.read_csv(folder / "ranking.csv") for folder in (run, other)]
    pd.testing.assert_frame_equal(*tables, atol=1e-6, rtol=0)
    assert (run / "skipped.csv").read_text() == (other / "skipped.csv").read_text()
    a, b = content(run), content(other)
    assert a["data"] == b["data"] and a["best"] == b["best"]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "batch_size"), [(2, 40), (4, 64)])
def test_every_image_once_and_the_table_of_one_process(
    coded: Path, tmp_path: Path, count: int, batch_size: int
) -> None:
    log = tmp_path / "log"
    own = teacher_file(tmp_path / "own.py", COLUMN, log=log)
    arguments = ["rank", coded, "-t", "pixels", "--teacher-module", own, "--certify", "none"]
    arguments += ["--batch-size", batch_size, *OPTIONS, "-o", tmp_path / "many"]
    result = run_tokdiv(*arguments, processes=count)
    assert result.returncode == 0, result.stderr
    lines = log.read_text().splitlines()
    seen = [int(number) for line in lines for number in line.split()]
    on_the_page = 3  # whose maps the report shows, after all is measured
    assert sorted(seen[:-on_the_page]) == [n for n in range(COUNT) if n not in BROKEN]
    assert max(len(line.split()) for line in lines) <= batch_size
    assert len(re.findall("^Best teacher", result.stdout, re.MULTILINE)) == 1  # of rank 0 alone
    assert result.stderr.count("running your code") == 1
    one_process(coded, tmp_path / "one", certify="none")
    assert_same(tmp_path / "many", tmp_path / "one")


@pytest.mark.slow
def test_they_stop_at_the_same_image_and_drop_at_the_same(coded: Path, tmp_path: Path) -> None:
    own = teacher_file(tmp_path / "own.py", COLUMN)
    arguments = ["rank", coded, "-t", "pixels", "--teacher-module", own, "--allow-baselines"]
    arguments += ["--certify", "best", "--batch-size", 100, *OPTIONS, "-o", tmp_path / "many"]
    result = run_tokdiv(*arguments, processes=2)
    assert result.returncode == 0, result.stderr
    alone = one_process(coded, tmp_path / "one", certify="best", allow_baselines=True, batch_size=5)
    assert 64 <= alone.data["images"] < COUNT
    assert_same(tmp_path / "many", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run_which_one_process_then_resumes(
    coded: Path, tmp_path: Path, victim: int
) -> None:
    out = tmp_path / "many"
    own = teacher_file(tmp_path / "own.py", COLUMN, kill_after=200, of_process=victim)
    arguments = ["rank", coded, "-t", "pixels", "--teacher-module", own, "--certify", "none"]
    arguments += ["--batch-size", 10, *OPTIONS, "-o", out]
    result = run_tokdiv(*arguments, processes=2)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(errors) <= 1  # none where torchrun ended the other before it noticed
    if errors:
        assert "another process of this run ended" in errors[0]
    assert not (out / "ranking.json").exists()
    rest = coded_teacher("own", COLUMN)
    settings = {"dtype": "float32", "device": "cpu", "image_size": SIZE, "workers": 1}
    tokdiv.rank(coded, ["pixels", rest], out, certify="none", **settings)
    assert len(rest.module.seen) < COUNT - 300  # it died after 400, a look at most before that
    one_process(coded, tmp_path / "one", certify="none")
    assert_same(out, tmp_path / "one")


@pytest.mark.slow
def test_a_mistake_in_the_call_ends_all_of_them(coded: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = ["rank", coded, "-t", "pixels", *OPTIONS, "-o", tmp_path / "file"]
    result = run_tokdiv(*arguments, processes=2)
    assert result.returncode != 0
    assert "is a file; give a folder" in result.stderr
    assert "Traceback (most recent call last):\n  File" not in result.stderr.split("error:")[0]


def test_alone_a_process_talks_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with processes("cpu") as group:
        assert (group.rank, group.world, group.device) == (0, 1, torch.device("cpu"))
        assert group.gather(5) == [5]
        assert group.broadcast("x") == "x"


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
def test_an_unknown_device_is_a_mistake_in_the_call(device: str) -> None:
    with pytest.raises(UsageError, match=f"--device {device}"):
        choose_device(device)


def test_the_dtype_is_chosen_once_and_recorded(coded: Path) -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("bfloat16", cpu) == "bfloat16"
    assert choose_dtype("auto", cpu) in ("float32", "bfloat16")
    ranking = tokdiv.rank(coded, [coded_teacher("own", COLUMN)], max_images=64, device="cpu")
    assert ranking.settings.dtype == choose_dtype("auto", cpu)


def test_a_lost_peer_in_a_backward_pass_is_told_from_other_errors() -> None:
    gloo = "[third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.2]"
    for error in (RuntimeError(gloo), torch.distributed.DistBackendError("NCCL error")):
        with pytest.raises(LostPeer, match="another process of this run ended"), lost_peers():
            raise error
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes") as found, lost_peers():
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not isinstance(found.value, LostPeer)
