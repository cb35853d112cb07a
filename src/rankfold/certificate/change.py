"""Paired changes of losses, and their weighted mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.certificate.quantiles import student_quantile
from rankfold.tasks.evaluation import Evaluation


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
        return student_quantile(confidence, self.examples - 1)

    @property
    def deviation(self) -> float:
        """Standard deviation of one example's change."""
        return self.standard_error * math.sqrt(self.examples)


def paired_change(original: Evaluation, changed: Evaluation) -> Change:
    """Change between two evaluations of the same examples.

    Both are weighted by the examples' terms (a ratio estimator; for windows of one length it is
    the plain mean of the paired differences and the t test's standard error).

    Raises:
        ValueError: The evaluations are not of the same examples.
    """
    check_pairs(original, changed)
    return weighted_mean(changed.losses - original.losses, original.terms)


def check_pairs(original: Evaluation, changed: Evaluation) -> None:
    """Refuse evaluations of different examples.

    Raises:
        ValueError: As said.
    """
    if len(original.losses) != len(changed.losses):
        raise ValueError(
            f"the two evaluations are of different examples: {len(original.losses)} and "
            f"{len(changed.losses)} of them"
        )
    if not torch.equal(original.terms, changed.terms):
        raise ValueError("the two evaluations are of different examples")


def weighted_mean(values: Tensor, weights: Tensor) -> Change:
    """Mean of per-example values weighted by the examples' terms, with its standard error.

    Args:
        values: ``(n,)`` float64, n of 2 or more.
        weights: ``(n,)`` float64.
    """
    shares = weights / weights.sum()
    mean = float((shares * values).sum())
    n = len(values)
    spread = float(
        (shares * (values - mean)).square().sum()
    )  # in torch: infinite values are let by
    return Change(mean, math.sqrt(spread * n / (n - 1)), n)
