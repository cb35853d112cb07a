"""What is stated before held-out data is opened."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from rankfold.certificate.asked import ACCURACY as ACCURACY
from rankfold.certificate.asked import (
    DEFAULT_CONFIDENCE,
    TESTS,
    check_margin,
    check_metric_margin,
)
from rankfold.certificate.asked import DEFAULT_MARGIN as DEFAULT_MARGIN
from rankfold.certificate.asked import TestName as TestName
from rankfold.certificate.change import Change
from rankfold.certificate.quantiles import student_quantile
from rankfold.data.parts import Part
from rankfold.errors import InputError

# The range of the bounded tests is the selection examples' mean +- REACH * n^(1/3) standard
# deviations, n held-out units: at 16 to 128 units the bound is then 1.2 times the t interval
# (1.1 times at 10,000), and it is as careful as that allows. benchmarks/coverage.py measures it.
REACH = 2 / 3


@dataclass(frozen=True)
class Statement:
    """What is claimed and how it is tested, fixed before the held-out part is opened.

    Attributes:
        margin: Largest change of the mean loss that counts as no harm.
        confidence: Of each one-sided bound.
        test: ``bounded``, ``t`` or ``betting``.
        lowest: Lower end of the range in which one example's change counts; None for ``t``.
        highest: Upper end of it; None for ``t``.
        range_from: ``stated`` by the user, or from ``selection data``; None for ``t``.
        expected: Mean change on selection data; the betting test's first bets use it.
        deviation: Standard deviation of one example's change there, likewise.
        metric_margins: How much of each metric may be lost, by name; all must hold.

    Raises:
        InputError: A value is outside its range.
    """

    margin: float = DEFAULT_MARGIN
    confidence: float = DEFAULT_CONFIDENCE
    test: TestName = "bounded"
    lowest: float | None = None
    highest: float | None = None
    range_from: str | None = None
    expected: float = 0.0
    deviation: float = 1.0
    metric_margins: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        check_margin(self.margin)
        if not 0.5 < self.confidence < 1:
            raise InputError(
                f"the confidence is {self.confidence}; expected a number between 0.5 and 1."
            )
        if self.test not in TESTS:
            raise InputError(f"the test is {self.test!r}; expected one of {', '.join(TESTS)}.")
        if self.test != "t":
            ends = (self.lowest, self.highest)
            if None in ends or not all(math.isfinite(cast("float", e)) for e in ends):
                raise InputError(
                    f"the test {self.test} needs a finite range of one example's change, stated "
                    f"before the data is seen; it is {self.lowest} to {self.highest}."
                )
        for name, margin in self.metric_margins.items():
            check_metric_margin(name, margin)


def state(
    selection: Change,
    differences: Tensor,
    held_out: int,
    *,
    margin: float,
    confidence: float,
    test: TestName,
    largest_change: float | None,
    metric_margins: Mapping[str, float],
) -> Statement:
    """The statement for a model whose changes on selection data are known.

    Args:
        selection: Mean change on selection data.
        differences: ``(n,)`` changes of the selection examples.
        held_out: Units of the held-out part.
        margin: Stated by the user.
        confidence: Likewise.
        test: Likewise.
        largest_change: Range of one example's change, or None for one from selection data.
        metric_margins: Stated by the user, by metric.
    """
    lowest: float | None
    highest: float | None
    if test == "t":
        lowest = highest = source = None
    elif largest_change is not None:
        lowest, highest, source = -largest_change, largest_change, "stated"
    else:
        reach = REACH * held_out ** (1 / 3) * selection.deviation
        # A model that is destroyed on selection data is refused once its held-out losses are seen.
        known = math.isfinite(selection.mean)
        mean, reach = (selection.mean, reach) if known else (0.0, 0.0)
        if not known:
            differences = torch.zeros(1)
        # A change up to the margin always counts in full.
        highest = max(mean + reach, float(differences.max()), margin)
        lowest = min(mean - reach, float(differences.min()), -margin)
        source = "selection data"
    return Statement(
        margin=margin,
        confidence=confidence,
        test=test,
        lowest=lowest,
        highest=highest,
        range_from=source,
        expected=selection.mean if math.isfinite(selection.mean) else 0.0,
        deviation=selection.deviation if math.isfinite(selection.deviation) else 1.0,
        metric_margins=dict(metric_margins),
    )


def half_width(
    deviation: float, units: int, confidence: float, test: TestName, reach: float | None = None
) -> float:
    """About how far above the mean a test's bound will lie, for planning.

    Args:
        deviation: Standard deviation of one unit's change.
        units: Number of units.
        confidence: Of the bound.
        test: Which test.
        reach: From the expected mean to the stated largest change; None for the range that
            selection data would give.
    """
    student = student_quantile(confidence, units - 1)
    if test == "t":
        return student * deviation / math.sqrt(units)
    if reach is None:
        reach = REACH * units ** (1 / 3) * deviation
    if test == "bounded":
        # The added observation at the top has a share of 1/(n + 1) on average, exponential.
        return reach / (units + 1) + student * math.hypot(
            deviation / math.sqrt(units), reach / units
        )
    needed = math.log(1 / (1 - confidence))
    return math.sqrt(2 * needed / units) * deviation + reach / units


def reach_of(change: float, statement: Statement) -> float | None:
    """From a mean change to the largest change stated by the user; None where none was."""
    if statement.range_from == "stated" and statement.highest is not None:
        return max(0.0, statement.highest - change)
    return None


def fewest_units(margin: float, largest_change: float, confidence: float) -> int | None:
    """Units below which no test can call even an unchanged model lossless.

    With n changes of 0, the bounded bound is ``largest * (1 - (1 - confidence)^(1/n))``, as
    Clopper and Pearson's: so many large losses may have been missed.

    Returns:
        The number, or None at a margin of 0, which only a gain can show.
    """
    if margin <= 0:
        return None
    if margin >= largest_change:
        return 1
    return math.ceil(math.log(1 - confidence) / math.log1p(-margin / largest_change))


def in_order_of_bets(part: Part) -> Part:
    """The examples in the order in which the betting test sees them: random, and chosen by nobody.

    Only their own digest decides it.
    """
    seed = int.from_bytes(hashlib.sha256(part.digest.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    return part.take(torch.randperm(len(part.examples), generator=generator).tolist())
