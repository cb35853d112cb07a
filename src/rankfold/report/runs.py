"""Several runs side by side: one row each, and what of them may be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankfold.errors import visible


@dataclass(frozen=True)
class Row:
    """One run among others.

    Attributes:
        name: Of its folder, or of its size.
        model: Class of the model.
        algorithm: That made it.
        parameters: Share kept of the whole model's parameters.
        bytes: Share kept of the bytes.
        loss: Of the original on its held-out part.
        change: Of the mean loss.
        standard_error: Of the change.
        lower_bound: Of the true change, one-sided.
        upper_bound: Likewise.
        confidence: Of each bound.
        margin: Up to which it counts as no harm.
        verdict: What held-out data say.
        unit: Of the losses.
        latency: How many times the original's time a call takes, by the size of the batch.
        held_out: Digest of the whole held-out part.
        original: Digest of the original model, None where no certificate says it.
    """

    name: str
    model: str
    algorithm: str
    parameters: float
    bytes: float
    loss: float
    change: float
    standard_error: float
    lower_bound: float
    upper_bound: float
    confidence: float
    margin: float
    verdict: str
    unit: str
    latency: dict[int, float]
    held_out: str
    original: str | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "latency": {str(size): x for size, x in self.latency.items()}}


def row_of(
    name: str,
    manifest: Mapping[str, Any],
    certificate: Mapping[str, Any] | None,
    latency: Mapping[str, Any] | None,
) -> Row:
    """The row of a run.

    Args:
        name: What it is called here.
        manifest: The content of ``rankfold.json``, or ``Result.report``.
        certificate: The content of ``certificate.json``, None where there is none.
        latency: As measured by the run, None where it measured none.
    """
    found, before, after = manifest["certificate"], manifest["original"], manifest["factorized"]
    model = manifest.get("model", {}).get("class") or (certificate or {})["models"]["class"]
    return Row(
        name=visible(name),
        model=visible(str(model).rpartition(".")[2]),
        algorithm=manifest["algorithm"],
        parameters=manifest["ratio"],
        bytes=after["bytes"] / before["bytes"] if before["bytes"] else 1.0,
        loss=manifest["loss"]["original"],
        change=found["change"],
        standard_error=found["standard_error"],
        lower_bound=found["lower_bound"],
        upper_bound=found["upper_bound"],
        confidence=found["confidence"],
        margin=found["margin"],
        verdict=found["verdict"],
        unit=found["unit"],
        latency={row["batch"]: row["ratio"] for row in (latency or {"rows": []})["rows"]},
        held_out=manifest["data"]["held_out"]["digest"],
        original=None if certificate is None else certificate["models"]["original"],
    )


def groups(rows: Sequence[Row]) -> list[str]:
    """A letter for each row: rows of one letter have the same original and held-out part.

    Only their losses may be compared.
    """
    keys = [(row.original, row.held_out, row.unit) for row in rows]
    known = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return [_letter(known[key]) for key in keys]


def comparison_lines(rows: Sequence[Row]) -> list[str]:
    """What a person has to know before comparing these rows."""
    letters = groups(rows)
    lines = []
    for letter in sorted({*letters} - {"A"}, key=letters.index):
        first, other = rows[0], rows[letters.index(letter)]
        differ = [
            what
            for what, one, another in (
                ("another original", first.original, other.original),
                ("other held-out data", first.held_out, other.held_out),
                ("another unit of the loss", first.unit, other.unit),
            )
            if one != another
        ]
        lines.append(
            f"{letter} has {' and '.join(differ)} than A: its changes of the loss can't be "
            "compared with those of A"
        )
    if len({row.margin for row in rows}) > 1:
        lines.append("the margins differ: a verdict speaks of its own run's margin")
    if len({row.confidence for row in rows}) > 1:
        lines.append("the confidences differ: each bound has its own run's confidence")
    return lines


def multiplicity_line(rows: Sequence[Row]) -> str | None:
    """What choosing among runs on one held-out part does to their confidence."""
    letters = groups(rows)
    most = max((letters.count(letter) for letter in letters), default=0)
    if most < 2:
        return None
    letter = max(letters, key=letters.count)
    mine = [row for row, one in zip(rows, letters, strict=True) if one == letter]
    chance = min(1.0, math.fsum(1 - row.confidence for row in mine))
    return (
        f"{most} of these runs were judged on one held-out part: the best of them is falsely "
        f"lossless with a chance of up to {100 * chance:.3g} %"
    )


def _letter(place: int) -> str:
    found = ""
    place += 1
    while place:
        place, rest = divmod(place - 1, 26)
        found = chr(ord("A") + rest) + found
    return found
