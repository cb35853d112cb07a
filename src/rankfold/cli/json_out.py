"""A result as JSON on stdout."""

from __future__ import annotations

import re
import sys
from json import dumps
from typing import Any

import typer

from rankfold.errors import UNSEEN


def print_json(value: dict[str, Any]) -> None:
    """Print an object; what a terminal would interpret is written as JSON escapes it."""

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found[0] == "\n" else dumps(found[0])[1:-1]

    # What a terminal would interpret stands within texts alone, but for the line feeds between.
    text = dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    if not (sys.stdout.encoding or "ascii").lower().startswith("utf"):
        text = dumps(value, indent=1, allow_nan=False)
    typer.echo(UNSEEN.sub(escaped, text), file=sys.stdout)
