"""The command that puts right what runs that were killed have left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankfold.cli.app import DONE, command, say
from rankfold.errors import visible
from rankfold.files.leftovers import clean_leftovers


@command
def clean(
    folder: Annotated[
        Path,
        typer.Argument(help="An --out folder, or the folder that holds such folders."),
    ] = Path(),
) -> int:
    """Restore or remove what runs that were killed have left; a running one is left alone."""
    lines = clean_leftovers(folder)
    for line in lines or [f"no run has left anything in {visible(folder)}"]:
        say(line)
    return DONE
