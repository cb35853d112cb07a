"""JSON files that may be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rankfold.errors import InputError

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
    try:
        size = file.stat().st_size
        if size > LARGEST:
            raise InputError(f"{file} has {size} bytes; expected at most {LARGEST}.")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = "can't be read" if isinstance(error, OSError) else "is not valid JSON"
        raise InputError(f"{file} {what}: {error}") from error
    try:
        refuse = None if constants else _refuse_constant
        return json.loads(text, object_pairs_hook=_object, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} stands twice in one object")
        found[name] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
