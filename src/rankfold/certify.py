"""A paired non-inferiority test on held-out data, and its certificate."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from scipy import stats
from torch import Tensor

from rankfold.errors import InputError
from rankfold.tasks import Evaluation

Verdict: TypeAlias = Literal["better", "lossless", "not shown", "worse"]


@dataclass(frozen=True)
class Change:
    """Mean paired change of the loss, factorized minus original.

    Attributes:
        mean: Mean over terms, in the task's unit.
        standard_error: Standard error of the mean; examples are the units of sampling.
        examples: Number of paired examples.
    """

    mean: float
    standard_error: float
    examples: int

    def upper_bound(self, confidence: float) -> float:
        """One-sided t bound: the true change is below it with this confidence."""
        return self.mean + self._quantile(confidence) * self.standard_error

    def lower_bound(self, confidence: float) -> float:
        """One-sided t bound: the true change is above it with this confidence."""
        return self.mean - self._quantile(confidence) * self.standard_error

    def _quantile(self, confidence: float) -> float:
        return float(stats.t.ppf(confidence, self.examples - 1))


def paired_change(original: Evaluation, changed: Evaluation) -> Change:
    """Change between two evaluations of the same examples.

    Both are weighted by the examples' terms (a ratio estimator; for windows of one length it is
    the plain mean of the paired differences and the t test's standard error).

    Raises:
        ValueError: The evaluations are not of the same examples.
    """
    if not torch.equal(original.terms, changed.terms):
        raise ValueError("the two evaluations are of different examples")
    return weighted_mean(changed.losses - original.losses, original.terms)


def weighted_mean(values: Tensor, weights: Tensor) -> Change:
    """Mean of per-example values weighted by the examples' terms, with its standard error.

    Args:
        values: ``(n,)`` float64, n of 2 or more.
        weights: ``(n,)`` float64.
    """
    shares = weights / weights.sum()
    mean = float((shares * values).sum())
    n = len(values)
    spread = float((shares * (values - mean)).square().sum())
    return Change(mean, math.sqrt(spread * n / (n - 1)), n)


@dataclass(frozen=True)
class Certificate:
    """What held-out data say about the factorized model.

    Attributes:
        verdict: ``better`` (upper bound below 0), ``lossless`` (upper bound at most the margin),
            ``worse`` (lower bound above the margin), else ``not shown``.
        change: Mean paired change of the loss, factorized minus original.
        standard_error: Of ``change``.
        upper_bound: One-sided upper confidence bound of the true change.
        lower_bound: One-sided lower confidence bound.
        margin: The largest change that counts as no harm, stated before the data was seen.
        unit: Unit of all of these.
        confidence: Confidence of each one-sided bound.
        examples: Number of held-out examples (sequences, images).
        data_digest: SHA-256 of the held-out examples.
        method: Name of the test and what it assumes.
    """

    verdict: Verdict
    change: float
    standard_error: float
    upper_bound: float
    lower_bound: float
    margin: float
    unit: str
    confidence: float
    examples: int
    data_digest: str
    method: str = (
        "paired t, one-sided; assumes independent examples and a nearly normal mean difference"
    )

    @property
    def holds(self) -> bool:
        """Whether the factorized model is shown to be no worse than the margin allows."""
        return self.verdict in ("better", "lossless")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def certify(
    original: Evaluation,
    factorized: Evaluation,
    *,
    margin: float,
    confidence: float,
    unit: str,
    data_digest: str,
) -> Certificate:
    """Compare two models on held-out examples that nothing was tuned on.

    Raises:
        InputError: The margin is negative or the confidence is not between .5 and 1.
    """
    check_margin(margin)
    if not 0.5 < confidence < 1:
        raise InputError(f"the confidence is {confidence}; expected a number between 0.5 and 1.")
    change = paired_change(original, factorized)
    upper, lower = change.upper_bound(confidence), change.lower_bound(confidence)
    return Certificate(
        verdict=_verdict(upper, lower, margin),
        change=change.mean,
        standard_error=change.standard_error,
        upper_bound=upper,
        lower_bound=lower,
        margin=margin,
        unit=unit,
        confidence=confidence,
        examples=change.examples,
        data_digest=data_digest,
    )


def check_margin(margin: float) -> None:
    """Refuse a margin that is negative or not finite.

    Raises:
        InputError: As said.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise InputError(
            f"the margin is {margin}; expected 0 or more, in nats of mean loss (default 0.01)."
        )


def _verdict(upper: float, lower: float, margin: float) -> Verdict:
    if upper < 0:
        return "better"
    if upper <= margin:
        return "lossless"
    return "worse" if lower > margin else "not shown"
