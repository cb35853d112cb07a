"""JSON files that may be damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rankfold.errors import InputError, note

LARGEST = 200_000_000  # bytes; what rankfold writes of a model with 100,000 layers is below this


def read_json(file: Path, *, constants: bool = False) -> Any:
    """What a file holds.

    Args:
        file: The file.
        constants: Allow NaN and Infinity, which are no JSON, as other libraries do.

    Raises:
        InputError: It is missing, no UTF-8, no JSON, nested too deeply, too long, says one thing
            twice, or holds a number that is too long to read.
    """
    content = read_bytes(file)
    refuse = None if constants else _refuse_constant
    try:
        text = content.decode("utf-8")
        return json.loads(text, object_pairs_hook=_object, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error


def read_bytes(file: Path) -> bytes:
    """The bytes of a file, unless it is far too long.

    Raises:
        InputError: It is too long, no file, or can't be read.
    """
    try:
        if not file.is_file():  # a pipe or device would never end
            raise InputError(f"{file} can't be read: there is no such file.")
        size = file.stat().st_size
        if size > LARGEST:
            raise InputError(f"{file} has {size} bytes; expected at most {LARGEST}.")
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} can't be read: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        note(name, *[value] if isinstance(value, str) else ())
        if name in found:
            raise ValueError(f"the name {name!r} stands twice in one object")
        found[name] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def finite(value: float) -> float | None:
    """The value, None where JSON has no number for it."""
    return value if math.isfinite(value) else None
