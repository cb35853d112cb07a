"""Quantiles of the distributions that bounds are made of.

By ``scipy.special``, which ``scipy.stats`` calls for the same numbers and takes half as long as
torch to import: every command of the command line would wait for it.
"""

from __future__ import annotations

from scipy import special


def student_quantile(probability: float, freedom: int) -> float:
    """Of Student's t with so many degrees of freedom."""
    return float(special.stdtrit(freedom, probability))


def beta_quantile(probability: float, first: float, second: float) -> float:
    """Of the beta distribution with two parameters above 0."""
    return float(special.betaincinv(first, second, probability))


def chance_of_heads(least: int, throws: int) -> float:
    """Chance that a fair coin shows heads so often, or more often, in so many throws."""
    return 1.0 if least <= 0 else float(special.betainc(least, throws - least + 1, 0.5))
