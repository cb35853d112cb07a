"""The command that recomputes a certificate."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from rankfold.certificate.document import read_document
from rankfold.cli.app import DIFFERS, DONE, as_options, command, say
from rankfold.cli.inputs import unchanged
from rankfold.cli.json_out import print_json
from rankfold.cli.open import gives_module, open_artifact, open_examples, open_model
from rankfold.cli.options import DATA_HELP, FolderArgument, Reading, Weights
from rankfold.cli.recorded import as_recorded
from rankfold.cli.setting_options import setting_option
from rankfold.data.parts import PARTS
from rankfold.errors import InputError
from rankfold.files.digests import model_digest
from rankfold.files.reading import not_replaced
from rankfold.machine.device import check_device
from rankfold.machine.progress import TerminalProgress
from rankfold.verify import verification_lines
from rankfold.verify import verify as verify_artifact


@command
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
    with redirect_stdout(sys.stderr), not_replaced(folder):
        device = check_device(options.device)
        # A class of the user's own is needed to open the artifact at all.
        own = model if model is not None and gives_module(model) else None
        if model is None and weights is not None:
            raise InputError("--weights goes with --model; give both, or none of them.")
        given = unchanged(artifact=folder, models=[model], weights=weights, data=[data, guard])
        # Other weights than the certified ones are what it is to find and name.
        opened = open_artifact(folder, own, as_saved=False)
        original = None if model is None else open_model(model, weights, to_be_filled=True).model
        if own is not None and weights is None and original is not None:
            # Without its weights a function may give any: only certified ones are an original.
            stated = read_document(folder)["models"].get("original")
            original = original if model_digest(original) == stated else None
        opened.model.to(device)
        if original is not None:
            original.to(device)
        reading = as_recorded(folder, options.data_options(task), original=True)
        found = verify_artifact(
            folder,
            opened.model,
            open_examples(data, opened, reading, part=PARTS.index("held_out")),
            original=original,
            guard=None if guard is None else open_examples(guard, opened, reading),
            key=key,
            batch_size=batch_size,
            progress=TerminalProgress(),
        )
        given.check()
    checks = tuple(replace(one, detail=as_options(one.detail)) for one in found.checks)
    found = replace(found, checks=checks)
    if options.json:
        print_json({"model": str(folder), "data": data, **found.as_dict()})
    else:
        verification_lines(found, say)
    return DONE if found.holds else DIFFERS
