"""A finished result is saved, if need be elsewhere."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rankfold.errors import InputError, visible
from rankfold.files.folder import written


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
