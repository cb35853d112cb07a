"""The multiple-choice knapsack: one choice of each group, the lowest total value within a weight.

Three steps, each exact about what it leaves open:

1. *Price.* At a price of weight each group takes the choice with the lowest value + price x weight.
   The price at which the limit is just kept solves the linear relaxation (its plans are the
   vertices of the groups' lower convex hulls) and gives a bound that no plan beats.
2. *Reduced values.* At that price each choice has a reduced value, what it loses against its
   group's best. A plan's value is the bound, plus its reduced values, plus the price of the weight
   that it leaves unused. So a choice whose reduced value alone exceeds what the best plan known
   loses is in no better plan.
3. *Core.* The few choices that remain are enumerated group by group, those with the nearest
   alternatives first, keeping for each weight only the lowest value, and only what could still beat
   the best plan known (a minimal core as of Pisinger 1995). Each partial plan, completed with the
   best choices at the price, is a whole plan, so the best plan known improves and the core shrinks
   on the way. Should there be more partial plans than asked for, the least promising are left out,
   and what the best of these may reach is the bound.

All steps are deterministic: limits count partial plans, never seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]
Group: TypeAlias = tuple[NDArray[Any], NDArray[Any]]  # weights (n,), values (n,)

# Share of the sums below which two values count as equal: what adding in another order changes.
ROUNDING = 1e-12

# Pairs of a partial plan and a next choice that are looked at, for each partial plan that is kept.
PAIRS_PER_STATE = 10

# Other prices, as changes of the price by a share of it, that bound what a partial plan may reach.
_POWERS = 2.0 ** np.arange(-8, 1)
SHIFTS = np.concatenate([-_POWERS, [0.0], _POWERS, [4.0, 16.0]])


@dataclass(frozen=True)
class Solution:
    """A plan and what no plan can beat.

    Attributes:
        picks: Position of each group's choice.
        bound: No plan within the limit has a lower total value, up to ``ROUNDING`` of the sums.
        optimal: Whether the plan itself is proven to have the lowest total value.
    """

    picks: list[int]
    bound: float
    optimal: bool


def undominated(weights: NDArray[Any], values: NDArray[Any]) -> Integers:
    """Positions of the choices that no other one beats, in order of rising weight.

    Args:
        weights: ``(n,)``.
        values: ``(n,)``.

    Returns:
        ``(m,)`` positions: rising weight, falling value; of equal choices the first.
    """
    order = np.lexsort((values, weights))
    ordered = values[order]
    lowest = np.minimum.accumulate(ordered)
    keep = np.ones(len(order), dtype=bool)
    keep[1:] = ordered[1:] < lowest[:-1]
    return order[keep]


def hull(weights: NDArray[Any], values: NDArray[Any]) -> Integers:
    """Positions of the vertices of the lower convex hull, from the lightest to the lowest value.

    Args:
        weights: ``(n,)``.
        values: ``(n,)``.
    """
    vertices: list[int] = []
    for at in undominated(weights, values).tolist():
        while len(vertices) > 1:
            before, last = vertices[-2:]
            # The last vertex stays while the way over it is the steeper one first.
            if (values[last] - values[before]) * (weights[at] - weights[last]) < (
                values[at] - values[last]
            ) * (weights[last] - weights[before]):
                break
            vertices.pop()
        vertices.append(at)
    return np.array(vertices)


def solve(groups: Sequence[Group], limit: float, states: int) -> Solution:
    """The choice of each group that gives the lowest total value within a total weight.

    Args:
        groups: Weights and values of each group's choices: finite, of any sign, in any order.
            Integers are taken to be exact, and whole multiples of their greatest common divisor.
        limit: Largest total weight. One that no plan keeps counts as the lightest plan's weight.
        states: Most partial plans kept from group to group; with 0 the last step is left open.
    """
    if not groups:
        return Solution([], 0.0, optimal=True)
    kept = [undominated(weights, values) for weights, values in groups]
    sizes = [len(positions) for positions in kept]
    starts = np.cumsum([0, *sizes[:-1]])
    weights = np.concatenate([w[positions] for (w, _), positions in zip(groups, kept, strict=True)])
    values = np.concatenate([v[positions] for (_, v), positions in zip(groups, kept, strict=True)])
    weight_step, value_step = _step(weights), _step(values)
    if weight_step and np.isfinite(limit):
        limit = limit // weight_step * weight_step
    table = _Table(
        weights.astype(np.float64),
        values.astype(np.float64),
        np.repeat(np.arange(len(groups)), sizes),
    )
    limit = max(limit, float(table.weights[starts].sum()))
    relaxed = _relax(table, starts, limit)
    scale = np.abs(table.values[relaxed.picks]).sum() + relaxed.lost
    rounding = ROUNDING * float(scale)
    picks = _filled(table, relaxed.picks, relaxed.left)
    picks, unseen = _search_core(table, relaxed, picks, states, value_step / 2 or rounding)
    picks = _filled(table, picks, limit - float(table.weights[picks].sum()))
    total = table.values[picks].sum()
    bound = table.values[relaxed.picks].sum() - relaxed.lost + unseen - rounding
    if value_step:
        bound = np.ceil(bound / value_step) * value_step
    optimal = bool(bound >= total)
    return Solution(
        picks=[
            int(positions[pick - start])
            for positions, pick, start in zip(kept, picks, starts, strict=True)
        ],
        bound=float(total if optimal else bound),
        optimal=optimal,
    )


def _step(numbers: NDArray[Any]) -> int:
    """Greatest common divisor of integers, 0 for floats."""
    return int(np.gcd.reduce(numbers)) if np.issubdtype(numbers.dtype, np.integer) else 0


@dataclass(frozen=True)
class _Table:
    """The undominated choices of all groups, in order of group and rising weight: ``(n,)`` each."""

    weights: Floats
    values: Floats
    owners: Integers

    def over(self, picks: Integers) -> tuple[Floats, Floats]:
        """Each choice's extra weight and extra value over the pick of its group."""
        at = picks[self.owners]
        return self.weights - self.weights[at], self.values - self.values[at]


@dataclass(frozen=True)
class _Relaxed:
    """The best plan at a price of weight.

    Attributes:
        picks: ``(groups,)`` positions in the table.
        left: What it leaves of the limit.
        price: Value that the linear relaxation pays for a unit of weight.
    """

    picks: Integers
    left: float
    price: float

    @property
    def lost(self) -> float:
        """How far the plan is from the bound: the price of the weight that it leaves unused."""
        return self.price * self.left if self.price else 0.0


def _relax(table: _Table, starts: Integers, limit: float) -> _Relaxed:
    """The linear relaxation: the price between a plan that keeps the limit and one that does not.

    The price at which both are as good is tried; a plan that is better there takes the place of
    one of them.
    """
    light, heavy = starts, np.append(starts[1:], len(table.weights)) - 1

    def total(numbers: Floats, picks: Integers) -> float:
        return float(numbers[picks].sum())

    if total(table.weights, heavy) <= limit:
        return _Relaxed(heavy, limit - total(table.weights, heavy), 0.0)
    while True:
        saved = total(table.values, light) - total(table.values, heavy)
        price = saved / (total(table.weights, heavy) - total(table.weights, light))
        priced = table.values + price * table.weights
        lowest = np.flatnonzero(priced == np.minimum.reduceat(priced, starts)[table.owners])
        found = lowest[np.searchsorted(lowest, starts)]  # the lightest of each group's best
        weight = total(table.weights, found)
        if not total(table.weights, light) < weight < total(table.weights, heavy):
            return _Relaxed(light, limit - total(table.weights, light), price)
        if weight <= limit:
            light = found
        else:
            heavy = found


def _filled(table: _Table, picks: Integers, left: float) -> Integers:
    """Spend what is left on any choices that still fit, the largest gain first."""
    picks = picks.copy()
    extras, gains = table.over(picks)
    open_ = np.flatnonzero((extras <= left) & (gains < 0))
    while len(open_):
        best = open_[np.argmin(gains[open_])]
        left -= float(extras[best])
        picks[table.owners[best]] = best
        at = picks[table.owners[open_]]
        extras[open_] = table.weights[open_] - table.weights[at]
        gains[open_] = table.values[open_] - table.values[at]
        open_ = open_[(extras[open_] <= left) & (gains[open_] < 0)]
    return picks


def _search_core(
    table: _Table, relaxed: _Relaxed, picks: Integers, states: int, resolution: float
) -> tuple[Integers, float]:
    """Look for a better plan among the choices that may be in one.

    Args:
        table: All choices.
        relaxed: The best plan at the price.
        picks: The best plan known.
        states: Most partial plans kept.
        resolution: Differences of total value below this are none.

    Returns:
        The best plan found, and what the plans that were left out lose against the relaxed bound,
        at least; infinite when none of them is better.
    """
    extras, gains = table.over(relaxed.picks)
    reduced = np.maximum(gains + relaxed.price * extras, 0.0)
    known = relaxed.lost + float((table.values[picks] - table.values[relaxed.picks]).sum())
    core = _core_groups(table.owners, reduced, known - resolution)
    shifts = relaxed.price * SHIFTS
    rests = _rests([(reduced[group] + shifts[:, None] * extras[group]).min(1) for group in core])
    weight, loss = np.zeros(1), np.zeros(1)  # of partial plans, over the relaxed one
    trail: list[tuple[Integers, Integers]] = []
    best: tuple[int, int] | None = None  # length of the trail, partial plan
    unseen = np.inf
    for stage, group in enumerate(core):
        most = _threshold(loss, reduced[group], known - resolution, PAIRS_PER_STATE * states)
        unseen = min(unseen, most)
        parents, children = _pairs(loss, reduced[group], most)
        weight = weight[parents] + extras[group[children]]
        loss = loss[parents] + reduced[group[children]]
        least = np.full(len(loss), -np.inf)  # what any completion loses
        for shift, rest in zip(shifts, rests[stage], strict=True):
            np.maximum(least, loss + rest - shift * (relaxed.left - weight), out=least)
        alive = np.flatnonzero(least < known - resolution)
        alive = alive[undominated(weight[alive], (loss - relaxed.price * weight)[alive])]
        if len(alive) > states:
            nearest = np.argsort(least[alive], kind="stable")
            unseen = min(unseen, float(least[alive[nearest[states]]]))
            alive = alive[np.sort(nearest[:states])]
        weight, loss = weight[alive], loss[alive]
        trail.append((parents[alive], group[children[alive]]))
        fitting = np.flatnonzero(weight <= relaxed.left)
        totals = loss[fitting] + relaxed.price * (relaxed.left - weight[fitting])
        if len(fitting) and totals.min() < known - resolution:
            known = float(totals.min())
            best = len(trail), int(fitting[np.argmin(totals)])
    if best is not None:
        picks = _traced(table, relaxed.picks, trail[: best[0]], best[1])
    return picks, unseen if unseen < known - resolution else np.inf


def _core_groups(owners: Integers, reduced: Floats, most: float) -> list[Integers]:
    """Positions, by group, of choices below a reduced value; the nearest alternative first.

    Groups with only one such choice, the relaxed plan's own, are left out.
    """
    near = np.flatnonzero(reduced < most)
    groups = np.split(near, np.flatnonzero(np.diff(owners[near])) + 1)
    several = [group for group in groups if len(group) > 1]
    return sorted(several, key=lambda group: float(np.partition(reduced[group], 1)[1]))


def _threshold(loss: Floats, reduced: Floats, most: float, states: int) -> float:
    """The highest loss, up to ``most``, below which there are at most ``states`` pairs."""
    rising = np.sort(reduced)

    def count(threshold: float) -> int:
        return int(np.searchsorted(rising, threshold - loss).sum())

    if count(most) <= states:
        return most
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) <= states else (low, middle)
    return low


def _pairs(loss: Floats, reduced: Floats, threshold: float) -> tuple[Integers, Integers]:
    """Positions of all pairs of a partial plan and a choice that lose less than a threshold.

    Args:
        loss: ``(m,)`` of the partial plans.
        reduced: ``(n,)`` of the choices.
        threshold: For the sum of both.

    Returns:
        Positions in ``loss`` and in ``reduced``, ``(pairs,)`` each.
    """
    order = np.argsort(reduced, kind="stable")
    counts = np.searchsorted(reduced[order], threshold - loss)
    parents = np.repeat(np.arange(len(loss)), counts)
    ranks = np.arange(len(parents)) - np.repeat(np.cumsum(counts) - counts, counts)
    return parents, order[ranks]


def _rests(numbers: Sequence[Floats]) -> Floats:
    """``(stages, n)`` sums of what comes after each stage's ``(n,)`` numbers."""
    after = np.array([*numbers[1:], np.zeros(len(SHIFTS))])
    return np.cumsum(after[::-1], axis=0)[::-1]


def _traced(
    table: _Table, relaxed: Integers, trail: Sequence[tuple[Integers, Integers]], state: int
) -> Integers:
    """The plan of a partial plan, completed with the relaxed one."""
    picks = relaxed.copy()
    for parents, positions in reversed(trail):
        picks[table.owners[positions[state]]] = positions[state]
        state = int(parents[state])
    return picks
