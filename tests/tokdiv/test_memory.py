"""Freed memory is kept for the next forward pass, goes back afterwards, and other systems are left alone."""

import ctypes
import platform
import subprocess
import sys

import pytest

from tokdiv.memory import freed_memory_kept

GLIBC = platform.libc_ver()[0] == "glibc"

# Page faults and resident MiB of a process that allocates, touches and frees 64 MiB over and over.
SCRIPT = """
import contextlib, resource, sys
import numpy as np
from tokdiv.memory import freed_memory_kept

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

def work(times):
    before = faults()
    for _ in range(times):
        np.ones(2**23)  # 64 MiB: above glibc's largest threshold, so it maps each anew
    return faults() - before

before = resident()
given_back = work(8)
with freed_memory_kept():
    work(2)
    kept = work(8)
    held = resident() - before
print(given_back, kept, held, resident() - before, work(8))
"""


@pytest.mark.skipif(not GLIBC or sys.platform != "linux", reason="needs glibc and /proc")
def test_pages_are_touched_once_and_given_back_at_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given_back, kept, held, left, again = map(float, done.stdout.split())
    assert given_back > 100  # as many as the system's pages are small
    assert kept < given_back / 10
    assert held >= 60  # the block stays, freed
    assert left < 16
    assert again > given_back / 2  # as before


@pytest.mark.parametrize("error", [OSError("no library"), TypeError("Windows wants a name"), None])
def test_without_glibc_nothing_happens(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:  # one without mallopt
        def __init__(self, name: None) -> None:
            if error is not None:
                raise error

    monkeypatch.setattr(ctypes, "CDLL", Library)
    with freed_memory_kept():
        pass
