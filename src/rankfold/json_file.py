"""JSON files that may be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rankfold.errors import InputError


def read_json(file: Path) -> Any:
    """What a file holds.

    Raises:
        InputError: It is no UTF-8, no JSON, nested too deeply, or holds a number too long to read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error
