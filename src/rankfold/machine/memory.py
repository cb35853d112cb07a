"""Whether an error says that memory ran out, and how much was asked for."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

# As torch, NumPy, C++ and the system's loader say it.
_SAID = re.compile(
    r"DefaultCPUAllocator|can't allocate memory|[Cc]annot allocate memory|Unable to allocate"
    r"|bad_alloc|bad allocation|failed to map segment|can't start new thread"
)
_ASKED = re.compile(r"(?:allocate|mmap) (?P<bytes>\d+) bytes|allocate (?P<amount>[\d.]+ [KMGT]iB)")
ADVICE = (
    "Ask for smaller batches (batch_size=), keep statistics in files "
    '(offload_folder="DIR"), leave layers out (exclude=), or end other programs.'
)


def memory_ran_out(error: BaseException) -> bool:
    """Whether this error is one of memory, on the CPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError | ImportError):
        return _SAID.search(str(error)) is not None
    return isinstance(error, MemoryError)


def memory_message(error: BaseException) -> str | None:
    """What to tell a user where memory ran out, also where that led to another error; else None."""
    found = next((one for one in with_causes(error) if memory_ran_out(one)), None)
    if found is None:
        return None
    asked = _ASKED.search(str(found))
    amount = "" if asked is None else asked["amount"] or f"{int(asked['bytes']):,} bytes"
    needed = f": {amount} more were asked for" if amount else ""
    return f"this machine's memory, or what a limit leaves of it, is too small{needed}. {ADVICE}"


def with_causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was raised from."""
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
