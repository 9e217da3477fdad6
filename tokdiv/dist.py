"""One process or many: what torchrun sets in the environment, and a few collectives on small objects."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed

from tokdiv.errors import LostPeer, UsageError
from tokdiv.memory import freed_memory_kept


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
        with _peers():
            distributed.gather_object(value, values, dst=0)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every process."""
        if self.world == 1:
            return value
        box = [value]
        with _peers():
            distributed.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostPeer(
            "another process of this run ended; what was saved is whole: the same command goes on from there"
        ) from error


def first_to_report() -> bool:
    """Whether none of the other processes that are left has asked this before; rank 0 where nobody counts."""
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
    """Join the other processes that torchrun started; alone, this is the only one.

    What lies on a GPU crosses over nccl, what lies in CPU memory over gloo. A ranking exchanges scores and
    decisions alone, small arrays in CPU memory; a pretraining run its gradients. On a CPU, freed memory is
    kept meanwhile (`memory.freed_memory_kept`).

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
            distributed.init_process_group(backend, timeout=timedelta(minutes=30))
            stack.callback(distributed.destroy_process_group)
        yield Processes(rank, world, local_world, chosen)


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
