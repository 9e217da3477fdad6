"""Weights: downloads that are whole or nothing, files that cannot run code, authors' wrappers."""

import argparse
import errno
import hashlib
import http.server
import io
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from tokdiv import Teacher
from tokdiv.errors import RunError, UsageError
from tokdiv.teachers.cache import cache_folder, cached_path, in_hub_cache, is_cached
from tokdiv.teachers.fit import likely_architecture
from tokdiv.teachers.layouts import unwrap
from tokdiv.teachers.load import load_teacher
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.weights import read_checkpoint, weights_file

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[3]
BODY = bytes(range(256)) * 8000  # 2 MB: more than one chunk
DIGEST = hashlib.sha256(BODY).hexdigest()


class Server:
    """Files on the loopback interface; `requests` are the GETs so far, `gate` holds bodies back."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/w.pth": BODY}
        self.requests: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.cut: int | None = None  # bytes after which the connection is closed
        self.chunked = False
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                outer.requests.append(self.path)
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                content = outer.files.get(self.path)
                self.send_response(404 if content is None else 200)
                content = content or b""
                if outer.chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                else:
                    self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "c" * 40)
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                if not body:
                    return
                outer.gate.wait(20)
                sent = content[: outer.cut]
                self.wfile.write(b"%x\r\n" % len(content) + sent if outer.chunked else sent)

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        self.url = f"{self.address}/w.pth"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.gate.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    yield served
    served.stop()


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
    server: Server, capsys: pytest.CaptureFixture[str]
):
    path, _ = weights_file(server.url)
    assert f"{path.name}: recorded sha256 {DIGEST} at first download" in capsys.readouterr().err
    assert path.with_name(path.name + ".sha256").read_text().strip() == DIGEST
    weights_file(server.url)
    assert "recorded" not in capsys.readouterr().err


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
    path.write_bytes(BODY + b"!")
    message = failure(RunError, server.url)
    assert f"expected {DIGEST}: the weights changed; delete it to fetch it again" in message
    path.unlink()
    assert weights_file(server.url)[1] == DIGEST


def test_a_second_download_is_held_to_the_first_one_s_sha256(server: Server, cache: Path):
    path, _ = weights_file(server.url)
    path.unlink()
    server.files["/w.pth"] = BODY + b"!"
    message = failure(RunError, server.url)
    assert f"expected {DIGEST}" in message and not path.exists()
    assert f"to accept it, delete '{path}.sha256'" in message
    path.with_name(path.name + ".sha256").unlink()
    assert weights_file(server.url)[0].read_bytes() == BODY + b"!"


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
    assert message.endswith("No space left on device")
    assert left(cache) == []


def test_a_cache_folder_that_cannot_be_made_is_said(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKDIV_CACHE", str(tmp_path / "file" / "cache"))
    assert failure(RunError, server.url).startswith(f"cannot store {server.url}")


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


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


# Reading: tensors and nothing else


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def saved(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


class Attack:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, kind: str):
    marker, path = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"state_dict": {"w": torch.ones(2)}, "hook": Attack(marker)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content["hook"], protocol=2))
    else:
        saved(content, path, _use_new_zipfile_serialization=kind == "zip")
    message = refused(path)
    assert "could run code: refused; re-save its state_dict() alone" in message
    assert "mkdir" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(Attack(marker)))  # it would have worked
    assert marker.exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path):
    message = refused(saved(torch.nn.Linear(2, 2), tmp_path / "net.pth"))
    assert "objects other than tensors (torch.nn.modules.linear.Linear)" in message


@pytest.mark.parametrize("suffix", [".pth", ".legacy.pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99, 0.9999])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, share: float):
    tensors = {f"layer{n}.weight": torch.randn(50, 20) for n in range(20)}
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(tensors, whole)
    else:
        saved(tensors, whole, _use_new_zipfile_serialization=suffix == ".pth")
    assert len(read_checkpoint(whole)) == 20
    content = whole.read_bytes()
    part = tmp_path / f"part{suffix}"
    part.write_bytes(content[: max(1, int(len(content) * share))])
    assert re.search("is truncated or no (safetensors file|PyTorch checkpoint)", refused(part))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: expected a checkpoint (.pth, .pt or .safetensors)"),
        (b"<!DOCTYPE html>\n<html>", "is a web page, not a checkpoint"),
        (b"<?xml version='1.0'?><Error/>", "is a web page, not a checkpoint"),
        (b'{"error": "gone"}', "is a web page, not a checkpoint"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n",
            "is a Git LFS pointer, not a checkpoint: fetch it with git lfs pull",
        ),
        (b"just some text", "is truncated or no"),
        (b"abc", "is truncated or no"),
        (bytes(range(200, 0, -2)), "is truncated or no"),
        (bytes(1000), "is truncated or no"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_checkpoint_is_called_by_its_name(
    tmp_path: Path, content: bytes, said: str, suffix: str
):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    assert said in refused(path)


def test_safetensors_are_read_under_any_name(tmp_path: Path):
    safetensors.torch.save_file({"w": torch.arange(3.0)}, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth")["w"].tolist() == [0, 1, 2]


OPTIONS = {
    "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(epochs=3)),
    "best": np.float64(0.5),
    "step": np.int64(7),
    "history": np.arange(3.0),
    "flag": np.bool_(True),
}


def test_options_and_numpy_numbers_beside_the_tensors_are_accepted(tmp_path: Path):
    found = read_checkpoint(saved({"model": {"w": torch.ones(2)}} | OPTIONS, tmp_path / "w.pth"))
    assert found["args"].nested.epochs == 3
    assert found["best"] == 0.5 and found["step"] == 7 and found["flag"]
    assert found["history"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("core", [b"numpy.core.", b"numpy._core."])
def test_numpy_numbers_of_older_and_newer_numpy_are_accepted(tmp_path: Path, core: bytes):
    saved({"w": torch.ones(2)} | OPTIONS, tmp_path / "ours.pth")
    with (
        zipfile.ZipFile(tmp_path / "ours.pth") as ours,
        zipfile.ZipFile(tmp_path / "theirs.pth", "w") as theirs,
    ):
        for name in ours.namelist():
            content = ours.read(name)
            if name.endswith("data.pkl"):
                content = re.sub(rb"numpy\._?core\.", core, content)
                assert core in content
            theirs.writestr(name, content)
    assert read_checkpoint(tmp_path / "theirs.pth")["best"] == 0.5


# Wrappers: each is loaded into a real, tiny architecture, and gives the tokens of the bare weights


def network(architecture: str, **arguments: Any) -> torch.nn.Module:
    """With weights and statistics drawn anew, so that every tensor matters."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = timm.create_model(architecture, **arguments)
    generator = torch.Generator().manual_seed(1)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.add_(noise.abs() if key.endswith("running_var") else noise, alpha=0.05)
    return model.eval()


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def others(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student beside the teacher: the same keys, other values."""
    return {k: v + 1 if v.is_floating_point() else v for k, v in tensors.items()}


PROJECTOR = {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
WRAPPERS = {
    "bare": lambda t: t,
    "model": lambda t: {"model": t, "epoch": 3, "optimizer": {"state": {}}},
    "state_dict": lambda t: {"state_dict": t},
    "model_state_dict": lambda t: {"model_state_dict": t},
    "hiera": lambda t: {"epoch": 1, "model_state": t},
    "data parallel": lambda t: prefixed("module.", t),
    "encoder and decoder": lambda t: {
        "model": prefixed("encoder.", t) | {"decoder.weight": torch.ones(2)}
    },
    "lightning": lambda t: {"state_dict": prefixed("model.backbone.", t)},
    "dino": lambda t: {
        "student": prefixed("module.backbone.", others(t)),
        "teacher": prefixed("backbone.", t) | PROJECTOR,
        "args": argparse.Namespace(arch="vit"),
        "dino_loss": {"center": torch.zeros(1, 2)},
        "epoch": 1,
    },
    "teacher and student keys": lambda t: {
        "state_dict": prefixed("teacher.backbone.", t) | prefixed("student.backbone.", others(t))
    },
    "moco": lambda t: {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": prefixed("module.base_encoder.", others(t))
        | prefixed("module.momentum_encoder.", t)
        | {"module.momentum_encoder.head.0.weight": torch.ones(2, 2)}
        | {"module.predictor.0.weight": torch.ones(2, 2)},
    },
    "moco without momentum": lambda t: {"state_dict": prefixed("module.base_encoder.", t)},
    "vissl": lambda t: {
        "phase_idx": 799,
        "classy_state_dict": {
            "base_model": {"model": {"trunk": prefixed("_feature_blocks.", t), "heads": {}}},
            "optimizer": {},
        },
    },
    "mae": lambda t: {
        "model": t
        | {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 17, 8)}
        | {"decoder_blocks.0.norm1.weight": torch.ones(8), "decoder_pred.weight": torch.ones(8, 8)}
    },
    "ibot": lambda t: {"state_dict": t | {"masked_embed": torch.ones(1, 8)}},
}


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.Module]:
    return {
        "test_vit": network("test_vit", img_size=64),
        "test_resnet": network("test_resnet"),
        "test_convnext": network("test_convnext"),
    }


def bare_tokens(model: torch.nn.Module, images: Tensor) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        features = model.forward_features((images / 255 - mean) / std)
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    return features[:, model.num_prefix_tokens :]


def load(architecture: str, path: Path, **fields: Any) -> Teacher:
    spec = TeacherSpec(
        "t",
        architecture,
        weights=str(path),
        **({"size": 64, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)} | fields),
    )
    return load_teacher(spec)


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_are_found_in_what_authors_wrap_around_them(
    networks, images: Tensor, tmp_path: Path, architecture: str, wrapper: str
):
    model = networks[architecture]
    path = saved(WRAPPERS[wrapper](model.state_dict()), tmp_path / "w.pth")
    expected = bare_tokens(model, images)
    torch.testing.assert_close(load(architecture, path)(images), expected, rtol=1e-4, atol=1e-4)


def test_no_wrapper_is_seen_where_a_key_of_the_architecture_has_that_name(tmp_path: Path):
    tensors = {"encoder.weight": torch.ones(2), "bias": torch.ones(2)}
    assert unwrap(tensors, {"encoder.weight", "bias"}, tmp_path) == tensors


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "lr": 0.1}, "a dict with the keys epoch, lr"),
        ({"model": {}}, "a dict with the keys "),
        ({1: torch.ones(3)}, "a dict with the keys 1"),
        ([1, 2], "list"),
        (torch.ones(3), "Tensor"),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path: Path, content: Any, found: str):
    path = saved(content, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=f"holds no state dict: found {found}"):
        load("test_resnet", path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast_to_float32(
    networks, images: Tensor, tmp_path: Path, dtype: torch.dtype
):
    model = networks["test_vit"]
    tensors = {k: v.to(dtype).contiguous() for k, v in model.state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    teacher = load("test_vit", tmp_path / "w.safetensors")
    assert {p.dtype for p in teacher.module.parameters()} == {torch.float32}
    expected = network("test_vit", img_size=64)
    expected.load_state_dict({k: v.float() for k, v in tensors.items()})
    torch.testing.assert_close(teacher(images), bare_tokens(expected, images), rtol=1e-4, atol=1e-4)


def facebook_convnext(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's keys as the authors of ConvNeXt name them."""
    renamed = {}
    for key, value in tensors.items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"^stages\.(\d+)\.blocks\.", r"stages.\1.", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        key = key.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("form", ["timm", "authors"])
@pytest.mark.parametrize("block", [None, 1])
def test_a_convnext_loads_in_both_namings_and_cut_at_a_stage(
    networks, images: Tensor, tmp_path: Path, form: str, block: int | None
):
    model = networks["test_convnext"]
    tensors = model.state_dict()
    path = saved(tensors if form == "timm" else facebook_convnext(tensors), tmp_path / "w.pth")
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        features = model.stem((images / 255 - mean) / std)
        for stage in model.stages[: None if block is None else block + 1]:
            features = stage(features)
    expected = features.flatten(2).transpose(1, 2)
    tokens = load("test_convnext", path, block=block)(images)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_dinov2_s_own_files_with_registers_load(images: Tensor, tmp_path: Path):
    arguments = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    model = network("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0, **arguments)
    theirs = dict(model.state_dict())
    own_position = torch.randn(1, 1, 32)
    theirs["register_tokens"] = theirs.pop("reg_token")
    theirs["cls_token"] = theirs["cls_token"] - own_position
    theirs["pos_embed"] = torch.cat([own_position, theirs["pos_embed"]], dim=1)
    theirs["mask_token"] = torch.zeros(1, 32)
    path = saved(theirs, tmp_path / "w.pth")
    view = images[..., :56, :56]
    tokens = load("vit_small_patch14_reg4_dinov2", path, size=56, arguments=arguments)(view)
    torch.testing.assert_close(tokens, bare_tokens(model, view), rtol=1e-4, atol=1e-4)


# Strictness


def misfit(architecture: str, tensors: dict[str, Tensor], folder: Path, **fields: Any) -> str:
    path = saved(tensors, folder / "w.pth")
    with pytest.raises(UsageError) as caught:
        load(architecture, path, **fields)
    message = str(caught.value)
    assert message.startswith(f"'{path}' does not fit {architecture}: ") and "\n" not in message
    return message


def test_missing_keys_are_listed_the_first_few(networks, tmp_path: Path):
    tensors = dict(networks["test_vit"].state_dict())
    del tensors["cls_token"]
    assert "missing cls_token" in misfit("test_vit", tensors, tmp_path)
    few = {k: v for k, v in tensors.items() if "blocks" not in k}
    message = misfit("test_vit", few, tmp_path)
    assert re.search(r"missing cls_token, (\S+, ){2}\S+ and \d+ more", message)


def test_unexpected_keys_are_listed(networks, tmp_path: Path):
    tensors = networks["test_resnet"].state_dict() | {"extra.weight": torch.ones(2)}
    message = misfit("test_resnet", tensors, tmp_path)
    assert "unexpected extra.weight" in message and "missing" not in message


def test_a_misshapen_key_is_given_with_both_shapes(networks, tmp_path: Path):
    tensors = dict(networks["test_resnet"].state_dict())
    tensors["bn1.weight"] = torch.ones(3)
    wanted = networks["test_resnet"].bn1.weight.shape[0]
    message = misfit("test_resnet", tensors, tmp_path)
    assert f"misshapen bn1.weight (found 3, expected {wanted})" in message


@pytest.mark.parametrize(
    "architecture",
    [
        *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
        *("vit_small_patch8_224", "vit_base_patch32_224", "vit_huge_patch14_224"),
        *("vit_base_patch14_dinov2", "vit_large_patch14_reg4_dinov2", "vit_small_patch16_dinov3"),
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"),
        *(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
        *("convnextv2_tiny", "mobilenetv2_100", "mobilenetv3_large_100", "efficientnet_b0"),
    ],
)
def test_a_common_architecture_is_known_by_its_shapes(architecture: str):
    with torch.device("meta"):
        tensors = timm.create_model(architecture).state_dict()
    assert likely_architecture(tensors) == architecture


@pytest.mark.parametrize(
    "architecture", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"]
)
def test_an_uncommon_architecture_is_not_guessed(networks, architecture: str):
    with torch.device("meta"):
        tensors = timm.create_model(architecture).state_dict()
    assert likely_architecture(tensors) is None


def test_another_network_s_weights_are_told_where_they_fit(tmp_path: Path):
    tensors = timm.create_model("vit_tiny_patch16_224").half().state_dict()
    message = misfit("vit_small_patch16_224", tensors, tmp_path, arguments={"depth": 1})
    assert "misshapen patch_embed.proj.weight" in message
    assert message.endswith("; it would fit vit_tiny_patch16_224")


def test_another_patch_size_is_refused_rather_than_resampled(tmp_path: Path):
    tensors = timm.create_model("vit_tiny_patch16_224", patch_size=8, depth=1).state_dict()
    message = misfit("vit_tiny_patch16_224", tensors, tmp_path, arguments={"depth": 1})
    assert "misshapen patch_embed.proj.weight (found 192x3x8x8, expected 192x3x16x16)" in message


def test_classifiers_and_counters_are_neither_loaded_nor_missed(networks, images, tmp_path: Path):
    tensors = dict(networks["test_resnet"].state_dict())
    assert "fc.weight" in tensors
    expected = load("test_resnet", saved(tensors, tmp_path / "a.pth"))(images)
    bare = {
        k: v
        for k, v in tensors.items()
        if not k.startswith("fc.") and not k.endswith("num_batches_tracked")
    }
    teacher = load("test_resnet", saved(bare, tmp_path / "b.pth"))
    assert torch.equal(teacher(images), expected)
    assert not any(key.startswith("fc.") for key, _ in teacher.module.named_parameters())


def test_another_number_of_classes_does_not_matter(networks, images, tmp_path: Path):
    tensors = networks["test_resnet"].state_dict()
    wide = tensors | {"fc.weight": torch.ones(7, 3), "fc.bias": torch.ones(7)}
    first, second = saved(tensors, tmp_path / "a.pth"), saved(wide, tmp_path / "b.pth")
    assert torch.equal(load("test_resnet", first)(images), load("test_resnet", second)(images))


@pytest.mark.parametrize("size", [32, 96])
def test_position_embeddings_are_resampled_as_timm_does(networks, tmp_path: Path, size: int):
    path = saved(networks["test_vit"].state_dict(), tmp_path / "w.pth")
    resized = network("test_vit", img_size=64)
    resized.set_input_size(img_size=(size, size))
    view = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    teacher = load("test_vit", path, size=size)
    assert teacher.grid == (size // 16, size // 16)
    torch.testing.assert_close(teacher(view), bare_tokens(resized, view), rtol=1e-4, atol=1e-4)


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
