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
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankfold.block_modules import BlockForm
from rankfold.conv_modules import ConvForm
from rankfold.knapsack import Solution, solve, undominated
from rankfold.modules import Form

LayerForm: TypeAlias = Form | BlockForm | ConvForm
RankPlan: TypeAlias = dict[str, "Choice"]

MOST_STATES = 10_000  # partial plans looked at in a layer by the search for the optimum


@dataclass(frozen=True)
class Choice:
    """What one layer becomes.

    Attributes:
        rank: The rank, or None for a layer left dense.
        cost: In the unit of the curve: parameters or FLOPs.
        change: Predicted change of the loss.
        form: The form of the factors, None where the curve leaves it open or the layer dense.
        second_rank: The other rank of a form that has two.
    """

    rank: int | None
    cost: int
    change: float
    form: LayerForm | None = None
    second_rank: int | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks of the form: none for a dense layer, two where there is a second one."""
        return tuple(rank for rank in (self.rank, self.second_rank) if rank is not None)


@dataclass(frozen=True)
class Curve:
    """A layer's factorized choices, in any order, and the cost of leaving it dense.

    Costs and changes need not rise or fall with the rank, and changes may be negative.

    Attributes:
        ranks: ``(n,)`` ranks of the factorized choices, int64.
        costs: ``(n,)`` their costs, int64.
        changes: ``(n,)`` their predicted loss changes, float64.
        dense_cost: Cost of the layer left dense; its change is 0.
        errors: ``(n,)`` relative Frobenius errors, for the first-order rule.
        forms: The forms that occur; None for one that is decided elsewhere.
        form_of: ``(n,)`` position of each choice's form in ``forms``; None: all have the first.
        second_ranks: ``(n,)`` second ranks, 0 where the form has only one; None: nowhere.

    Raises:
        ValueError: Lengths differ, or a predicted change is not finite.
    """

    ranks: Tensor
    costs: Tensor
    changes: Tensor
    dense_cost: int
    errors: Tensor | None = None
    forms: tuple[LayerForm | None, ...] = (None,)
    form_of: Tensor | None = None
    second_ranks: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse tensors that do not describe the same choices."""
        per_choice = (self.costs, self.changes, self.errors, self.form_of, self.second_ranks)
        lengths = {len(one) for one in (self.ranks, *per_choice) if one is not None}
        if len(lengths) > 1:
            raise ValueError(f"a curve's tensors have different lengths: {sorted(lengths)}")
        if not bool(torch.isfinite(self.changes).all()):
            raise ValueError("a curve's predicted changes are not all finite")

    def choice(self, position: int) -> Choice:
        """The factorized choice at a position, the dense layer after the last one."""
        if position == len(self.ranks):
            return Choice(None, self.dense_cost, 0.0)
        second = 0 if self.second_ranks is None else int(self.second_ranks[position])
        return Choice(
            rank=int(self.ranks[position]),
            cost=int(self.costs[position]),
            change=float(self.changes[position]),
            form=self.forms[0 if self.form_of is None else int(self.form_of[position])],
            second_rank=second or None,
        )

    def choices(self) -> list[Choice]:
        """All choices that are cheaper than the dense layer, and the dense layer."""
        return [self.choice(int(position)) for position in self.table()[0]]

    def table(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Positions, costs and changes of ``choices()``, ``(m,)`` each; the dense layer is last."""
        costs = self.costs.numpy().astype(np.int64)
        cheaper = np.flatnonzero(costs < self.dense_cost)
        changes = self.changes.numpy().astype(np.float64)
        return (
            np.append(cheaper, len(costs)),
            np.append(costs[cheaper], self.dense_cost),
            np.append(changes[cheaper], 0.0),
        )


def merged(curves: Sequence[Curve]) -> Curve:
    """One curve of all choices of one layer in several forms, without those that another one beats.

    A choice goes when another one costs no more and is predicted to change the loss no more; of
    equal ones the first stays. Errors are dropped: the first-order rule knows one form only.

    Args:
        curves: Of the same layer, each in its own form.

    Raises:
        ValueError: There is no curve, or the dense costs differ.
    """
    dense_costs = {curve.dense_cost for curve in curves}
    if len(dense_costs) != 1:
        raise ValueError(f"curves of one layer have one dense cost, not {sorted(dense_costs)}")
    forms = tuple(dict.fromkeys(form for curve in curves for form in curve.forms))
    costs = torch.cat([curve.costs for curve in curves])
    changes = torch.cat([curve.changes for curve in curves])
    cheaper = torch.nonzero(costs < curves[0].dense_cost).flatten()
    kept = cheaper[torch.from_numpy(undominated(costs[cheaper].numpy(), changes[cheaper].numpy()))]
    return Curve(
        ranks=torch.cat([curve.ranks for curve in curves])[kept],
        costs=costs[kept],
        changes=changes[kept],
        dense_cost=curves[0].dense_cost,
        forms=forms,
        form_of=torch.cat([_form_positions(curve, forms) for curve in curves])[kept],
        second_ranks=torch.cat(
            [
                torch.zeros_like(curve.ranks) if curve.second_ranks is None else curve.second_ranks
                for curve in curves
            ]
        )[kept],
    )


def _form_positions(curve: Curve, forms: tuple[LayerForm | None, ...]) -> Tensor:
    """``(n,)`` position of each choice's form in another list of forms."""
    here = torch.tensor([forms.index(form) for form in curve.forms])
    return here[torch.zeros_like(curve.ranks) if curve.form_of is None else curve.form_of]


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
