"""The file with a spec's weights: a local path, a URL or the hub; fetched once, checked by its hash."""

import hashlib
import http.client
import logging
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

from tokdiv.dist import ended_by_signals
from tokdiv.errors import Interrupted, RunError, UsageError, first_line
from tokdiv.run_dir import file_sha256, locked, part_of
from tokdiv.teachers.cache import (
    HUB,
    HUB_FILES,
    PACKAGED,
    cached_path,
    in_hub_cache,
    packaged_path,
)
from tokdiv.teachers.checkpoint import INDEX, is_web_page, read_checkpoint, shard_files

log = logging.getLogger(__name__)

CHUNK = 1 << 20  # bytes

TIMEOUT = 30  # seconds without a byte

REMOTE = ("http://", "https://", HUB)


def weights_file(source: str, sha256: str | None = None) -> tuple[Path, str]:
    """The local file that holds the weights, downloaded where it is not here yet, and its sha256.

    Args:
        source: an http(s) URL, "hf-hub:OWNER/REPO", "package:PATH" for a file that ships with tokdiv, or
            the path of a local file.
        sha256: what the file must hash to, in hex. None accepts the first download and records its hash
            beside it, which every later load is held to.

    Raises:
        UsageError: the local file does not exist or is not the one that `sha256` names.
        RunError: the download failed, or its hash is not `sha256`.
        Interrupted: SIGINT or SIGTERM came during a download.
    """
    remote = source.startswith(REMOTE)
    if not remote:
        path = packaged_path(source) if source.startswith(PACKAGED) else Path(source)
        if not path.is_file():
            raise UsageError(
                f"'{source}': no such file; the weights were there when the spec was written"
            )
    else:
        path = cached_path(source)
        if sha256 is None and _record(path).is_file():
            sha256 = _record(path).read_text().strip()
        if not path.is_file():
            if source.startswith(HUB):
                path = hub_file(source)
            else:
                with ended_by_signals("part of a download"):
                    _download(source, path, sha256)
    digest = _digest(path)
    if sha256 is not None and digest != sha256.lower():
        remedy = (
            "delete it to fetch it again"
            if remote
            else "point to the original file, or start a new run"
        )
        raise (RunError if remote else UsageError)(
            f"'{path}' has sha256 {digest}, expected {sha256}: the weights changed; {remedy}"
        )
    return path, digest


def _digest(path: Path) -> str:
    """sha256 of a file; of a checkpoint in several files, of the hashes of the index and of all parts."""
    if not path.name.endswith(INDEX):
        return file_sha256(path)
    parts = [file_sha256(file) for file in (path, *shard_files(path))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _record(path: Path) -> Path:
    """Where the hash of a first download is kept."""
    return path.with_name(path.name + ".sha256")


def _download(url: str, path: Path, sha256: str | None) -> None:
    """Fetch into the cache folder: one process at a time, to a temporary name, checked, then renamed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock"), wait=True):
            if path.is_file():
                return  # another process fetched it while this one waited
            for leftover in path.parent.glob(
                f".{path.name}.*.part"
            ):  # of a process that was killed
                leftover.unlink(missing_ok=True)
            part = part_of(path)
            try:
                digest = _fetch(url, part)
                _check_download(url, path, part, digest, sha256)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        TimeoutError,
        ConnectionError,
        ValueError,
    ) as error:
        if isinstance(error, UsageError):
            raise
        raise RunError(f"cannot fetch {url} ({_reason(error)}): {_by_hand(url, path)}") from None
    except OSError as error:
        raise RunError(
            f"cannot store {url} as '{path}': {_reason(error)}; TOKDIV_CACHE names another folder for weights"
        ) from None


def _fetch(url: str, part: Path) -> str:
    """Stream `url` into the new file `part`; returns its sha256. A short body is an error."""
    request = urllib.request.Request(url, headers={"User-Agent": "tokdiv"})
    hashed, received = hashlib.sha256(), 0
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        length = int(response.headers.get("Content-Length") or 0)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        options = {"unit": "B", "unit_scale": True, "desc": part.stem, "disable": None}
        with os.fdopen(descriptor, "wb") as file, tqdm(total=length or None, **options) as bar:  # type: ignore[call-overload]
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


def _check_download(url: str, path: Path, part: Path, digest: str, sha256: str | None) -> None:
    """Whether a download is a checkpoint, and the one that is wanted; the hash of a first one is recorded."""
    with part.open("rb") as file:
        if is_web_page(file.read(512)):
            raise RunError(
                f"{url} answered with a web page, not a checkpoint: {_by_hand(url, path)}"
            )
    record = _record(path)
    if sha256 is not None and digest != sha256.lower():
        accept = f"; to accept it, delete '{record}'" if record.is_file() else ""
        raise RunError(
            f"{url} has sha256 {digest}, expected {sha256}: a damaged or exchanged file; not used{accept}"
        )
    if sha256 is None:
        # A server that does not tell the length may have closed the connection early: only a file that can be
        # read to its end is kept, and held to its hash from now on.
        try:
            read_checkpoint(part, url)
        except UsageError as error:
            raise RunError(f"{error}; the download is not used: {_by_hand(url, path)}") from None
        record.write_text(digest + "\n")
        log.info("%s: recorded sha256 %s at first download", path.name, digest)


def hub_file(source: str, names: tuple[str, ...] = HUB_FILES) -> Path:
    """The first file of these names in "hf-hub:OWNER/REPO[@REVISION]", from the cache or the hub.

    Fetched through huggingface_hub, whose cache, mirrors (HF_ENDPOINT) and tokens the user knows.

    Raises:
        RunError: it cannot be fetched. Interrupted: SIGINT or SIGTERM came meanwhile.
    """
    if (cached := in_hub_cache(source, names)) is not None:
        return cached
    with ended_by_signals("part of a download"):
        return _download_from_hub(source, names)


def _download_from_hub(source: str, names: tuple[str, ...]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
    )

    repository, _, revision = source.removeprefix(HUB).partition("@")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = f"{endpoint}/{repository}/resolve/{revision or 'main'}/{names[0]}"
    try:
        if not urllib.request.getproxies():
            # Without network huggingface_hub retries for half a minute; the name service knows at once.
            host = urllib.parse.urlparse(endpoint)
            socket.getaddrinfo(host.hostname, host.port or 443)
        for name in names:
            try:
                return Path(hf_hub_download(repository, name, revision=revision or None))
            except LocalEntryNotFoundError:
                raise  # the network is missing, not the file
            except EntryNotFoundError:
                if name == names[-1]:
                    raise
        raise AssertionError
    except Interrupted:
        raise
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
    reason = getattr(error, "reason", None)
    return first_line(reason if isinstance(reason, BaseException) else Exception(reason or error))
