"""What of a user's data is not used, and why, and what else is to be known of it, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def data_lines(report: Mapping[str, Any]) -> list[str]:
    """A line for the data, and for each part of which examples or columns are left out.

    Args:
        report: Of a run (``rankfold.json``), or of an evaluation.
    """
    parts = {
        f"the {name.replace('_', '-')} part": part for name, part in report.get("data", {}).items()
    }
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
