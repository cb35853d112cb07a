"""The choices that a layer has: what each costs, and the change of the loss that it is to make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankfold.maths.knapsack import undominated


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
    form: str | None = None
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
    forms: tuple[str | None, ...] = (None,)
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


def _form_positions(curve: Curve, forms: tuple[str | None, ...]) -> Tensor:
    """``(n,)`` position of each choice's form in another list of forms."""
    here = torch.tensor([forms.index(form) for form in curve.forms])
    return here[torch.zeros_like(curve.ranks) if curve.form_of is None else curve.form_of]


NEGLIGIBLE = 1e-12  # share of a layer's largest predicted change


def beyond_rounding(changes: Tensor) -> Tensor:
    """Zeros where only rounding keeps from 0: a weight cut in rank before is not worth more."""
    return changes.where(changes > NEGLIGIBLE * changes.max(), 0)
