"""What glibc does with freed memory: much of it stays with the process, though nothing is in it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
# Bytes, the most that glibc would come to by itself. A block that is mapped is cleared, page by
# page, each time that it is used again: with 8 MB a third of the CPU time of ResNet-20 went there,
# with this a tenth, for a tenth more memory (benchmarks/stages.py).
LARGE_BLOCK = 32 << 20
MOST_KEPT = 100_000_000  # bytes of small blocks; giving those back takes time


def give_back_freed_memory() -> None:
    """Let glibc return large freed blocks to the system at once.

    By default it keeps what the statistics took for as long as the process runs: measured on
    SmolLM2, 5.4 GB where 3.5 GB are in use. Elsewhere nothing is changed. It is for a process of
    rankfold's own; a library leaves such settings alone.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT)


def trim_freed_memory() -> None:
    """Return freed blocks of any size to the system, as far as they fill pages; glibc's alone."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
