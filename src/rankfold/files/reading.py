"""Reading a folder that another process may replace meanwhile: all of one folder, or again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from rankfold.errors import InputError, visible
from rankfold.files.owned import dead, hidden_of, real_path, stands, tell

Read = TypeVar("Read")
PATIENCE = 30.0  # seconds of reading again while the folder is replaced again and again
GAP = 1.0  # seconds that a folder may be missing between two renames
_PAUSE = 0.01


def read_whole(folder: Path, read: Callable[[], Read]) -> Read:
    """What a function reads from a folder, none of it from the folder that took its place.

    What a run that was killed had left hidden is put back first.

    Args:
        folder: The folder.
        read: Reads all that is needed; called again where the folder was replaced meanwhile.

    Raises:
        InputError: From ``read``, or the folder is replaced all the time.
    """
    until, soon = time.monotonic() + PATIENCE, time.monotonic() + GAP
    put_back(folder)
    while True:
        before = identity(folder)
        try:
            found = read()
        except InputError:
            if before is not None and before == identity(folder):
                raise
            missing = before is None and identity(folder) is None
            if missing and not (_is_written(folder) and time.monotonic() < soon):
                raise
        else:
            if before == identity(folder):
                return found
        if time.monotonic() > until:
            raise InputError(REPLACED.format(visible(folder)))
        time.sleep(_PAUSE)


@contextmanager
def not_replaced(folder: Path) -> Iterator[None]:
    """Refuse what was read within from a folder that was replaced meanwhile.

    Raises:
        InputError: It was, whatever was found to be wrong with it.
    """
    put_back(folder)
    before = identity(folder)
    try:
        yield
    except InputError:
        if before is not None and before != identity(folder):
            raise InputError(REPLACED.format(visible(folder))) from None
        raise
    if before != identity(folder):
        raise InputError(REPLACED.format(visible(folder)))


REPLACED = "{} was replaced by another run while it was read: run this again."


def identity(folder: Path) -> tuple[int, ...] | None:
    """What tells a folder or file from another that takes its name; None where there is none."""
    try:
        found = os.stat(folder)  # noqa: PTH116
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def put_back(folder: Path) -> None:
    """Give a missing folder back what a run that was killed had left of it, where that is there."""
    with suppress(OSError, ValueError):  # one that may only be read; the reader says what is wrong
        output = real_path(folder)
        if stands(output) or not hidden_of(output).is_dir():
            return
        left = dead(hidden_of(output))
        if left is not None:
            try:
                left.put_right()
            finally:
                left.give_up()
                tell(left)


def _is_written(folder: Path) -> bool:
    """Whether a run has a hidden folder for it: it may be about to take its place."""
    with suppress(OSError, ValueError):
        return hidden_of(real_path(folder)).is_dir()
    return False
