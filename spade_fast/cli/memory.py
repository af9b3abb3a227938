"""How a process of ours uses memory."""

import ctypes
import os

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's names for mallopt
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
MOST = 2**31 - 1  # bytes


def keep_freed_memory() -> None:
    """Has glibc use freed memory again: else it gives large tensors back to the system, and the
    first touch of each page of the next one costs more than the arithmetic on it. A step of
    training at the published sizes became 1.1 times as fast on two threads, with 6% more memory at
    batch 1 and 14% at 4. Nothing is done where the environment says something else, or the C
    library is another.
    """
    if any(name in os.environ for name in VARIABLES):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for parameter in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            mallopt(parameter, MOST)
