"""One-sided confidence bounds of a mean: the certificate's own maths, on plain arrays.

Three tests of "the mean is at least m" on independent units, each inverted to an upper bound:

* ``t_bound``: Student's t. Sharp, and right only where the mean is nearly normal.
* ``bounded_bound``: any distribution whose values are at most a stated ``top``. It is the Bayesian
  bootstrap (Rubin 1981) with one more observation at ``top``; for values of 0 and 1 it is Clopper
  and Pearson's exact bound. Validity: conjectured by Gaffke (2005) and by Learned-Miller and
  Thomas (2020, arXiv 1905.06208), proof reported in 2026 by Vlassis and Thomas.
* ``BettingTest``: the same promise at any time, so that a test may stop early. A gambler's wealth
  that is fair or worse while the mean is at least m exceeds 1/alpha with chance alpha at most
  (Ville 1939; Waudby-Smith and Ramdas 2024).

Every unit has a weight (its number of terms). The mean is then the ratio of sums, and what is
tested is that weight * (value - m) has a mean of 0 or more.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rankfold.certificate.quantiles import beta_quantile, chance_of_heads, student_quantile

Array: TypeAlias = NDArray[np.float64]

# Nodes of the integral in ``_chance_positive``: the trapezoid rule in v for t = width * sinh(v).
_NODES = np.arange(0.0, 30.0, 0.1)
_STEEPEST = 30  # bisections for the place that the integral runs through


def mean_and_error(values: Array, weights: Array) -> tuple[float, float]:
    """Mean of ``(n,)`` values by ``(n,)`` weights, and its standard error (n of 2 or more)."""
    shares = weights / weights.sum()
    mean = float((shares * values).sum())
    n = len(values)
    spread = float((np.square(shares * (values - mean))).sum())
    return mean, math.sqrt(spread * n / (n - 1))


def t_bound(values: Array, weights: Array, confidence: float) -> float:
    """Student's one-sided upper bound of the mean; assumes that the mean is nearly normal.

    Args:
        values: ``(n,)``, n of 2 or more.
        weights: ``(n,)``, positive.
        confidence: Between .5 and 1.
    """
    mean, error = mean_and_error(values, weights)
    return mean + student_quantile(confidence, len(values) - 1) * error


def bounded_bound(
    values: Array, weights: Array, confidence: float, top: float, most: float | None = None
) -> float:
    """Upper bound of the mean of values that are at most ``top``, of any distribution.

    A value above ``top`` is counted in full and moves the top up to itself. That can only raise
    the bound, so it remains right for the mean of the values cut at the stated top.

    Args:
        values: ``(n,)``, n of 1 or more.
        weights: ``(n,)``, positive.
        confidence: Between .5 and 1.
        top: Stated before the values were seen.
        most: Largest weight that a unit can have; None for the largest one here.
    """
    top = max(top, float(values.max()))
    most = float(weights.max()) if most is None else most

    def excess(mean: float) -> float:
        return float(mean_p_value(values, weights, mean, top, most)) - (1 - confidence)

    low = float((weights * values).sum() / weights.sum())
    if top - low <= 1e-15 * max(1.0, abs(top)):
        return top
    if excess(low) <= 0:  # the mean itself is a bound only where hardly anything varies
        return low
    # Here, since most commands bound nothing and would wait for it.
    from scipy.optimize import brentq

    return float(brentq(excess, low, top, xtol=1e-12 * max(1.0, abs(top)), rtol=1e-12))


def mean_p_value(
    values: Array,
    weights: Array,
    mean: float | Array,
    top: float | Array,
    most: float | Array,
) -> Array:
    """Chance under the bounded test of data as low as these if the true mean were ``mean``.

    Args:
        values: ``(..., n)``, each at most ``top``.
        weights: ``(..., n)``.
        mean: The mean to be refuted from below; a number or ``(...)``.
        top: The largest value, likewise.
        most: The largest weight, likewise.

    Returns:
        ``(...)`` P values: at most alpha with chance alpha at most, where the mean is ``mean`` or
        more.
    """
    gains = weights * (values - np.asarray(mean)[..., None])
    ceiling = np.broadcast_to(most * (np.asarray(top) - mean), gains.shape[:-1])
    return _chance_positive(np.concatenate([gains, ceiling[..., None]], axis=-1))


def _chance_positive(factors: Array) -> Array:
    """P(sum of factors * independent exponentials > 0), for ``(..., n)`` factors.

    With M(u) = prod 1/(1 - u f) this is the integral of M(u)/u over a vertical line through a
    point between 0 and 1/max(f), divided by 2 pi i. The line goes through the saddle point, where
    nothing oscillates; t = width * sinh(v) makes the trapezoid rule converge geometrically.
    """
    largest = factors.max(-1)
    shape = largest.shape
    out = np.where(largest > 0, 1.0, 0.0)
    open_ = (largest > 0) & (factors.min(-1) < 0)
    if not open_.any():
        return out
    f = factors[open_] / largest[open_][..., None]  # (m, n), largest 1
    low, high = np.full(len(f), -30.0), np.full(len(f), 30.0)
    for _ in range(_STEEPEST):  # the derivative of log(M(u)/u) rises: bisect it in logit(u)
        middle = (low + high) / 2
        place = 1 / (1 + np.exp(-middle))
        # 1 - u f, exactly 1 - u where f is 1, without cancellation near u = 1
        rest = (1 - f) + f / (1 + np.exp(middle))[:, None]
        rising = (f / rest).sum(-1) - 1 / place > 0
        low, high = np.where(rising, low, middle), np.where(rising, middle, high)
    place = 1 / (1 + np.exp(-middle))  # (m,)
    rest = (1 - f) + f / (1 + np.exp(middle))[:, None]
    ratio = f / rest  # (m, n)
    level = -np.log(rest).sum(-1) - np.log(place)
    width = 1 / np.sqrt(np.square(ratio).sum(-1) + 1 / np.square(place))
    total = np.zeros(len(f))
    for v in _NODES:
        t = width * math.sinh(v)  # (m,)
        tilt = t[:, None] * ratio  # 1 - (u + it) f = rest * (1 - i tilt)
        size = -0.5 * np.log1p(np.square(tilt)).sum(-1) - 0.5 * np.log1p(np.square(t / place))
        angle = np.arctan(tilt).sum(-1) - np.arctan(t / place)
        step = width * math.cosh(v) * (0.5 if v == 0 else 1.0)
        total += step * np.exp(size) * np.cos(angle)
        if v > 1 and bool(((size + math.log(math.cosh(v))) < -35).all()):
            break
    spacing = float(_NODES[1] - _NODES[0])
    out[open_] = np.clip(np.exp(level) * total * spacing / math.pi, 0.0, 1.0)
    return out.reshape(shape)


def share_bound(count: int, n: int, confidence: float) -> float:
    """Clopper and Pearson's exact upper bound of a share, from ``count`` of ``n``."""
    return 1.0 if count >= n else beta_quantile(confidence, count + 1, n - count)


def mcnemar_p_value(lost: int, won: int) -> float:
    """Exact one-sided P value against "no more is lost than won" (McNemar 1947).

    Args:
        lost: Units that only the original has right.
        won: Units that only the other has right.
    """
    if lost + won == 0:
        return 1.0
    return chance_of_heads(lost, lost + won)


class BettingTest:
    """Sequential tests of "the mean is at least m", for several m at once.

    Attributes:
        means: ``(k,)`` the means under test.
        wealth: ``(k,)`` logarithm of the largest wealth so far; m is refuted at
            ``log(1 / (1 - confidence))``.
        units: Units seen.
    """

    def __init__(self, means: Array, top: float, most: float, guess: float, spread: float) -> None:
        """Start with a wealth of 1 against each mean.

        Args:
            means: ``(k,)``, each below ``top``.
            top: No value is above it; stated before the values were seen.
            most: Largest weight of a unit.
            guess: Expected value, for the first bets; any number is valid.
            spread: Expected standard deviation, likewise.
        """
        self.means, self.top, self.most = means, top, most
        self.wealth = np.zeros(len(means))
        self.units = 0
        self._now = np.zeros(len(means))
        self._count = 4.0  # as if the guesses came from so many units
        self._sum = 4.0 * guess
        self._squares = 4.0 * max(spread * spread, 1e-24)
        self._centre = guess

    def add(self, values: Array, weights: Array) -> None:
        """Bet on the next ``(n,)`` units, in their order; values above the top lose all."""
        for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
            mean = self._sum / self._count
            variance = self._squares / self._count
            edge = np.maximum(self.means - mean, 0.0)
            # Kelly's fraction to second order, at most nine tenths of what the worst case allows
            fraction = np.minimum(
                edge / (variance + np.square(edge)), 0.9 / (self.top - self.means)
            )
            gain = fraction * (weight / self.most) * (self.means - value)
            with np.errstate(divide="ignore"):
                self._now = self._now + np.log(np.maximum(1 + gain, 0.0))
            self.wealth = np.maximum(self.wealth, self._now)
            self._count += 1
            self._sum += value
            self._squares += (value - mean) ** 2
            self.units += 1

    def bound(self, confidence: float) -> float:
        """The smallest mean above all those that are not refuted, or the top."""
        kept = np.nonzero(self.wealth < math.log(1 / (1 - confidence)))[0]
        place = 0 if len(kept) == 0 else int(kept[-1]) + 1
        return self.top if place == len(self.means) else float(self.means[place])
