"""What the low-rank methods share: curves over ranks, plans by ratios, and models from plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.methods.method import AtSize, Compressed, Study
from rankfold.forms.curve import Choice, Curve
from rankfold.forms.factors import truncate
from rankfold.forms.low_rank.fit import low_rank_module
from rankfold.forms.low_rank.form import rank_costs
from rankfold.forms.storage import Storage
from rankfold.maths.spectrum import Spectrum, whitened_spectrum
from rankfold.model.layer_matrix import matrix_shape
from rankfold.model.replace import with_replaced
from rankfold.search.allocate import RankPlan, total_cost, uniform_within_cost

Spectra = Mapping[str, Spectrum]


def spectra(
    study: Study, whitening: Callable[[str], tuple[Tensor | None, Tensor | None]]
) -> Spectra:
    """The spectrum of every layer, ``whitening`` giving its ``(A, B)`` or None for the identity."""
    return {
        name: whitened_spectrum(weight, *whitening(name)) for name, weight in study.weights.items()
    }


def curve(study: Study, name: str, form: Storage, changes: Tensor) -> Curve:
    """The ranks 1..r of a layer with what each costs and ``(r,)`` what it is said to change."""
    layer = study.layers[name]
    out, in_ = matrix_shape(layer)
    return Curve(
        ranks=torch.arange(1, len(changes) + 1),
        costs=rank_costs(layer, form, 1),
        changes=changes.cpu(),
        dense_cost=out * in_,
    )


def energy_curves(study: Study, found: Spectra, form: Storage) -> dict[str, Curve]:
    """Curves whose change is half of the energy that a rank cuts off."""
    return {
        name: curve(study, name, form, spectrum.truncation_changes()[1:])
        for name, spectrum in found.items()
    }


def uniform(study: Study, found: Spectra, form: Storage = "pair") -> AtSize:
    """One ratio for all layers."""
    curves = energy_curves(study, found, form)
    return lambda size: build(
        study, found, uniform_within_cost(curves, size * study.factorizable), form
    )


def within_ratios(
    curves: Mapping[str, Curve], ratios: Mapping[str, float], budget: float
) -> RankPlan:
    """The plan whose layers keep these shares, all scaled by the largest factor that fits.

    A layer whose scaled share is 1 or more stays dense; each other one gets its largest rank
    within its share, and rank 1 where there is none.

    Raises:
        ValueError: Even rank 1 everywhere costs more than the budget.
    """

    def at(factor: float) -> RankPlan:
        return {
            name: _largest(one, min(1.0, factor * ratios[name]) * one.dense_cost)
            for name, one in curves.items()
        }

    low, high = 0.0, 1 / min(ratios.values())
    if total_cost(at(low)) > budget:
        raise ValueError(f"rank 1 everywhere costs {total_cost(at(low))}, the budget is {budget}")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if total_cost(at(middle)) <= budget else (low, middle)
    return at(low)


def _largest(one: Curve, cost: float) -> Choice:
    if cost >= one.dense_cost:
        return one.choice(len(one.ranks))
    return one.choice(max(0, int((one.costs <= cost).sum()) - 1))


def build(study: Study, found: Spectra, plan: RankPlan, form: Storage) -> Compressed:
    """The model of a plan, each layer truncated in its spectrum."""
    modules = {
        name: low_rank_module(study.layers[name], truncate(found[name], choice.rank, form))
        for name, choice in plan.items()
        if choice.rank is not None
    }
    return Compressed.of(with_replaced(study.collected.model, modules))
