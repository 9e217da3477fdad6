"""One process or several: the environment of torchrun, collectives, signals, default workers, device and dtype."""

import os
import signal
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

from tokdiv.errors import (
    EXIT_CODES,
    Interrupted,
    LostPeer,
    RunError,
    SharedError,
    UsageError,
)
from tokdiv.memory import freed_memory_kept

T = TypeVar("T")

MAX_WORKERS = 16  # decoding threads of a process by default: more hardly help
ROWS_PER_GATHER = 65_536  # bounds the memory of `gather_rows` on the device
TIMEOUT_VARIABLE = "TOKDIV_TIMEOUT"  # seconds to wait for another process before the run ends
TIMEOUT = 600.0


@dataclass(frozen=True)
class Processes:
    """This process among the others.

    Attributes:
        rank: in [0, world). world: number of processes. local_world: of those on this machine.
        device: where this process computes.
    """

    rank: int
    world: int
    local_world: int
    device: torch.device

    def gather(self, value: Any) -> list[Any] | None:
        """Every process's value on rank 0, in order of rank; None elsewhere."""
        if self.world == 1:
            return [value]
        values: list[Any] | None = [None] * self.world if self.rank == 0 else None
        with lost_peers():
            distributed.gather_object(value, values, dst=0)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every process."""
        if self.world == 1:
            return value
        box = [value]
        with lost_peers():
            distributed.broadcast_object_list(box, src=0)
        return box[0]

    def on_first(self, call: Callable[..., T], *arguments: Any) -> T:
        """Call a function on rank 0 alone; its result, or its UsageError or RunError, on every process."""
        if self.world == 1:
            return call(*arguments)
        result: Any = None
        if self.rank == 0:
            try:
                result = call(*arguments)
            except (UsageError, RunError) as error:
                result = error
        result = self.broadcast(result)
        if isinstance(result, RunError):
            raise SharedError(str(result)) from None
        if isinstance(result, UsageError):
            raise result
        return result

    def sum(self, values: Tensor) -> Tensor:
        """The sum of each entry over all processes, on the device of `values`."""
        if self.world == 1:
            return values
        total = (
            values.clone() if values.device.type == "cuda" else values.to(self._wire(), copy=True)
        )
        with lost_peers():
            distributed.all_reduce(total)
        return total.to(values.device)

    def max(self, value: int) -> int:
        """The largest value over all processes."""
        if self.world == 1:
            return value
        largest = torch.tensor([value], device=self._wire())
        with lost_peers():
            distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        return int(largest)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows (n_r, ...) of all processes, one process after the other, on the CPU of each."""
        if self.world == 1:
            return rows
        counts: list[Any] = [None] * self.world
        with lost_peers():
            distributed.all_gather_object(counts, len(rows))
        wire = self._wire()
        rows = rows.to(wire)
        parts: list[list[Tensor]] = [[] for _ in range(self.world)]
        for start in range(0, max(counts), ROWS_PER_GATHER):
            # Collectives need equal shapes; the padding is cut off again below.
            length = min(ROWS_PER_GATHER, max(counts) - start)
            piece = torch.zeros(length, *rows.shape[1:], dtype=rows.dtype, device=wire)
            own = rows[start : start + length]
            piece[: len(own)] = own
            pieces = [torch.empty_like(piece) for _ in range(self.world)]
            with lost_peers():
                distributed.all_gather(pieces, piece)
            for part, other, count in zip(parts, pieces, counts):
                part.append(other[: max(0, min(length, count - start))].cpu())
        return torch.cat([p for part in parts for p in part]) if max(counts) else rows.cpu()

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            with lost_peers():
                distributed.barrier()

    def _wire(self) -> torch.device:
        """The device that collectives take tensors from: the GPU with plain nccl, else the CPU."""
        return self.device if distributed.get_backend() == "nccl" else torch.device("cpu")


def current_processes(device: torch.device | str = "cpu") -> Processes:
    """The processes of torch.distributed where it is initialized, else this one alone."""
    if distributed.is_available() and distributed.is_initialized():
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return Processes(
            distributed.get_rank(), distributed.get_world_size(), local_world, torch.device(device)
        )
    return Processes(0, 1, 1, torch.device(device))


@contextmanager
def lost_peers() -> Iterator[None]:
    """Raise LostPeer where a collective fails, also one of torch's own, as in a backward pass of DDP."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no exception type of its own; its messages name its source file.
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise LostPeer(
            "another process of this run ended or stopped answering; what was saved is complete: the same command "
            "goes on from there"
        ) from error


def first_to_report() -> bool:
    """True on exactly one of the surviving processes (on rank 0 where torchrun's store is gone)."""
    try:
        # torchrun itself keeps this store, so that it outlives the processes.
        store = distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"tokdiv/lost-peer-{attempt}", 1) == 1
    except (RuntimeError, KeyError, ValueError):
        return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that torchrun started; without torchrun there is this one only.

    Tensors on a GPU are exchanged through nccl, those in CPU memory through gloo. A ranking exchanges only scores
    and decisions (small arrays in CPU memory), a pretraining its gradients. On a CPU, freed memory is kept
    within the context (`memory.freed_memory_kept`).

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:N" or "mps".
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = choose_device(device)
    with ExitStack() as stack:
        if chosen.type == "cpu":
            stack.enter_context(freed_memory_kept())
        if world > 1 and not distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds()))
            stack.callback(distributed.destroy_process_group)
        yield Processes(rank, world, local_world, chosen)


def timeout_seconds() -> float:
    """How long a process waits for another one: TOKDIV_TIMEOUT in seconds, else ten minutes.

    Raises:
        UsageError: it is not a positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise UsageError(f"{TIMEOUT_VARIABLE}={text}: expected a number of seconds, as 600")
    return seconds


def default_workers() -> int:
    """Decoding threads of a process: the cores that this job may use, shared among its local processes."""
    return max(1, min(MAX_WORKERS, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def available_cores() -> int:
    """Cores by affinity and by the cgroup's CPU quota, rounded up; os.cpu_count() ignores both."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [q for q in (_cgroup_cores(),) if q is not None]
    return max(1, min([cores, *quotas]))


def _cgroup_cores() -> int | None:
    """The CPU quota of this container in whole cores; None where there is none."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:  # cgroup v2
            quota, period = file.read().split()
    except (OSError, ValueError):
        try:
            with open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") as file:
                quota = file.read().strip()
            with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as file:
                period = file.read().strip()
        except OSError:
            return None
    if not quota.isdecimal() or not period.isdecimal() or not int(period):  # "max", or -1
        return None
    return -(-int(quota) // int(period))


@dataclass
class Interruption:
    """The number of the signal that asked to stop, or 0."""

    signal: int = 0


@contextmanager
def caught_signals() -> Iterator[Interruption]:
    """Note SIGINT, SIGTERM and SIGUSR1 instead of dying of them; a second SIGINT ends at once.

    Outside the main thread, where Python allows no handlers, signals keep their effect.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def note(number: int, frame: types.FrameType | None) -> None:
        if interruption.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        interruption.signal = number

    before = {number: signal.signal(number, note) for number in EXIT_CODES}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ended_by_signals(done: str) -> Iterator[None]:
    """Raise Interrupted as soon as a signal comes, also within `caught_signals`: for waits with nothing to save.

    Args:
        done: as in Interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: types.FrameType | None) -> None:
        raise Interrupted(number, done)

    before = {number: signal.signal(number, end) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def choose_device(device: str = "auto") -> torch.device:
    """The device to compute on; under torchrun each process of a machine takes its own GPU.

    Raises:
        UsageError: a device that torch does not know or does not see here.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    try:
        chosen = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
    except RuntimeError:
        raise UsageError(f"--device {device}: expected auto, cpu, cuda, cuda:N or mps") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {device}: expected auto, cpu, cuda, cuda:N or mps")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {device}: torch sees no CUDA device here; use --device cpu")
        index = chosen.index if chosen.index is not None else local_rank % torch.cuda.device_count()
        if index >= torch.cuda.device_count():
            raise UsageError(
                f"--device {device}: there are {torch.cuda.device_count()} CUDA devices here"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {device}: torch sees no such device here; use --device cpu")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> str:
    """ "float32" or "bfloat16"; "auto" is bfloat16 where the device computes in it natively.

    Raises:
        UsageError: another dtype.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"--dtype {dtype}: expected auto, float32 or bfloat16")
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        native = "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
    else:
        native = False
    return "bfloat16" if native else "float32"


def _cpu_flags() -> str:
    # torch's own test for this is private and changes its name; the kernel's list is stable.
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return ""
