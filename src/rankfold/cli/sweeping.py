"""What ``sweep`` does: statistics once, then each size judged and saved."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from typing import Any

from rankfold.certificate.signature import SigningKey
from rankfold.cli.app import DONE, mention, say, tell, warn
from rankfold.cli.comparing import print_rows
from rankfold.cli.compressing import open_all
from rankfold.cli.inputs import unchanged
from rankfold.cli.kept import save_result
from rankfold.cli.named_paths import named_paths
from rankfold.cli.options import Compressing
from rankfold.cli.printed import print_json
from rankfold.cli.tables import plain_console
from rankfold.errors import InputError, visible
from rankfold.files.folder import owned_output
from rankfold.files.listed import PAGE_FILE
from rankfold.machine.progress import TerminalProgress
from rankfold.machine.weights import in_files
from rankfold.settings import SizeOf
from rankfold.sweep import SweepFolder, SweepStatement, each_size, prepare_sweep, state_sweep


def swept(model: str, sizes: str, size_of: SizeOf, margin: float, options: Compressing) -> int:
    """Judge and save each size, and print the table of all; the exit code."""
    confidence = options.settings.confidence
    statement = state_sweep(_numbers(sizes), size_of, margin, confidence)
    folders = options.folders
    if folders.out is None:
        raise InputError("--out is missing; expected a folder to save the models in.")
    reads = named_paths(model, folders.weights, *vars(options.parts).values())
    key = folders.key()
    target = SweepFolder(folders.out, statement, folders.overwrite)
    with owned_output(folders.out), redirect_stdout(sys.stderr):
        target.check(reads)
        tell(statement.line())
        _run(model, options, statement, target, key)
    if options.reading.json:
        rows = [row.as_dict() for row in target.done]
        told = {"statement": asdict(statement), "runs": rows, "saved": str(folders.out)}
        print_json(told)
        return DONE
    print_rows(plain_console(sys.stdout), target.done)
    say(statement.line())
    page = "" if folders.no_report else f", with {PAGE_FILE} of all sizes"
    say(f"saved: {visible(folders.out)}{page}")
    return DONE


def _run(
    model: str,
    options: Compressing,
    statement: SweepStatement,
    target: SweepFolder,
    key: SigningKey | None,
) -> None:
    """Statistics once, then each size: judged, saved, listed.

    Where a size is interrupted or fails, those before it stay, whole.
    """
    folders = options.folders
    mention(f"opening {visible(model)}")
    given = unchanged(models=[model], weights=folders.weights, data=vars(options.parts).values())
    largest = statement.sizes[0]
    whole = largest if statement.size_of == "model" else 1
    opened, data, guard = open_all(model, options, target.of(largest), whole)
    given.check_read(whole=in_files(opened.model))
    settings: Any = vars(replace(options.settings, confidence=statement.each))
    keywords: Any = {
        **settings,
        "guard": guard,
        "progress": TerminalProgress(),
        **folders.of_run(),
        "timing": not folders.no_timing,
    }
    prepared = prepare_sweep(opened.model, data, statement, keywords)
    target.begin()
    for size, result in each_size(prepared, statement):
        given.check()
        warn(result.document["data"]["history"]["trouble"])
        save_result(result, opened, folders, target.of(size), sign=key)
        target.add(size, result, page=not folders.no_report)
        tell(f"size {size:g}: {result.certificate.verdict}, saved in {visible(target.of(size))}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(one) for one in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"--sizes is {text!r}; expected shares separated by commas, such as 0.95,0.9,0.8."
        ) from error
