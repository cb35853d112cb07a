"""Whether a launcher such as ``torchrun`` has started this process as one of several.

Nothing but the standard library is imported: the command line asks before it imports torch.
"""

from __future__ import annotations

import os

ALONE = "RANKFOLD_ALONE"  # set to anything but 0, a process works by itself whatever it is one of
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


def works_alone() -> bool:
    """Whether the user wants this process to work by itself."""
    return os.environ.get(ALONE, "0") not in ("", "0")


def launched() -> tuple[int, int]:
    """This process' number, from 0, and how many there are, as a launcher has written them."""
    rank, size = (_number(os.environ.get(name, "")) for name in ("RANK", "WORLD_SIZE"))
    known = rank is not None and size is not None and all(map(os.environ.get, _ADDRESS))
    if rank is None or size is None or not known or works_alone():
        return 0, 1
    return rank, size


def beside() -> int:
    """How many processes of the run are on this machine, where a launcher says so; else all."""
    _, size = launched()
    here = _number(os.environ.get("LOCAL_WORLD_SIZE", ""))
    return size if here is None else max(1, min(here, size))


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None
