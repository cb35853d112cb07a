"""A record of which held-out examples were opened, for which models.

Choosing among openings makes a false "lossless" more likely: each certificate says what came
before it. One JSON line an opening, in the user's state folder. ``RANKFOLD_OPENINGS`` names another
file, or is ``off``; the certificate then says that no record was kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "RANKFOLD_OPENINGS"
SHORT = 16  # hexadecimal digits of an example's digest that are kept


@dataclass(frozen=True)
class Opening:
    """One certificate that held-out examples were used for.

    Attributes:
        original: Digest of the original model's weights.
        models: Digests of the models that were tested, in order.
        examples: Short digests of the held-out examples.
        verdict: Of the last one that counts.
        seed: Of the run.
    """

    original: str
    models: tuple[str, ...]
    examples: tuple[str, ...]
    verdict: str
    seed: int


@dataclass(frozen=True)
class History:
    """Earlier openings of the same examples with other models.

    Attributes:
        kept: Whether openings are recorded on this machine.
        others: Certificates of other models of the same original on some of these examples.
        lossless: How many of them were shown better or lossless.
        shared: Examples of this part that at least one of them has used.
    """

    kept: bool
    others: int
    lossless: int
    shared: int


def record_file() -> Path | None:
    """Where openings are recorded, None where the user turned that off."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return None if named in ("off", "") else Path(named)
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "rankfold" / "openings"


def history(opening: Opening, known: Sequence[Opening] = ()) -> History:
    """What was opened before, by this process (``known``) and by others on this machine.

    The same models on the same examples are a repetition, not another try.
    """
    file = record_file()
    earlier = [*known, *([] if file is None else _read(file))]
    mine = set(opening.examples)
    others: dict[tuple[str, ...], Opening] = {}
    used: set[str] = set()
    for past in earlier:
        common = mine.intersection(past.examples)
        if past.original == opening.original and past.models != opening.models and common:
            others[past.models] = past
            used |= common
    shown = sum(past.verdict in ("better", "lossless") for past in others.values())
    return History(file is not None, len(others), shown, len(used))


def record(opening: Opening) -> bool:
    """Append an opening; False where that is turned off or the file can't be written."""
    file = record_file()
    if file is None:
        return False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(opening)) + "\n")
    except OSError:
        return False
    return True


def _read(file: Path) -> list[Opening]:
    """The openings on record; lines that are damaged are left out."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
            found.append(
                Opening(
                    original=str(entry["original"]),
                    models=tuple(entry["models"]),
                    examples=tuple(entry["examples"]),
                    verdict=str(entry["verdict"]),
                    seed=int(entry["seed"]),
                )
            )
        except (ValueError, KeyError, TypeError):
            continue
    return found
