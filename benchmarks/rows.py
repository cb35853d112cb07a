"""Results as JSON lines: written as they come, read back typed, so that a run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from rankfold.machine.progress import TerminalProgress

Row = TypeVar("Row")


class Keyed(Protocol):
    """A dataclass that knows what was measured."""

    @property
    def key(self) -> tuple[object, ...]: ...


KeyedRow = TypeVar("KeyedRow", bound=Keyed)


class Recorder(Generic[KeyedRow]):
    """Writes each result as it comes, and knows those that are there already.

    Attributes:
        file: Of JSON lines.
        done: Keys of the rows measured so far.
        progress: Shows the stages.
    """

    def __init__(self, file: Path, make: Callable[..., KeyedRow]) -> None:
        self.file = file
        self.done = {row.key for row in read_rows(file, make)}
        self.progress = TerminalProgress()

    def write(self, row: KeyedRow) -> None:
        """Append a row."""
        self.done.add(row.key)
        append_row(self.file, row)


def read_rows(file: Path, make: Callable[..., Row]) -> list[Row]:
    """The rows measured so far, each made from its fields: by the dataclass they were, say."""
    if not file.exists():
        return []
    return [make(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def append_row(file: Path, row: Any) -> None:
    """Append one row, a dataclass."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(asdict(row)) + "\n")
