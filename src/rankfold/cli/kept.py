"""A finished result is saved, if need be elsewhere."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rankfold.cli.app import as_options, say
from rankfold.cli.open import OpenedModel
from rankfold.cli.options import Folders
from rankfold.errors import InputError, visible
from rankfold.files.folder import written
from rankfold.report.latency import Latency, speed_sentence
from rankfold.result import Result


def say_speed(latency: Latency | None) -> None:
    """One line of how fast a result is, where that was measured."""
    if latency is not None:
        say(as_options(f"speed: {speed_sentence(latency)}"))


def save_result(
    result: Result, opened: OpenedModel, folders: Folders, out: Path, **options: Any
) -> None:
    """Save a result as the options say; where that fails, as ``save_somewhere``."""
    save = partial(
        result.save,
        tokenizer=opened.tokenizer,
        source=opened.source,
        overwrite=folders.overwrite,
        page=not folders.no_report,
        max_shard_size=folders.max_shard_size,
        **options,
    )
    save_somewhere(save, out)


def save_somewhere(save: Callable[[Path], object], out: Path) -> None:
    """Save a result; where that fails after all, save it in the folder for temporary files.

    Args:
        save: Writes it to a folder.
        out: Where to.

    Raises:
        InputError: It was not saved there; the message says where it is.
    """
    before = len(written())
    try:
        save(out)
    except InputError as error:
        if len(written()) > before:  # it was kept, and the message says where
            raise
        place = Path(tempfile.mkdtemp(prefix="rankfold-"))
        try:
            save(place / "saved")
        except InputError:
            with suppress(OSError):
                place.rmdir()
            raise error from None
        raise InputError(
            f"{error}\nThe result was saved in {visible(place / 'saved')} instead; move it from "
            "there before the system cleans that folder."
        ) from error
