"""``rankfold report``: the page of a saved model, made again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from rankfold.artifact.manifest import read_report
from rankfold.certificate.document import JSON_FILE, read_document
from rankfold.cli.app import DONE, command, say
from rankfold.cli.options import FolderArgument
from rankfold.errors import InputError
from rankfold.report.page import PAGE_FILE, page


@command
def report(
    folder: FolderArgument,
    *,
    out: Annotated[
        Path | None, typer.Option(help="File to write it to, by default report.html in the folder.")
    ] = None,
) -> int:
    """Make the page that shows a saved model: verdict, sizes, layers, examples."""
    manifest = read_report(folder)
    document = read_document(folder) if (folder / JSON_FILE).is_file() else None
    file = folder / PAGE_FILE if out is None else out
    text = page(manifest, document)
    try:
        write_whole(file, text)
    except OSError as error:
        raise InputError(f"{file} can't be written: {error}. Choose another --out.") from error
    say(f"wrote {file}")
    return DONE


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all.

    Raises:
        OSError: The system refuses it; what stood there stays.
    """
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".rankfold-", suffix=".html")
    draft = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as written:
            written.write(text)
            written.flush()
            os.fsync(written.fileno())
        draft.chmod(0o644)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
