"""``rankfold evaluate``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from rankfold.cli.app import DONE, command, say
from rankfold.cli.options import DATA_HELP, FolderArgument, OwnClass, Reading
from rankfold.cli.printed import print_json
from rankfold.cli.setting_options import setting_option
from rankfold.errors import InputError
from rankfold.files.reading import not_replaced


@command(needs="rankfold.cli.recorded")
def evaluate(
    folder: FolderArgument,
    *,
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    model: OwnClass = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate the first examples only.")] = None,
    task: Annotated[str | None, setting_option("task")] = None,
    batch_size: Annotated[int | None, setting_option("batch_size")] = None,
    options: Reading,
) -> int:
    """Loss of a factorized model on data, all of it."""
    from rankfold.cli.inputs import unchanged
    from rankfold.cli.open import evaluate_examples, open_artifact, open_examples
    from rankfold.cli.recorded import as_recorded, check_read
    from rankfold.cli.tables import evaluation_lines
    from rankfold.machine.device import check_device
    from rankfold.machine.progress import TerminalProgress

    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; expected 1 example or more.")
    with redirect_stdout(sys.stderr), not_replaced(folder):
        device = check_device(options.device)
        given = unchanged(artifact=folder, models=[model], data=[data])
        opened = open_artifact(folder, model)
        opened.model.to(device)
        reading = as_recorded(folder, options.data_options(task))
        examples = open_examples(data, opened, reading)
        check_read(folder, examples)
        found = evaluate_examples(
            opened,
            examples,
            limit=limit,
            name=reading.task,
            batch_size=batch_size,
            progress=TerminalProgress(),
        )
        given.check()
    if options.json:
        print_json({"model": str(folder), "data": data, **found})
    else:
        for line in evaluation_lines(found):
            say(line)
    return DONE
