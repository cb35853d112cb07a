"""A record of which held-out examples were opened, for which models.

Choosing among openings makes a false "lossless" more likely: each certificate says what came
before it. The record is a file in the user's state folder. ``RANKFOLD_OPENINGS`` names another
file, or is ``off``; the certificate then says that no record was kept. A record that can't be read
or written never counts as one that says nothing: the certificate says what is wrong with it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rankfold.certificate.openings_file import Found, Opening, append, locked, read
from rankfold.errors import visible

VARIABLE = "RANKFOLD_OPENINGS"
NAMED = 5  # damaged lines that a message names


@dataclass(frozen=True)
class History:
    """Earlier openings of the same examples with other models.

    Attributes:
        kept: Whether this opening is on a record on this machine.
        others: Certificates of other models of the same original on some of these examples.
        lossless: How many of them were shown better or lossless.
        shared: Examples of this part that at least one of them has used.
        trouble: Why the record couldn't be read or written; there may then be more than are told.
    """

    kept: bool
    others: int
    lossless: int
    shared: int
    trouble: str | None = None


def record_file() -> Path | None:
    """Where openings are recorded, None where the user turned that off.

    Raises:
        OSError: There is no place for them: nobody's home is known.
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        return None if named in ("off", "") else Path(named)
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        try:
            home = Path.home()
        except RuntimeError:
            home = Path()
        if not home.is_absolute() or os.environ.get("HOME") == "":
            raise OSError(f"no home folder is known; set {VARIABLE} to a file, or to off")
        state = home / ".local" / "state"
    return state / "rankfold" / "openings"


def record(opening: Opening, known: Sequence[Opening] = ()) -> History:
    """Put an opening on record; what came before, in this process (``known``) and in others.

    No other process writes between what is read and what is written, so of several at once each
    sees those before it. The same models on the same examples are a repetition, not another try.
    """
    try:
        file = record_file()
    except OSError as error:
        return _history(opening, known, False, f"the record of openings could not be kept: {error}")
    if file is None:
        return _history(opening, known, False, None)
    told: list[str] = []
    found, kept, alone = Found(), False, True
    with ExitStack() as lock:
        try:
            lock.enter_context(locked(file))
        except (OSError, ValueError) as error:
            alone = False
            told.append(f"could not be locked: {_reason(error)}")
        try:
            found = read(file, opening.original)
            told += _damaged(found)
            if opening not in found.openings:
                append(file, opening, found, alone=alone)
            kept = True
        except (OSError, ValueError) as error:
            done = "written" if found.lines else "read or written"
            told.append(f"could not be {done}: {_reason(error)}")
    where = f"the record of openings at {visible(file)} "
    trouble = where + ", and ".join(told) if told else None
    return _history(opening, [*known, *found.openings], kept, trouble)


def trouble_ahead() -> str | None:
    """What keeps an opening from being recorded whole, tried before there is one; None if nothing.

    No record that the user has turned off is none.
    """
    try:
        file = record_file()
    except OSError as error:
        return f"the record of openings can not be kept: {error}"
    if file is None:
        return None
    where = f"the record of openings at {visible(file)} "
    try:
        with locked(file):
            damaged = _damaged(read(file))
            if file.exists():
                with file.open("ab"):
                    pass
    except (OSError, ValueError) as error:
        return f"{where}can not be read and written: {_reason(error)}"
    return where + damaged[0] if damaged else None


def recorded_before(original: str, model: str) -> list[History]:
    """What came before each opening for a model that this machine has on record.

    Args:
        original: Digest of the original's weights.
        model: Digest of the model's.

    Raises:
        OSError: The record can't be read, or a line of it.
    """
    file = record_file()
    found = Found() if file is None else read(file, original)
    if found.damaged:
        raise OSError(_damaged(found)[0])
    return [
        _history(one, found.openings[:place], True, None)
        for place, one in enumerate(found.openings)
        if model in one.models
    ]


def _history(
    opening: Opening, earlier: Sequence[Opening], kept: bool, trouble: str | None
) -> History:
    mine = set(opening.examples)
    others: dict[tuple[str, ...], Opening] = {}
    used: set[str] = set()
    for past in earlier:
        if past.original != opening.original or past.models == opening.models:
            continue
        if common := mine.intersection(past.examples):
            others[past.models] = past
            used |= common
    shown = sum(past.verdict in ("better", "lossless") for past in others.values())
    return History(kept, len(others), shown, len(used), trouble)


def _damaged(found: Found) -> list[str]:
    if not found.damaged:
        return []
    numbers = ", ".join(map(str, found.damaged[:NAMED])) + ", ..." * (len(found.damaged) > NAMED)
    count = f"{len(found.damaged)} of {found.lines} lines"
    return [f"could not be read: {count} are damaged (numbers, from 1: {numbers})"]


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    return visible(reason or error)
