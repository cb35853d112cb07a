"""``rankfold verify``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from rankfold.cli.app import DIFFERS, DONE, command, say
from rankfold.cli.options import DATA_HELP, FolderArgument, Reading
from rankfold.cli.printed import print_json
from rankfold.cli.room import Weights
from rankfold.cli.setting_options import setting_option
from rankfold.files.reading import not_replaced


@command(needs="rankfold.cli.verifying")
def verify(
    folder: FolderArgument,
    *,
    data: Annotated[str, typer.Option(help=DATA_HELP + " Holds the held-out examples.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The original model, as of lossless, to compute its losses again too; a class of "
            "your own is needed: file.py:function."
        ),
    ] = None,
    weights: Weights = None,
    guard: Annotated[
        str | None,
        typer.Option(help="Holds the examples of other kinds that --guard named."),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="The public key of whoever signed it, a PEM file."),
    ] = None,
    task: Annotated[str | None, setting_option("task")] = None,
    batch_size: Annotated[int | None, setting_option("batch_size")] = None,
    options: Reading,
) -> int:
    """Recompute an artifact's certificate from its weights and the held-out data."""
    from rankfold.cli.verifying import verification_lines, verified

    with redirect_stdout(sys.stderr), not_replaced(folder):
        found = verified(
            folder, data, options, model=model, weights=weights, guard=guard, key=key,
            task=task, batch_size=batch_size,
        )  # fmt: skip
    if options.json:
        print_json({"model": str(folder), "data": data, **found.as_dict()})
    else:
        verification_lines(found, say)
    return DONE if found.holds else DIFFERS
