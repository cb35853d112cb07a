"""JSON on stdout."""

from __future__ import annotations

import re
import sys
from json import dumps
from typing import Any

import typer

from rankfold.errors import UNSEEN


def error_json(code: int, message: str, traceback: str = "") -> dict[str, Any]:
    """What stdout holds in place of a result.

    Args:
        code: The exit code.
        message: As stderr says it.
        traceback: Of the user's own code, where that raised it.
    """
    kind = "interrupted" if code > 128 else {2: "bad input", 6: "own code"}[code]
    return {"error": {"code": code, "kind": kind, "message": message, "traceback": traceback}}


def print_json(value: dict[str, Any]) -> None:
    """Print one object; what a terminal would interpret is written as escapes."""

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found[0] == "\n" else dumps(found[0])[1:-1]

    # What a terminal would interpret stands within texts alone, but for the line feeds between.
    text = dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    if not (sys.stdout.encoding or "ascii").lower().startswith("utf"):
        text = dumps(value, indent=1, allow_nan=False)
    typer.echo(UNSEEN.sub(escaped, text), file=sys.stdout)
