"""What is asked of a certificate: test, margin, confidence. The command line's help needs no more.

Nothing here imports torch, which takes seconds.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, TypeAlias, get_args

from rankfold.errors import InputError, check_kind

TestName: TypeAlias = Literal["bounded", "t", "betting"]

TESTS: tuple[TestName, ...] = get_args(TestName)

DEFAULT_MARGIN = 0.01  # nats of mean loss: a perplexity 1 % higher

DEFAULT_CONFIDENCE = 0.95

ACCURACY = "accuracy"


def check_margin(margin: float) -> float:
    """The margin; one that is negative, not finite or no number is refused.

    Raises:
        InputError: As said.
    """
    expected = "a number, 0 or more, in nats of mean loss (default 0.01)"
    check_kind("the margin", margin, Real, expected)
    if not (math.isfinite(margin) and margin >= 0):
        raise InputError(f"the margin is {margin}; expected {expected}.")
    return margin


def check_metric_margin(name: str, margin: float) -> None:
    """Refuse a metric's margin outside [0, 1).

    Raises:
        InputError: As said.
    """
    if not 0 <= margin < 1:
        raise InputError(
            f"the margin of {name} is {margin}; expected a share from 0 to below 1 (0.01 lets 1 "
            "percentage point be lost)."
        )
