"""``rankfold schema``."""

from __future__ import annotations

from typing import Annotated

import typer

from rankfold.cli.app import DONE, command, say
from rankfold.cli.printed import print_json
from rankfold.cli.setting_options import completing
from rankfold.errors import InputError

NAMES = ("lossless", "compact", "inspect", "evaluate", "verify", "export", "doctor", "error")


@command(needs="rankfold.cli.outputs")
def schema(
    name: Annotated[
        str | None,
        typer.Argument(
            help=f"Whose output: {', '.join(NAMES)}.",
            show_default="list the names",
            autocompletion=completing(NAMES),
        ),
    ] = None,
) -> int:
    """Print the JSON schema of what a command prints with --json, or of an error."""
    from rankfold.cli.outputs import schema_of

    if name is None:
        for one in NAMES:
            say(one)
        return DONE
    if name not in NAMES:
        raise InputError(f"there is no schema {name!r}; expected {', '.join(NAMES)}.")
    print_json(schema_of(name))
    return DONE
