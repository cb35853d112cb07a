"""``rankfold compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankfold.cli.app import command
from rankfold.cli.options import Json


@command(needs="rankfold.cli.comparing")
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of saved models, or of a sweep.")],
    *,
    html: Annotated[
        Path | None, typer.Option(help="File to write a page of the comparison to.")
    ] = None,
    json: Json = False,
) -> int:
    """Several saved models side by side: size, loss, verdict, speed."""
    from rankfold.cli.comparing import compared

    return compared(folders, html, json=json)
