"""Weights: downloads that are whole or nothing, the hub's cache, local files held to their hash."""

import errno
import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from small_networks import Server, bare_tokens, load, others, saved
from torch import Tensor

from tokdiv import TeacherSpec, load_teacher
from tokdiv.errors import RunError, UsageError
from tokdiv.teachers.cache import cache_folder, cached_path, hub_cache, in_hub_cache, is_cached
from tokdiv.teachers.weights import weights_file

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[3]


def checkpoint(seed: int = 0) -> bytes:
    """2 MB: more than one chunk."""
    file = io.BytesIO()
    torch.save({"w": torch.randn(500_000, generator=torch.Generator().manual_seed(seed))}, file)
    return file.getvalue()


BODY, OTHER = checkpoint(), checkpoint(1)
DIGEST = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(server: Server) -> Server:
    server.files["/w.pth"] = BODY
    return server


def left(cache: Path) -> list[str]:
    """What the cache folder holds, but for locks."""
    return sorted(p.name for p in cache.glob("*") if p.suffix != ".lock") if cache.exists() else []


def failure(kind: type[Exception], *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        weights_file(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The cache folder


def test_the_cache_folder_is_tokdiv_cache_else_the_platform_s(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKDIV_CACHE", "~/somewhere")
    assert cache_folder() == Path.home() / "somewhere"
    monkeypatch.delenv("TOKDIV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == Path("/x/tokdiv")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "tokdiv"


def test_urls_of_one_base_name_are_different_files():
    first, second = (cached_path(f"https://h.org/{d}/checkpoint_teacher.pth") for d in ("a", "b"))
    assert first != second
    assert first.name.endswith("-checkpoint_teacher.pth") and first.suffix == ".pth"


# Downloads


def test_a_download_is_kept_and_needs_no_network_again(server: Server, cache: Path):
    assert not is_cached(server.url)
    path, digest = weights_file(server.url)
    assert path == cached_path(server.url) and path.parent == cache
    assert path.read_bytes() == BODY and digest == DIGEST
    assert is_cached(server.url)
    server.stop()
    assert weights_file(server.url) == (path, digest)
    assert server.requests == ["/w.pth"]
    assert left(cache) == [path.name, path.name + ".sha256"]


def test_the_first_download_records_its_sha256_and_says_so(
    server: Server, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "tokdiv")
    path, _ = weights_file(server.url)
    assert caplog.messages == [f"{path.name}: recorded sha256 {DIGEST} at first download"]
    assert path.with_name(path.name + ".sha256").read_text().strip() == DIGEST
    weights_file(server.url)
    assert len(caplog.messages) == 1


def test_a_known_sha256_is_checked_whatever_its_case(server: Server, cache: Path):
    path, _ = weights_file(server.url, DIGEST.upper())
    assert left(cache) == [path.name]
    assert weights_file(server.url, DIGEST)[0] == path


def test_a_wrong_sha256_leaves_nothing_behind(server: Server, cache: Path):
    message = failure(RunError, server.url, "0" * 64)
    assert message.startswith(f"{server.url} has sha256 {DIGEST}, expected {'0' * 64}")
    assert left(cache) == []


def test_a_cached_file_that_changed_is_refused(server: Server):
    path, _ = weights_file(server.url)
    path.write_bytes(OTHER)
    message = failure(RunError, server.url)
    assert f"expected {DIGEST}: the weights changed; delete it to fetch it again" in message
    path.unlink()
    assert weights_file(server.url)[1] == DIGEST


def test_a_second_download_is_held_to_the_first_one_s_sha256(server: Server, cache: Path):
    path, _ = weights_file(server.url)
    path.unlink()
    server.files["/w.pth"] = OTHER
    message = failure(RunError, server.url)
    assert f"expected {DIGEST}" in message and not path.exists()
    assert f"to accept it, delete '{path}.sha256'" in message
    path.with_name(path.name + ".sha256").unlink()
    assert weights_file(server.url)[0].read_bytes() == OTHER


@pytest.mark.parametrize(
    "page", [b"<head><title>No</title>", b"\xef\xbb\xbf<html>", b'{"error": "gone"}', b"\n[]", b""]
)
def test_an_answer_that_is_no_checkpoint_is_not_kept(server: Server, cache: Path, page: bytes):
    server.files["/w.pth"] = page
    assert "answered with a web page, not a checkpoint" in failure(RunError, server.url)
    assert left(cache) == []


def test_a_second_download_is_held_to_the_run_s_sha256(server: Server, cache: Path):
    weights_file(server.url)
    assert "the weights changed" in failure(RunError, server.url, "0" * 64)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_cut_connection_leaves_nothing_behind(server: Server, cache: Path, chunked: bool):
    server.cut, server.chunked = 1_500_000, chunked
    message = failure(RunError, server.url)
    assert message.startswith(f"cannot fetch {server.url} (")
    assert f"put it at {cached_path(server.url)}" in message
    assert left(cache) == []
    server.cut, server.chunked = None, False
    assert weights_file(server.url)[1] == DIGEST


def test_a_missing_file_on_the_server_is_named(server: Server, cache: Path):
    url = server.address + "/gone.pth"
    assert failure(RunError, url).startswith(f"cannot fetch {url} (Not Found)")
    assert left(cache) == []


def test_a_web_page_instead_of_weights_is_not_kept(server: Server, cache: Path):
    server.files["/w.pth"] = b"\n <!DOCTYPE html><html><body>Log in</body></html>"
    message = failure(RunError, server.url)
    assert message.startswith(f"{server.url} answered with a web page, not a checkpoint")
    assert left(cache) == []


def test_without_network_the_file_its_url_and_its_place_are_named(server: Server, cache: Path):
    server.stop()
    message = failure(RunError, server.url)
    assert message.startswith(f"cannot fetch {server.url} (")
    assert message.endswith(
        f"without network, fetch {server.url} elsewhere and put it at {cached_path(server.url)}"
    )


def test_a_name_that_does_not_resolve_is_a_missing_network(monkeypatch: pytest.MonkeyPatch):
    def nowhere(*args: object, **options: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    for source in ("https://example.org/w.pth", "hf-hub:timm/test_vit.r160_in1k"):
        message = failure(RunError, source)
        assert "Temporary failure in name resolution" in message
        assert f"put it at {cached_path(source)}" in message


def test_the_named_place_is_where_a_file_fetched_by_hand_is_found(cache: Path):
    url = "https://nowhere.invalid/deep/w.pth"
    cache.mkdir(parents=True)
    cached_path(url).write_bytes(BODY)
    assert weights_file(url) == (cached_path(url), DIGEST)


def test_a_full_disk_is_said_and_leaves_nothing_behind(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = failure(RunError, server.url)
    assert message.startswith(f"cannot store {server.url} as '{cached_path(server.url)}'")
    assert "No space left on device; TOKDIV_CACHE names another folder" in message
    assert left(cache) == []


def test_a_cache_folder_that_cannot_be_made_is_said(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKDIV_CACHE", str(tmp_path / "file" / "cache"))
    assert failure(RunError, server.url).startswith(f"cannot store {server.url}")


@pytest.mark.parametrize("length", ["abc", "-5", "9" * 5000, "1e6"])
def test_a_length_that_is_no_number_is_one_line(server: Server, cache: Path, length: str):
    server.length = length
    assert failure(RunError, server.url).startswith(f"cannot fetch {server.url} (")
    assert left(cache) == []


@pytest.mark.parametrize("kind", ["pth", "safetensors", "legacy"])
def test_a_body_cut_where_no_length_was_told_is_neither_kept_nor_pinned(
    server: Server, cache: Path, kind: str
):
    file, tensors = io.BytesIO(), {"w": torch.randn(500_000)}
    if kind == "safetensors":
        file.write(safetensors.torch.save(tensors))
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=kind == "pth")
    server.files["/w.pth"] = file.getvalue()
    server.length, server.cut = None, 1_500_000
    message = failure(RunError, server.url)
    assert message.startswith(f"'{server.url}' is truncated or no ")
    assert "the download is not used" in message and left(cache) == []
    server.cut = None  # what the message advises, works
    assert weights_file(server.url)[0].read_bytes() == file.getvalue()


def test_a_known_sha256_needs_no_second_reading(server: Server):
    server.length, server.files["/w.pth"] = (
        None,
        b"x" * 1000,
    )  # no checkpoint, but the one asked for
    assert (
        weights_file(server.url, hashlib.sha256(b"x" * 1000).hexdigest())[0].stat().st_size == 1000
    )


def test_a_download_that_could_run_code_is_not_kept(server: Server, cache: Path, tmp_path: Path):
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    file = io.BytesIO()
    torch.save({"w": Attack()}, file)
    server.files["/w.pth"] = file.getvalue()
    message = failure(RunError, server.url)
    assert "could run code: refused" in message and server.url in message
    assert left(cache) == [] and not (tmp_path / "executed").exists()


def test_a_damaged_file_in_the_cache_can_be_deleted_and_fetched_again(server: Server):
    path, _ = weights_file(server.url)
    path.write_bytes(BODY[:1000])
    assert "delete it to fetch it again" in failure(RunError, server.url)
    path.unlink()
    assert weights_file(server.url) == (path, DIGEST)


def test_a_planted_link_is_not_written_through(server: Server, cache: Path, tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("intact")
    cache.mkdir(parents=True)
    path = cached_path(server.url)
    for name in (f"{path.name}.part", f".{path.name}.part", f".{path.name}.0.part"):
        (cache / name).symlink_to(victim)
    assert weights_file(server.url)[0].read_bytes() == BODY
    assert victim.read_text() == "intact" and not path.is_symlink()


def test_a_linked_lock_is_not_followed(server: Server, cache: Path, tmp_path: Path):
    cache.mkdir(parents=True)
    (cache / (cached_path(server.url).name + ".lock")).symlink_to(tmp_path / "victim")
    assert failure(RunError, server.url).startswith(f"cannot store {server.url}")
    assert not (tmp_path / "victim").exists()


def test_what_a_killed_download_left_is_removed_by_the_next(server: Server, cache: Path):
    cache.mkdir(parents=True)
    path = cached_path(server.url)
    (cache / f".{path.name}.0123456789abcdef.part").write_bytes(BODY[:1000])
    weights_file(server.url)
    assert left(cache) == [path.name, path.name + ".sha256"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("kind", ["url", "hub"])
def test_a_signal_ends_a_download_at_once(
    server: Server, cache: Path, tmp_path: Path, number: int, code: int, kind: str
):
    server.gate.clear()
    server.files["/timm/a.b/resolve/main/model.safetensors"] = BODY
    source = server.url if kind == "url" else "hf-hub:timm/a.b"
    command = [sys.executable, "-m", "tokdiv", "rank", str(tmp_path), "-o", str(tmp_path / "RUN")]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    environment = os.environ | {
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    with subprocess.Popen(
        [*command, "-t", f"timm:test_resnet@{source}"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not server.requests:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    assert errors.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in errors
    assert left(cache) == []


def test_two_processes_fetch_once(server: Server):
    server.gate.clear()  # the first body is held back until the other process has come to the lock
    code = (
        "import sys; from tokdiv.teachers.weights import weights_file; print('ready', flush=True);"
        "print(*weights_file(sys.argv[1]))"
    )
    found: list[tuple[Path, str]] = []
    ours = threading.Thread(target=lambda: found.append(weights_file(server.url)))
    ours.start()
    with subprocess.Popen(
        [sys.executable, "-c", code, server.url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        threading.Timer(0.5, server.gate.set).start()
        ours.join(60)
        theirs = other.communicate(timeout=60)[0].split()
    assert found == [(cached_path(server.url), DIGEST)]
    assert theirs == [str(cached_path(server.url)), DIGEST]
    assert server.requests == ["/w.pth"]


# The hub


def hub_folder(repository: str, commit: str, name: str, content: bytes) -> Path:
    """As huggingface_hub lays its cache out."""
    folder = Path(os.environ["HF_HOME"]) / "hub" / f"models--{repository.replace('/', '--')}"
    file = folder / "snapshots" / commit / name
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    return file


def test_what_timm_fetched_before_is_used(hub: Path):
    file = hub_folder("timm/a.b", "1" * 40, "model.safetensors", BODY)
    assert in_hub_cache("hf-hub:timm/a.b") == file
    assert weights_file("hf-hub:timm/a.b") == (file, DIGEST)
    assert is_cached("hf-hub:timm/a.b") and not is_cached("hf-hub:timm/a.c")


def test_a_cached_pickle_serves_where_no_safetensors_are(hub: Path):
    file = hub_folder("timm/a.b", "1" * 40, "pytorch_model.bin", BODY)
    assert in_hub_cache("hf-hub:timm/a.b") == file


def test_of_several_snapshots_main_is_used(hub: Path):
    old = hub_folder("timm/a.b", "9" * 40, "model.safetensors", b"old")
    new = hub_folder("timm/a.b", "1" * 40, "model.safetensors", b"new")
    refs = new.parents[2] / "refs"
    refs.mkdir()
    (refs / "main").write_text("1" * 40)
    assert in_hub_cache("hf-hub:timm/a.b") == new
    assert in_hub_cache("hf-hub:timm/a.b@" + "9" * 40) == old
    assert in_hub_cache("hf-hub:timm/a.b@v2") is None


VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"XDG_CACHE_HOME": "/xdg"},
        {"XDG_CACHE_HOME": ""},
        {"HF_HOME": "~/hf", "XDG_CACHE_HOME": "/xdg"},
        {"HF_HOME": "$HOME/hf"},
        {"HUGGINGFACE_HUB_CACHE": "~/old", "HF_HOME": "/hf"},
        {"HF_HUB_CACHE": "$HOME/new", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/hf"},
        {"HF_HUB_CACHE": "~/new"},
    ],
    ids=lambda given: "+".join(given) or "none",
)
def test_the_hub_s_cache_is_where_huggingface_hub_has_it(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert hub_cache() == theirs.stdout.strip()


def test_a_file_is_found_as_huggingface_hub_finds_it(hub: Path):
    from huggingface_hub import try_to_load_from_cache

    file = hub_folder("timm/a.b", "1" * 40, "model.safetensors", b"new")
    (file.parents[2] / "refs" / "pr").mkdir(parents=True)
    (file.parents[2] / "refs" / "main").write_text("1" * 40)
    (file.parents[2] / "refs" / "pr" / "1").write_text("1" * 40)
    for revision in (None, "main", "pr/1", "1" * 40, "2" * 40, "v1"):
        theirs = try_to_load_from_cache(
            "timm/a.b", "model.safetensors", cache_dir=hub / "hub", revision=revision
        )
        ours = in_hub_cache("hf-hub:timm/a.b" + (f"@{revision}" if revision else ""))
        assert ours == (Path(theirs) if isinstance(theirs, str) else None), revision


def test_a_file_put_by_hand_goes_before_the_hub(hub: Path, cache: Path):
    hub_folder("timm/a.b", "1" * 40, "model.safetensors", b"hub")
    cache.mkdir(parents=True)
    (cache / "timm--a.b.safetensors").write_bytes(BODY)
    assert weights_file("hf-hub:timm/a.b") == (cache / "timm--a.b.safetensors", DIGEST)


def test_a_hub_download_through_another_endpoint(server: Server, tmp_path: Path):
    server.files["/timm/a.b/resolve/main/model.safetensors"] = BODY
    code = """
from tokdiv.errors import RunError
from tokdiv.teachers.weights import weights_file
first, second = weights_file("hf-hub:timm/a.b"), weights_file("hf-hub:timm/a.b")
assert first == second and "snapshots" in str(first[0])
print(first[1])
try:
    weights_file("hf-hub:timm/gone")
except RunError as error:
    print(error)
"""
    environment = os.environ | {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    digest, message = result.stdout.splitlines()
    assert digest == DIGEST
    assert message.startswith(f"cannot fetch {server.address}/timm/gone/resolve/main/")
    assert server.requests.count("/timm/a.b/resolve/main/model.safetensors") == 1


# Local files


def test_a_local_file_is_hashed_and_held_to_its_record(tmp_path: Path):
    path = tmp_path / "w.pth"
    path.write_bytes(BODY)
    assert weights_file(str(path)) == (path, DIGEST)
    assert "the weights changed; point to the original" in failure(UsageError, str(path), "0" * 64)


def test_a_local_file_that_went_is_named():
    assert failure(UsageError, "/gone/w.pth").startswith("'/gone/w.pth': no such file")


# Teachers


def test_a_spec_s_sha256_guards_the_file_it_was_made_from(networks, tmp_path: Path):
    path = saved(networks["test_resnet"].state_dict(), tmp_path / "w.pth")
    recorded = load("test_resnet", path).spec
    assert recorded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    load_teacher(TeacherSpec.from_dict(recorded.to_dict()))
    saved(others(networks["test_resnet"].state_dict()), path)
    with pytest.raises(UsageError, match="the weights changed"):
        load_teacher(recorded)


def test_a_download_ends_as_a_teacher(networks, images: Tensor, server: Server):
    file = io.BytesIO()
    torch.save({"state_dict": networks["test_resnet"].state_dict()}, file)
    server.files["/w.pth"] = file.getvalue()
    teacher = load("test_resnet", server.url)  # type: ignore[arg-type]
    assert teacher.spec.weights == server.url
    expected = bare_tokens(networks["test_resnet"], images)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-4)


def test_timm_s_own_weights_load_from_the_hub_s_cache(networks, images: Tensor, hub: Path):
    tensors = {k: v.contiguous() for k, v in networks["test_resnet"].state_dict().items()}
    file = hub_folder(
        "timm/test_resnet.r160_in1k", "1" * 40, "model.safetensors", safetensors.torch.save(tensors)
    )
    teacher = load_teacher(
        "timm:test_resnet.r160_in1k:size=64:mean=0.485/0.456/0.406:std=0.229/0.224/0.225"
    )
    assert teacher.spec.weights == "hf-hub:timm/test_resnet.r160_in1k"
    assert teacher.spec.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    expected = bare_tokens(networks["test_resnet"], images)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-4)
