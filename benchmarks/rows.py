"""Results as JSON lines: written as they come, read back typed, so that a run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")


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
