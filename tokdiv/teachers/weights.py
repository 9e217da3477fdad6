"""From a spec's weights to a state dict: local file, URL or hub; locked, checked, never executed.

A file is read with safetensors, or with `torch.load(weights_only=True)`, which builds tensors and plain
containers and refuses everything else, so that a checkpoint cannot run code.
"""

import argparse
import hashlib
import http.client
import os
import pickle
import socket
import sys
import urllib.error
import urllib.parse
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from tokdiv.errors import RunError, UsageError
from tokdiv.teachers.cache import PACKAGED, cache_folder, cached_path, in_hub_cache, packaged_path

CHUNK = 1 << 20  # bytes

TIMEOUT = 30  # seconds without a byte

StateDict = dict[str, Tensor]


def weights_file(source: str, sha256: str | None = None) -> tuple[Path, str]:
    """The local file that holds the weights, downloaded where it is not here yet, and its sha256.

    Args:
        source: an http(s) URL, "hf-hub:OWNER/REPO", "package:PATH" for a file that ships with tokdiv, or
            the path of a local file.
        sha256: what the file must hash to, in hex; None accepts the first download and records its hash
            beside it, which every later load is held to.

    Raises:
        UsageError: the local file does not exist or is not the one that `sha256` names.
        RunError: the download failed, or what came is not what `sha256` names.
    """
    remote = source.startswith(("http://", "https://", "hf-hub:"))
    if not remote:
        path = packaged_path(source) if source.startswith(PACKAGED) else Path(source)
        if not path.is_file():
            raise UsageError(
                f"'{source}': no such file; the weights were there when the spec was written"
            )
    else:
        path = cached_path(source)
        recorded = path.with_name(path.name + ".sha256")
        if sha256 is None and recorded.is_file():
            sha256 = recorded.read_text().strip()
        if not path.is_file() and source.startswith("hf-hub:"):
            path = in_hub_cache(source) or _download_from_hub(source)
        elif not path.is_file():
            _download(source, path, sha256)
    digest = _sha256(path)
    if sha256 is not None and digest != sha256.lower():
        kind = RunError if remote else UsageError
        remedy = (
            "delete it to fetch it again"
            if remote
            else "point to the original file, or start a new run"
        )
        raise kind(
            f"'{path}' has sha256 {digest}, expected {sha256}: the weights changed; {remedy}"
        )
    return path, digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, path: Path, sha256: str | None) -> None:
    """Fetch into the cache folder: one process at a time, to a temporary name, checked, then renamed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.is_file():
                return  # another process fetched it while this one waited
            part = path.with_name(f"{path.name}.part")
            try:
                digest = _fetch(url, part)
                if _is_web_page(part):
                    raise RunError(
                        f"{url} answered with a web page, not a checkpoint: {_by_hand(url, path)}"
                    )
                recorded = path.with_name(path.name + ".sha256")
                if sha256 is not None and digest != sha256.lower():
                    accept = f"; to accept it, delete '{recorded}'" if recorded.is_file() else ""
                    raise RunError(
                        f"{url} has sha256 {digest}, expected {sha256}: a damaged or exchanged file; not "
                        f"used{accept}"
                    )
                if sha256 is None:
                    recorded.write_text(digest + "\n")
                    print(
                        f"{path.name}: recorded sha256 {digest} at first download", file=sys.stderr
                    )
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        TimeoutError,
        ConnectionError,
    ) as error:
        raise RunError(f"cannot fetch {url} ({_reason(error)}): {_by_hand(url, path)}") from None
    except OSError as error:
        raise RunError(f"cannot store {url} as '{path}': {_reason(error)}") from None


def _fetch(url: str, part: Path) -> str:
    """Stream `url` into the file `part`; returns its sha256. A short body is an error."""
    request = urllib.request.Request(url, headers={"User-Agent": "tokdiv"})
    hashed, received = hashlib.sha256(), 0
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response, part.open("wb") as file:
        length = int(response.headers.get("Content-Length") or 0)
        with tqdm(
            total=length or None, unit="B", unit_scale=True, desc=part.stem, disable=None
        ) as bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                hashed.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if length and received != length:
        raise urllib.error.ContentTooShortError(f"got {received} of {length} bytes", ("", None))  # type: ignore[arg-type]
    return hashed.hexdigest()


def _download_from_hub(source: str) -> Path:
    """Through huggingface_hub, whose cache, mirrors (HF_ENDPOINT) and tokens the user knows."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
    )

    repository, _, revision = source[len("hf-hub:") :].partition("@")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = f"{endpoint}/{repository}/resolve/{revision or 'main'}/model.safetensors"
    try:
        if not urllib.request.getproxies():
            # Without network huggingface_hub retries for half a minute; the name service knows at once.
            host = urllib.parse.urlparse(endpoint)
            socket.getaddrinfo(host.hostname, host.port or 443)
        try:
            file = hf_hub_download(repository, "model.safetensors", revision=revision or None)
        except LocalEntryNotFoundError:
            raise  # it is the network that is missing, not the file
        except EntryNotFoundError:
            file = hf_hub_download(repository, "pytorch_model.bin", revision=revision or None)
        return Path(file)
    except GatedRepoError:
        raise RunError(
            f"{repository} is gated: accept its license at {endpoint}/{repository}, then set HF_TOKEN"
        ) from None
    except Exception as error:
        # huggingface_hub raises its own, requests', httpx' and OS errors, by version.
        raise RunError(
            f"cannot fetch {url} ({_reason(error)}): {_by_hand(url, cached_path(source))}"
        ) from None


def _by_hand(url: str, path: Path) -> str:
    return f"without network, fetch {url} elsewhere and put it at {path}"


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    lines = str(reason).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_web_page(path: Path) -> bool:
    """Whether it is HTML, XML, JSON or nothing at all, as servers answer in place of a file."""
    with path.open("rb") as file:
        head = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()
    return not head or (head.startswith((b"<", b"{", b"[")) and b"\0" not in head)


def read_checkpoint(path: Path) -> Any:
    """Read a checkpoint's tensors and plain containers; never executes anything in it.

    Raises:
        UsageError: not a checkpoint, truncated, or holding objects other than tensors.
    """
    with path.open("rb") as file:
        head = file.read(512)
    again = "; delete it to fetch it again" if path.parent == cache_folder() else ""
    if not head:
        raise UsageError(
            f"'{path}' is empty: expected a checkpoint (.pth, .pt or .safetensors){again}"
        )
    if _is_web_page(path):
        raise UsageError(
            f"'{path}' is a web page, not a checkpoint: the download got an error page{again}"
        )
    if head.startswith(b"version https://git-lfs"):
        raise UsageError(
            f"'{path}' is a Git LFS pointer, not a checkpoint: fetch it with git lfs pull"
        )
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        import safetensors.torch

        try:
            return safetensors.torch.load_file(path)
        except Exception as error:
            raise UsageError(
                f"'{path}' is truncated or no safetensors file: {_reason(error)}{again}"
            ) from None
    # Harmless types that authors' checkpoints carry beside the tensors: options, and numpy numbers.
    multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray  # type: ignore[attr-defined]
    harmless: list[Any] = [
        argparse.Namespace,
        np.dtype,
        np.ndarray,
        *(type(np.dtype(c)) for c in "?bBhHiIlLefd"),
        # numpy 2 moved its core: a file bears the name of the numpy that wrote it.
        *((multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *(
            (multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct")
            for core in ("core", "_core")
        ),
    ]
    try:
        with torch.serialization.safe_globals(harmless), warnings.catch_warnings():
            # Of a strange pickle protocol, in a file that is no pickle.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = " ".join(str(error).split())
        if "Unsupported operand" not in text and (
            "Unsupported" in text or "GLOBAL" in text or "not allowed" in text
        ):
            start = text.find("GLOBAL ")
            named = text[start + 7 :].split(" ")[0] if start >= 0 else "objects"
            raise UsageError(
                f"'{path}' holds objects other than tensors ({named}) and could run code: refused; "
                f"re-save its state_dict() alone"
            ) from None
        raise UsageError(f"'{path}' is truncated or no PyTorch checkpoint{again}") from None
    except Exception as error:  # whatever the unpickler meets in a damaged file
        raise UsageError(
            f"'{path}' is truncated or no PyTorch checkpoint: {_reason(error)}{again}"
        ) from None
