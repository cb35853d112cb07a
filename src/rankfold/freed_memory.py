"""What a process of its own does about memory; a library leaves such settings alone."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE_BLOCK = 2_000_000  # bytes


def give_back_freed_memory() -> None:
    """Let glibc return large freed blocks to the system at once.

    By default it keeps what the statistics took for as long as the process runs: measured on
    SmolLM2, 5.4 GB where 3.5 GB are in use. Elsewhere nothing is changed.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        mallopt(M_TRIM_THRESHOLD, 50 * LARGE_BLOCK)  # small blocks: rarely, it takes time
