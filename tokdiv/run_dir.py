"""A run's folder (RUN, OUT, RACE or DIR): one writer at a time, and files that are complete or absent."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tokdiv.errors import RunError, UsageError, first_line

log = logging.getLogger(__name__)

LOCK, CONFIG = ".lock", "config.json"
PART = re.compile(r"\..+\.[0-9a-f]{16}\.part")  # a file or folder that was not finished


class Busy(Exception):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is made where it is missing.

    A file system without locks (NFS without lockd, some FUSE and Lustre mounts) gets a warning and no lock.

    Raises:
        Busy: another process holds it, and `wait` is false.
        OSError: the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # not POSIX
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise Busy from None
            log.warning(
                "'%s': this file system has no locks (%s): make sure that no other command writes here",
                path.parent,
                first_line(error),
            )
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_run_dir(
    out: str | os.PathLike[str],
    check_same: Callable[[dict[str, Any]], None],
    *,
    resume: bool,
) -> Iterator[Path]:
    """Make a run's folder, or find it fit to be resumed; it is this process's alone within the context.

    Args:
        out: the folder; a link stands for what it points to.
        check_same: gets config.json of the run that is there, and raises UsageError if it is another run.
        resume: False moves an old run to `out`.bak-N.

    Raises:
        UsageError: it holds something else or another run, cannot be written to, or another process
            writes to it.
    """
    folder = Path(out).expanduser().resolve()
    with _as_usage_errors(out):
        begun = folder.is_dir() and _is_begun(folder)
        if begun and not resume:
            with locked(folder / LOCK, wait=False):
                backup = _free_backup(folder)
                folder.rename(backup)
            log.info("moved the old run to %s", backup)
        elif begun:
            if not (folder / CONFIG).is_file():
                raise UsageError(
                    f"-o {out}: the folder is not empty and holds no run; give another one"
                )
            check_same(read_config(folder))
    with locked_folder(out):
        yield folder


@contextlib.contextmanager
def locked_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder, or take the one that is there; it is this process's alone within the context.

    Raises:
        UsageError: it is a file, cannot be written to, or another process writes to it.
    """
    folder = Path(out).expanduser().resolve()
    with contextlib.ExitStack() as stack:
        with _as_usage_errors(out):
            if folder.exists() and not folder.is_dir():
                raise UsageError(f"-o {out}: is a file; give a folder")
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            stack.enter_context(locked(folder / LOCK, wait=False))
            remove_parts(folder)
        yield folder


@contextlib.contextmanager
def _as_usage_errors(out: str | os.PathLike[str]) -> Iterator[None]:
    """What is wrong with a folder is a mistake in the call."""
    try:
        yield
    except Busy:
        raise UsageError(
            f"-o {out}: another process is writing to it; wait for it, or give another folder"
        ) from None
    except OSError as error:
        raise UsageError(
            f"-o {out}: cannot be written to ({first_line(error)}); give another folder"
        ) from None


def _is_begun(folder: Path) -> bool:
    """Whether there is more than what a run leaves that was killed at its very start."""
    return any(f.name != LOCK and not PART.fullmatch(f.name) for f in folder.iterdir())


def _free_backup(folder: Path) -> Path:
    number = 1
    while (backup := folder.with_name(f"{folder.name}.bak-{number}")).exists():
        number += 1
    return backup


def remove_parts(folder: Path, name: str | None = None) -> None:
    """Remove what a killed process left unfinished in a run's folder and the folders in it.

    Args:
        name: only of the file or folder of this name in `folder`; others may be writing there.
    """
    entries = [*folder.iterdir(), *folder.glob("*/*")] if name is None else [*folder.iterdir()]
    for entry in entries:
        if PART.fullmatch(entry.name) and (name is None or entry.name.startswith(f".{name}.")):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def read_config(folder: Path) -> dict[str, Any]:
    """RUN/config.json.

    Raises:
        UsageError: it is not a JSON object.
    """
    try:
        return read_json(folder / CONFIG)
    except (OSError, ValueError):
        raise UsageError(
            f"-o {folder}: its config.json is damaged; give another folder, or start anew with --no-resume"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        OSError: it cannot be read. ValueError: it holds something else, or is nested too deeply.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def digest(content: Any) -> str:
    """sha256 in hex of plain JSON types, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def part_of(path: Path) -> Path:
    """A new name beside `path` for what will be renamed to it; `remove_parts` knows it as unfinished."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


def write_atomic(path: Path, data: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is either the old one or the new one, also after a power cut.

    Args:
        data: the content, or a function that writes it piece by piece.

    Raises:
        RunError: the disk is full, or the folder cannot be written to.
    """
    part = part_of(path)
    watched = None
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            watched = _Watched(file)
            if callable(data):
                data(watched)  # type: ignore[arg-type]
            else:
                watched.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except Exception as error:
        # A library's own error (torch.save's "unexpected pos") hides the disk's.
        cause = watched.error if watched is not None and watched.error is not None else error
        if not isinstance(cause, OSError):
            raise
        raise write_error(path, cause) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_error(path: Path, error: OSError) -> RunError:
    """What to say where `path` cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    why = "the disk is full" if full else first_line(error)
    remedy = "free some space" if full else "make it writable"
    return RunError(
        f"cannot write '{path}': {why}; what was saved before is whole: {remedy}, and the same command goes on"
    )


class _Watched:
    """A file that remembers the first error of the disk."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def sync_folder(folder: Path) -> None:
    """The names in a folder reach the disk too, where the file system can do that."""
    if os.name != "posix":
        return
    # FUSE, SMB and VirtualBox mounts refuse it; the files themselves are on the disk.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
