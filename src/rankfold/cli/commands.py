"""The command itself: its version, and its entry point. The commands are in ``lazy``."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from typing import Annotated

import typer

from rankfold.cli.app import DONE, app, tell
from rankfold.cli.raised import ending
from rankfold.machine.freed_memory import give_back_freed_memory
from rankfold.machine.interruption import ignore_from_here


def _version(wanted: bool) -> None:
    if wanted:
        try:
            torch = version_of("torch")
        except PackageNotFoundError:  # a build of one's own
            torch = "of unknown version"
        python = platform.python_version()
        typer.echo(f"rankfold {version_of('rankfold')} (torch {torch}, Python {python})")
        raise typer.Exit(DONE)


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Print the versions of rankfold, torch and Python.",
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of ``rankfold``."""
    give_back_freed_memory()
    try:
        app()
    except (ImportError, MemoryError, OSError) as error:  # a command's own module
        if (found := ending(error)) is None:
            raise
        code, message, _ = found
        tell(f"error: {message}")
        sys.exit(code)
    finally:
        ignore_from_here()
