"""Which rank each layer gets: rank-loss curves and a budget to a plan, and how good the plan is.

A curve lists a layer's choices as (rank, cost, predicted loss change), in one form or in several;
leaving the layer dense is one of them. The best plan within a cost and the cheapest within a change
are the same knapsack with its two sides exchanged (``knapsack.solve``). Its answer comes with a
bound that no plan beats: most often the plan itself is proven optimal, otherwise the gap says how
far off it may be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rankfold.forms.curve import Choice, Curve
from rankfold.maths.knapsack import Solution, solve
from rankfold.objective import Objective

RankPlan: TypeAlias = dict[str, "Choice"]

MOST_STATES = 10_000  # partial plans looked at in a layer by the search for the optimum


@dataclass(frozen=True)
class Allocation:
    """A plan and how far from the best one it may be.

    Attributes:
        plan: The choice of each layer.
        cost: Its total cost.
        change: Its total predicted loss change.
        bound: No plan that keeps the limit has a lower change (or cost, for the cheapest plan), but
            for the rounding of sums (1e-12 of them).
        gap: The plan's change (or cost) above the bound; 0 when the plan is proven optimal.
    """

    plan: RankPlan
    cost: int
    change: float
    bound: float
    gap: float


def total_cost(plan: Mapping[str, Choice]) -> int:
    """Sum of the choices' costs."""
    return sum(choice.cost for choice in plan.values())


def total_change(plan: Mapping[str, Choice]) -> float:
    """Sum of the choices' predicted loss changes, the same for any order of the layers."""
    return math.fsum(choice.change for choice in plan.values())


def smallest_cost(curves: Mapping[str, Curve]) -> int:
    """The cost below which no plan exists."""
    return sum(int(curve.table()[1].min()) for curve in curves.values())


def _require_budget(curves: Mapping[str, Curve], budget: float) -> None:
    cheapest = smallest_cost(curves)
    if cheapest > budget:
        raise ValueError(f"the cheapest plan costs {cheapest}, the budget is {budget:.0f}")


def best_within_cost(
    curves: Mapping[str, Curve], budget: float, *, states: int = MOST_STATES
) -> Allocation:
    """The plan of the lowest predicted loss change whose total cost is at most ``budget``.

    Args:
        curves: By layer.
        budget: Largest total cost.
        states: Most partial plans that the search for the optimum keeps at a time. Fewer are faster
            and may leave a gap; the same number always gives the same plan.

    Raises:
        ValueError: Even the cheapest plan costs more than the budget.
    """
    _require_budget(curves, budget)
    tables = [curve.table() for curve in curves.values()]
    solution = solve([(costs, changes) for _, costs, changes in tables], budget, states)
    plan = _plan(curves, tables, solution)
    change = total_change(plan)
    bound = change if solution.optimal else min(solution.bound, change)
    return Allocation(plan, total_cost(plan), change, bound, gap=change - bound)


def cheapest_within_change(
    curves: Mapping[str, Curve], tolerance: float, *, states: int = MOST_STATES
) -> Allocation:
    """The plan of the lowest cost whose predicted loss change is at most ``tolerance``.

    A tolerance that no plan reaches counts as the lowest change that one does.

    Args:
        curves: By layer.
        tolerance: Largest total change, kept up to the rounding of sums (1e-12 of them).
        states: Most partial plans that the search for the optimum keeps at a time.
    """
    tables = [curve.table() for curve in curves.values()]
    solution = solve([(changes, costs) for _, costs, changes in tables], tolerance, states)
    plan = _plan(curves, tables, solution)
    cost = total_cost(plan)
    bound = float(cost) if solution.optimal else min(solution.bound, float(cost))
    return Allocation(plan, cost, total_change(plan), bound, gap=cost - bound)


def _plan(
    curves: Mapping[str, Curve], tables: Sequence[tuple[NDArray[Any], ...]], solution: Solution
) -> RankPlan:
    """The choices that a solution picks, by layer."""
    return {
        name: curve.choice(int(table[0][pick]))
        for (name, curve), table, pick in zip(curves.items(), tables, solution.picks, strict=True)
    }


def uniform_within_cost(curves: Mapping[str, Curve], budget: float) -> RankPlan:
    """One ratio for every layer, the largest that fits: the setting of SVD and SVD-LLM.

    Each layer gets its largest rank whose cost is at most ratio x its dense cost.

    Raises:
        ValueError: Even the cheapest plan costs more than the budget.
    """
    _require_budget(curves, budget)
    tables = [curve.table() for curve in curves.values()]
    orders = [np.argsort(costs, kind="stable") for _, costs, _ in tables]
    rising = [costs[order] for (_, costs, _), order in zip(tables, orders, strict=True)]
    dense = [curve.dense_cost for curve in curves.values()]

    def at(ratio: float) -> list[int]:
        fitting = [
            int(np.searchsorted(costs, ratio * whole, side="right"))
            for costs, whole in zip(rising, dense, strict=True)
        ]
        return [max(count - 1, 0) for count in fitting]

    def cost_at(ratio: float) -> int:
        return sum(int(costs[place]) for costs, place in zip(rising, at(ratio), strict=True))

    low, high = 0.0, 1.0
    if cost_at(high) <= budget:
        low = high
    else:
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if cost_at(middle) <= budget else (low, middle)
    return {
        name: curve.choice(int(table[0][order[place]]))
        for (name, curve), table, order, place in zip(
            curves.items(), tables, orders, at(low), strict=True
        )
    }


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
    positions, costs, changes = (column[:-1] for column in curve.table())  # without dense
    allowed = curve.errors.numpy()[positions] <= eps
    if smallest:
        allowed &= changes <= 0
    among = np.flatnonzero(allowed)
    if not len(among):
        return curve.choice(len(curve.ranks))
    best = among[0] if smallest else among[np.lexsort((costs[among], changes[among]))[0]]
    return curve.choice(int(positions[best]))


def plan_for_budget(
    objective: Objective, curves: Mapping[str, Curve], budget: float, smallest: bool = False
) -> RankPlan:
    """The objective's plan of at most this cost.

    Args:
        objective: Decides the rule.
        curves: By layer.
        budget: Largest total cost.
        smallest: For the first-order rule: the published compact algorithm (the smallest rank
            whose value is not positive) in place of the lossless one (the lowest value).
    """
    if objective.allocation == "uniform":
        return uniform_within_cost(curves, budget)
    if objective.allocation == "first-order":
        return first_order_within_cost(curves, budget, smallest=smallest)
    return best_within_cost(curves, budget).plan


def plan_for_change(
    objective: Objective, curves: Mapping[str, Curve], tolerance: float
) -> RankPlan | None:
    """The cheapest plan predicted to stay within a change, None where nothing is predicted."""
    if objective.allocation != "multiplier":
        return None
    return cheapest_within_change(curves, tolerance).plan
