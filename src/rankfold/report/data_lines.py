"""What became of a user's data, in words, in two steps that follow each other.

Of each source: which of its records (or lines, files) are examples, and why others are none
(``rankfold.data.account``). Then of those examples: which a run uses, and why not the others
(``Part.usage``). Nothing is counted in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def source_lines(report: Mapping[str, Any]) -> list[str]:
    """What became of each source that the data were read from, as a report has it."""
    entries = report.get("sources")
    found = [*entries] if isinstance(entries, list) else []
    guard = report.get("guard")
    found += [guard] if isinstance(guard, dict) else []
    told = [entry.get("told") for entry in found if isinstance(entry, dict)]
    lines = [line for some in told if isinstance(some, list) for line in some]
    return [line for line in lines if isinstance(line, str)]


def data_lines(report: Mapping[str, Any]) -> list[str]:
    """A line for the data, and for each part of which examples or columns are left out.

    Args:
        report: Of a run (``rankfold.json``), or of an evaluation.
    """
    parts = {
        f"the {name.replace('_', '-')} part": part for name, part in report.get("data", {}).items()
    }
    if (guard := report.get("guard")) is not None:
        parts["the examples of other kinds"] = guard
    lines: list[str] = []
    for where, entry in {"the data": report, **parts}.items():
        reasons = entry.get("left_out") or {}
        if reasons:
            listed = "; ".join(
                reason if count is None else f"{count:,} {reason}"
                for reason, count in reasons.items()
            )
            lines.append(f"left out of {where}: {listed}")
    columns = {
        column
        for entry in (report, *parts.values())
        for column in entry.get("columns_left_out") or ()
    }
    if columns:
        names = ", ".join(sorted(columns))
        lines.append(f"columns left out of every example: {names}")
    lines += [
        f"{where} is of a data set that draws its examples anew at each reading (random crops, "
        "say): those drawn first are used, and verify can't find them again"
        for where, entry in parts.items()
        if entry.get("drawn_anew")
    ]
    return lines
