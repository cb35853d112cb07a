"""What runs that were killed have left behind, and what becomes of it."""

from __future__ import annotations

import os
from pathlib import Path

from rankfold.errors import InputError, visible
from rankfold.files.durable import DRAFT, PREFIX
from rankfold.files.locks import lock_now
from rankfold.files.owned import (
    ABOUT,
    LOCK,
    Owned,
    dead,
    described,
    hidden_of,
    owner,
    real_path,
)


def clean_leftovers(folder: Path) -> list[str]:
    """Put right what dead runs have left in a folder, and beside it where it is an output.

    A line each says what became of it. What a living run is at is left alone.

    Raises:
        InputError: Neither the folder nor a leftover of it is there.
    """
    real = real_path(folder)
    own = hidden_of(real)
    found = [own] if os.path.lexists(own) else []
    if real.is_dir():
        found += sorted(one for one in real.iterdir() if one.name.startswith(PREFIX))
    elif not found:
        raise InputError(f"there is no folder {visible(folder)}, and no run has left one there.")
    lines: list[str] = []
    for hidden in found:
        try:
            lines += _cleaned(hidden) if hidden.is_dir() else _cleaned_draft(hidden)
        except OSError as error:
            lines.append(f"left alone: {visible(hidden)}: {visible(error)}")
    return lines


def _cleaned(hidden: Path) -> list[str]:
    content = {one.name for one in hidden.iterdir()}
    told = described(hidden)
    if ABOUT not in content and content - {LOCK, f"{ABOUT}.new"}:
        return [f"left alone: {visible(hidden)}: nothing in it says what it is"]
    left = dead(hidden)
    if left is None:
        return [
            f"left alone: {visible(hidden)}: a run{owner(hidden)} is writing "
            f"{visible(told.get('name', 'there'))}"
        ]
    try:
        if "name" in told:
            left.put_right()
    finally:
        left.give_up()
    return left.said or [_removed(left)]


def _cleaned_draft(draft: Path) -> list[str]:
    """Of a file that ``write_whole`` began."""
    if draft.suffix != DRAFT or not draft.is_file() or draft.is_symlink():
        return [f"left alone: {visible(draft)}: it is nothing that a run writes"]
    with draft.open("rb") as opened:
        if not lock_now(opened.fileno()):
            return [f"left alone: {visible(draft)}: a run is writing it"]
        if os.name != "nt":  # which removes no open file
            draft.unlink()
    draft.unlink(missing_ok=True)
    return [f"removed {visible(draft)}: a run that was killed had left it"]


def _removed(left: Owned) -> str:
    return f"removed {visible(left.beside)}: a run that was killed had left it"
