"""The files and folders that a command is given to read."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from rankfold.cli.options import SELF
from rankfold.data.sources import is_spec


def named_paths(*specs: str | Path | None) -> list[Path]:
    """The files and folders that MODEL, DATA and the like are read from."""
    given = [str(spec) for spec in specs if spec not in (None, SELF)]
    files = [Path(spec.rpartition(":")[0] if is_spec(spec) else spec) for spec in given]
    found = []
    for file in files:
        with suppress(OSError):  # a name that the system refuses is refused where it is opened
            found += [file] if file.exists() else []
    return found
