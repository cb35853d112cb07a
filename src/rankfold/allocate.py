"""Which rank each layer gets: rank-loss curves and a budget to a plan.

A curve lists a layer's choices as (rank, cost, predicted loss change); leaving the layer dense is
one of them. The choices that some Lagrange multiplier selects are the vertices of the curve's
lower convex hull, so walking all layers' hull segments from the best bargain to the worst visits
the optimal plan of every multiplier in turn.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

RankPlan: TypeAlias = dict[str, "Choice"]


@dataclass(frozen=True)
class Choice:
    """What one layer becomes.

    Attributes:
        rank: The rank, or None for a layer left dense.
        cost: In the unit of the curve: parameters or FLOPs.
        change: Predicted change of the loss.
    """

    rank: int | None
    cost: int
    change: float


@dataclass(frozen=True)
class Curve:
    """A layer's choices, in order of rising cost; the last one is the dense layer.

    Attributes:
        ranks: ``(n,)`` ranks of the factorized choices, int64.
        costs: ``(n,)`` their costs, int64.
        changes: ``(n,)`` their predicted loss changes, float64.
        dense_cost: Cost of the layer left dense; its change is 0.
        errors: ``(n,)`` relative Frobenius errors, for the first-order rule.
    """

    ranks: Tensor
    costs: Tensor
    changes: Tensor
    dense_cost: int
    errors: Tensor | None = None

    def choices(self) -> list[Choice]:
        """All choices that are cheaper than the dense layer, and the dense layer."""
        rows = zip(self.ranks.tolist(), self.costs.tolist(), self.changes.tolist(), strict=True)
        factorized = [Choice(*row) for row in rows if row[1] < self.dense_cost]
        return [*factorized, Choice(None, self.dense_cost, 0.0)]


def lower_hull(choices: list[Choice]) -> list[Choice]:
    """The choices optimal for some multiplier: rising cost, falling change, falling bargain."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.cost, c.change)):
        if hull and choice.change >= hull[-1].change:
            continue
        while len(hull) > 1 and _bargain(hull[-2], hull[-1]) <= _bargain(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _bargain(cheap: Choice, dear: Choice) -> float:
    """Predicted loss saved for one more unit of cost."""
    return (cheap.change - dear.change) / (dear.cost - cheap.cost)


def total_cost(plan: Mapping[str, Choice]) -> int:
    """Sum of the choices' costs."""
    return sum(choice.cost for choice in plan.values())


def total_change(plan: Mapping[str, Choice]) -> float:
    """Sum of the choices' predicted loss changes."""
    return sum(choice.change for choice in plan.values())


def smallest_cost(curves: Mapping[str, Curve]) -> int:
    """The cost below which no plan exists."""
    return sum(min(choice.cost for choice in curve.choices()) for curve in curves.values())


def best_within_cost(curves: Mapping[str, Curve], budget: float) -> RankPlan:
    """The plan of the lowest predicted loss whose total cost is at most ``budget``.

    Optimal among the plans of a Lagrange multiplier; what is left of the budget is then given to
    the best bargains that still fit.

    Raises:
        ValueError: Even the cheapest plan costs more than the budget.
    """
    cheapest = smallest_cost(curves)
    if cheapest > budget:
        raise ValueError(f"the cheapest plan costs {cheapest}, the budget is {budget:.0f}")
    hulls = {name: lower_hull(curve.choices()) for name, curve in curves.items()}
    position = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].cost for hull in hulls.values())
    upgrades = _bargains(hulls)
    while upgrades:
        _, name = heapq.heappop(upgrades)
        here, better = hulls[name][position[name] : position[name] + 2]
        if spent + better.cost - here.cost > budget:
            continue  # and nothing dearer of this layer fits either
        spent += better.cost - here.cost
        position[name] += 1
        _push(upgrades, hulls, name, position[name])
    plan = {name: hulls[name][position[name]] for name in hulls}
    return _filled(plan, curves, budget - spent)


def _filled(plan: RankPlan, curves: Mapping[str, Curve], left: float) -> RankPlan:
    """Spend what is left of the budget on choices off the hull, layer by layer, best first."""

    def best_affordable(name: str) -> tuple[float, str, Choice] | None:
        here = plan[name]
        affordable = [
            choice
            for choice in curves[name].choices()
            if choice.change < here.change and choice.cost - here.cost <= left
        ]
        if not affordable:
            return None
        best = min(affordable, key=lambda c: (c.change, c.cost))
        return best.change - here.change, name, best

    filled = dict(plan)
    options = [option for name in plan if (option := best_affordable(name)) is not None]
    heapq.heapify(options)
    while options:
        _, name, choice = heapq.heappop(options)
        extra = choice.cost - plan[name].cost
        if extra <= left:
            filled[name] = choice
            left -= extra
        elif (second := best_affordable(name)) is not None:
            heapq.heappush(options, second)
    return filled


def cheapest_within_change(curves: Mapping[str, Curve], tolerance: float) -> RankPlan:
    """The plan of the lowest cost whose predicted loss change is at most ``tolerance``.

    Optimal among the plans of a Lagrange multiplier. A negative tolerance that no plan reaches
    gives the plan with the lowest predicted change.
    """
    hulls = {name: lower_hull(curve.choices()) for name, curve in curves.items()}
    position = dict.fromkeys(hulls, 0)
    change = sum(hull[0].change for hull in hulls.values())
    upgrades = _bargains(hulls)
    while upgrades and change > tolerance:
        _, name = heapq.heappop(upgrades)
        here, better = hulls[name][position[name] : position[name] + 2]
        change += better.change - here.change
        position[name] += 1
        _push(upgrades, hulls, name, position[name])
    return {name: hulls[name][position[name]] for name in hulls}


def _bargains(hulls: Mapping[str, list[Choice]]) -> list[tuple[float, str]]:
    heap: list[tuple[float, str]] = []
    for name in hulls:
        _push(heap, hulls, name, 0)
    return heap


def _push(
    heap: list[tuple[float, str]], hulls: Mapping[str, list[Choice]], name: str, at: int
) -> None:
    if at + 1 < len(hulls[name]):
        heapq.heappush(heap, (-_bargain(hulls[name][at], hulls[name][at + 1]), name))


def uniform_within_cost(curves: Mapping[str, Curve], budget: float) -> RankPlan:
    """One ratio for every layer, the largest that fits: the setting of SVD and SVD-LLM.

    Each layer gets its largest rank whose cost is at most ratio x its dense cost.

    Raises:
        ValueError: Even the cheapest plan costs more than the budget.
    """
    cheapest = smallest_cost(curves)
    if cheapest > budget:
        raise ValueError(f"the cheapest plan costs {cheapest}, the budget is {budget:.0f}")

    def at(ratio: float) -> RankPlan:
        plan: RankPlan = {}
        for name, curve in curves.items():
            choices = sorted(curve.choices(), key=lambda c: c.cost)
            fitting = [c for c in choices if c.cost <= ratio * curve.dense_cost]
            plan[name] = fitting[-1] if fitting else choices[0]
        return plan

    low, high = 0.0, 1.0
    if total_cost(at(high)) <= budget:
        return at(high)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if total_cost(at(middle)) <= budget else (low, middle)
    return at(low)


def first_order_within_cost(curves: Mapping[str, Curve], budget: float, smallest: bool) -> RankPlan:
    """The published first-order rule at the smallest error bound eps that fits the budget.

    Among the ranks with ``|W_k - W|_F <= eps |W|_F`` that save parameters, each layer greedily
    takes the one with the lowest ``<G, W_k - W>`` (lossless) or the smallest one whose value is
    not positive (compact); a layer without such a rank stays dense. eps is what the publication
    leaves open; here the smallest of 200 values that brings the plan within the budget.

    Raises:
        ValueError: No eps does.
    """
    for step in range(1, 201):
        plan = {name: _greedy(curve, step / 200, smallest) for name, curve in curves.items()}
        if total_cost(plan) <= budget:
            return plan
    raise ValueError(f"no error bound brings the first-order rule within the budget {budget:.0f}")


def _greedy(curve: Curve, eps: float, smallest: bool) -> Choice:
    if curve.errors is None:
        raise ValueError("the first-order rule needs curves with errors")
    *factorized, dense = curve.choices()
    allowed = [
        choice
        for choice, error in zip(factorized, curve.errors.tolist(), strict=False)
        if error <= eps and (choice.change <= 0 or not smallest)
    ]
    if not allowed:
        return dense
    if smallest:
        return allowed[0]
    return min(allowed, key=lambda c: (c.change, c.cost))
