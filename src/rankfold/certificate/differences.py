"""Where two certificates of the same evidence differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rankfold.certificate.certify import Certificate

EXACT = 1e-9  # relative: the same arithmetic on the same numbers, in any order of sums


def differences(stated: object, found: Certificate, tolerance: float) -> list[str]:
    """Fields that differ, numbers by more than a tolerance; verdicts may only on the boundary.

    Args:
        stated: A certificate as plain values.
        found: Computed again.
        tolerance: Absolute; 0 where it was computed from the same numbers.
    """
    if not isinstance(stated, Mapping):
        return ["it is missing"]
    fresh = found.as_dict()
    problems = [f"{key} is unknown" for key in stated if key not in fresh]
    for key, value in fresh.items():
        if key in ("needed", "above", "share_above") and tolerance:
            continue  # counts that move with the last digit
        if key == "verdict" and _on_boundary(found, tolerance):
            continue
        if key == "metrics":
            problems += _metric_problems(stated.get(key), value, tolerance)
        elif key == "guard" and found.guard is not None:
            of_guard = differences(stated.get(key), found.guard, tolerance)
            problems += [f"of other kinds, {problem}" for problem in of_guard]
        elif not _close(stated.get(key), value, tolerance):
            problems.append(f"{key}: {stated.get(key)!r} stated, {value!r} found")
    return problems


def _on_boundary(found: Certificate, tolerance: float) -> bool:
    """Whether a verdict, the certificate's or that of its guard, hangs on the last digits."""
    near = min(
        abs(found.upper_bound),
        abs(found.upper_bound - found.margin),
        abs(found.lower_bound - found.margin),
    )
    return near <= tolerance or (found.guard is not None and _on_boundary(found.guard, tolerance))


def _metric_problems(stated: object, found: list[dict[str, Any]], tolerance: float) -> list[str]:
    if not isinstance(stated, list) or len(stated) != len(found):
        return ["metrics: other ones stated"]
    # A token or image on the edge may count otherwise on another machine.
    slack = 100 * tolerance
    return [
        f"{new['name']} {key}: {old.get(key)!r} stated, {value!r} found"
        for old, new in zip(stated, found, strict=True)
        for key, value in new.items()
        if not (key in ("p_value", "verdict") and tolerance)
        and not (isinstance(old, Mapping) and _close(old.get(key), value, slack))
    ]


def _close(stated: object, found: object, tolerance: float) -> bool:
    numbers = (int, float)
    if (
        isinstance(stated, numbers)
        and isinstance(found, numbers)
        and not isinstance(stated, bool)
        and not isinstance(found, bool)
    ):
        return math.isclose(stated, found, rel_tol=EXACT, abs_tol=max(tolerance, 1e-12))
    if isinstance(found, tuple):
        found = list(found)
    return stated == found
