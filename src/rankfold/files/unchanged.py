"""Whether the files that a run has read are at its end what they were at its start.

Digests of all of them are taken before anything is opened, and compared before a result is given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias

from rankfold.errors import InputError, listed, visible
from rankfold.files.digests import stream_digest

Listing: TypeAlias = Callable[[], Iterable[Path]]


# A file of some size whose bytes were mostly never written: no weights, whatever packs them, and
# reading it would take hours.
LARGE, HOLES = 1 << 28, 64


class _Seen(NamedTuple):
    """A file as it was: when it was written, how long it is, and what it holds."""

    written: tuple[int, int, int]
    digest: str


class Unchanged:
    """The files of a run's inputs.

    Args:
        inputs: For what messages call an input the function that lists its files; it is called at
            the end, too: files may be gone, and others may have come.
    """

    def __init__(self, inputs: Mapping[str, Listing]) -> None:
        self._inputs = dict(inputs)
        self._seen = _now(self._listed())

    def check_read(self, whole: bool = False) -> None:
        """Call it when all is opened: what was written meanwhile may have been read half.

        Args:
            whole: Compare all bytes, not just when files were written: what was read is a copy, and
                nobody looks at the files themselves any more.

        Raises:
            InputError: Names the files that were written since the start.
        """
        if whole:
            self.check()
        here = self._listed()
        found = [
            f"{visible(file)} ({whose}): written while it was read"
            for file, whose in here.items()
            if file in self._seen and _written(file) != self._seen[file].written
        ]
        _refuse(found + self._come_and_gone(here))

    def check(self) -> None:
        """Call it before a result is given. What was written again as it was is told on stderr.

        Raises:
            InputError: Names the files that are others than at the start, came, or are gone.
        """
        whose = self._listed()
        now = _now(whose)
        found = [
            f"{visible(file)} ({whose[file]}): holds other bytes than at the start"
            for file, seen in now.items()
            if file in self._seen and seen.digest != self._seen[file].digest
        ]
        _refuse(found + self._come_and_gone(now))
        for file, seen in now.items():
            if seen.written != self._seen[file].written:
                told = f"{visible(file)} was written during the run; it holds the same bytes"
                print(told, file=sys.stderr)

    def _come_and_gone(self, now: Iterable[Path]) -> list[str]:
        here = {*now}
        gone = [f"{visible(file)}: gone since the start" for file in self._seen if file not in here]
        come = [f"{visible(file)}: new since the start" for file in here if file not in self._seen]
        return [*gone, *sorted(come)]

    def _listed(self) -> dict[Path, str]:
        found: dict[Path, str] = {}
        for whose, listing in self._inputs.items():
            with suppress(InputError, OSError):  # whoever opens it says what is wrong with it
                for file in listing():
                    found.setdefault(file, whose)
        return {file: whose for file, whose in found.items() if _is_file(file)}


def _now(files: Iterable[Path]) -> dict[Path, _Seen]:
    files = list(files)
    for file in files:
        _refuse_holes(file)
    return {file: _Seen(_written(file), _digest(file)) for file in files}


def _refuse_holes(file: Path) -> None:
    """Refuse a file that is a hole, as a download leaves that has reserved its room alone.

    Raises:
        InputError: As said.
    """
    try:
        found = file.stat()
    except OSError:  # whoever opens it says what is wrong with it
        return
    blocks = getattr(found, "st_blocks", None)  # of 512 bytes; Windows doesn't say
    if blocks is not None and found.st_size > LARGE and blocks * 512 < found.st_size // HOLES:
        raise InputError(
            f"{visible(file)} has {found.st_size:,} bytes, and {blocks * 512:,} of them were ever "
            "written: a copy or download of it has not ended. Fetch it again."
        )


def _refuse(found: list[str]) -> None:
    if found:
        raise InputError(
            f"what is read was changed during the run:\n  {listed(found)}\n"
            "There is no result, since nobody could say of what it is, and nothing was written. "
            "Run it again on files that nothing else writes to, such as a copy."
        )


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()  # a pipe or device would never end
    except OSError:
        return False


def _written(file: Path) -> tuple[int, int, int]:
    try:
        found = file.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_mtime_ns, found.st_size


def _digest(file: Path) -> str:
    """SHA-256 of a file of any size; of one that can't be read, why."""
    try:
        return stream_digest(file)
    except OSError as error:
        return str(error)
