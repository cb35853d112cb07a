"""JSON files that may be damaged."""

from __future__ import annotations

import json
import math
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from rankfold.errors import InputError, note, visible

LARGEST = 200_000_000  # bytes; what rankfold writes of a model with 100,000 layers is below this
DEEPEST = 100  # objects and lists within each other; what rankfold writes has ten


def read_json(file: Path, *, constants: bool = False) -> Any:
    """What a file holds.

    Args:
        file: The file.
        constants: Allow NaN and Infinity, which are no JSON, as other libraries do.

    Raises:
        InputError: It is missing, no UTF-8, no JSON, nested too deeply, too long, says one thing
            twice, or holds a number that is too long or too large to read.
    """
    content = read_bytes(file)
    refuse, number = (None, None) if constants else (_refuse_constant, _finite)
    try:
        text = content.decode("utf-8")
        found = json.loads(
            text, object_pairs_hook=_object, parse_constant=refuse, parse_float=number
        )
        _check_depth(found)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{visible(file)} is not valid JSON: {visible(error)}") from error
    return found


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


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:60]} is too large")
    return value


def _check_depth(value: object) -> None:
    """Refuse what functions that call themselves would run out of room for."""
    level = [value]
    for _ in range(DEEPEST):
        inner: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inner += [v for v in one.values() if isinstance(v, dict | list)]
            elif isinstance(one, list):
                inner += [v for v in one if isinstance(v, dict | list)]
        if not inner:
            return
        level = inner
    raise ValueError(f"more than {DEEPEST} objects and lists stand within each other")


def finite(value: float) -> float | None:
    """The value, None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def plain(value: object) -> object:
    """A number as Python's own: NumPy's can't be written to JSON."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value
