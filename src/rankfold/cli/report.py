"""``rankfold report``: the page of a saved model, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankfold.cli.app import DONE, command, say
from rankfold.cli.options import FolderArgument
from rankfold.errors import InputError, visible
from rankfold.files.durable import write_whole

MODE = 0o644  # of the page


@command(needs="rankfold.report.page")
def report(
    folder: FolderArgument,
    *,
    out: Annotated[
        Path | None, typer.Option(help="File to write it to, by default report.html in the folder.")
    ] = None,
) -> int:
    """Make the page that shows a saved model: verdict, sizes, layers, examples."""
    from rankfold.artifact.manifest import read_report
    from rankfold.artifact.save import list_file
    from rankfold.certificate.document import JSON_FILE, read_document
    from rankfold.report.page import PAGE_FILE, is_page, page
    from rankfold.report.seen import read_seen

    manifest = read_report(folder)
    document = read_document(folder) if (folder / JSON_FILE).is_file() else None
    file = folder / PAGE_FILE if out is None else out
    if out is None and file.exists() and not is_page(file):
        raise InputError(
            f"{visible(file)} is no page that rankfold has made; choose another --out."
        )
    text = page(manifest, document, read_seen(folder))
    try:
        write_whole(file, [text.encode()], MODE)
        if out is None:
            list_file(folder, manifest, PAGE_FILE)
    except OSError as error:
        raise InputError(
            f"{visible(file)} can't be written: {error}. Choose another --out."
        ) from error
    say(f"wrote {visible(file)}")
    return DONE
