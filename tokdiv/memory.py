"""On a CPU, memory that a forward pass frees stays with the process for the next one."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# <malloc.h> of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within it, glibc's malloc gives nothing back to the system; elsewhere than on glibc nothing changes.

    A network's activations are allocated and freed at each layer. The largest of them glibc maps anew each
    time, and the system clears every page of them when it is first touched: a quarter of a float32
    ResNet-50's time, more of a MobileNet's. The process holds up to a fifth more memory for it. At the end
    all that is free goes back at once, and malloc is left as it is in a process that has freed much before.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, malloc_trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError, TypeError):  # another libc, another system
        yield
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        mallopt(M_MMAP_MAX, 65536)
        # The ends of the range in which glibc adjusts both by itself (its manual, mallopt(3)).
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
        malloc_trim(0)
