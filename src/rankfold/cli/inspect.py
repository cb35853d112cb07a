"""``rankfold inspect``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rankfold.cli.app import DONE, command, say
from rankfold.cli.options import FolderArgument
from rankfold.cli.printed import print_json
from rankfold.files.reading import read_whole

LISTING_WIDTH = 160  # of tables with a line a layer, where the output is no terminal


@command(needs="rankfold.artifact.recorded")
def inspect(
    folder: FolderArgument,
    *,
    layer: Annotated[
        str | None, typer.Option(help="Print the predicted loss of this layer at its ranks.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print rankfold.json as one JSON object.")
    ] = False,
) -> int:
    """What an artifact says of itself: sizes, losses, certificate, layers."""
    from rankfold.artifact.manifest import read_report
    from rankfold.artifact.recorded import recorded_inputs
    from rankfold.cli.tables import (
        layers_table,
        not_factorized_table,
        plain_console,
        print_curve,
        print_result,
    )
    from rankfold.data.input_settings import settings_line
    from rankfold.report.data_lines import source_lines

    report = read_whole(folder, lambda: read_report(folder))
    if json:
        print_json(report)
        return DONE
    console = plain_console(sys.stdout)
    if layer is not None:
        print_curve(console, report, layer)
        return DONE
    print_result(console, report, f"{folder}: {report['model']['class']}, {report['algorithm']}")
    for line in source_lines(report):
        say(line)
    if line := settings_line(recorded_inputs(folder)):
        say(f"inputs: {line}")
    listing = plain_console(sys.stdout, width=LISTING_WIDTH)
    for table in (layers_table(report, listing.width), not_factorized_table(report)):
        if table.row_count:
            listing.print(table)
    return DONE
