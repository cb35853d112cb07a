"""Zero Sum SVD (Abbasi et al. 2026, arXiv 2602.02848, ICML 2026, ``mint-vu/Zero-Sum-SVD``).

The weight is whitened by the input Gram, ``W L = U S V^T``. Cutting off the singular value s_i
changes the loss to first order by ``-s_i u_i^T (G L^-T) v_i``. Each layer offers its smallest
remaining singular value; of all offers the one of the smallest absolute change is cut, among the
positive ones while the running sum is not positive, among the negative ones otherwise. A layer
saves nothing before its break-even rank; one that ends above it stays dense. No floor on the
rank, as in the authors' scripts for sizes of .4 and above.

Correction: after truncating, the lost part ``W - W'`` is projected on the gradient at W' (one step,
no length to choose) and added to W', which is then truncated to the size again; five times, each
with the gradient of the first batch for the projection and fresh scores from calibration examples
(``num_stages 6`` in the authors' script). The whitening stays that of the original's inputs.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.methods.gradients import mean_gradients
from benchmarks.methods.kfac_svd import break_even_rank
from benchmarks.methods.low_rank import build
from benchmarks.methods.method import AtSize, Compressed, Method, Study
from rankfold.forms.curve import Choice
from rankfold.forms.storage import factor_parameters
from rankfold.maths.spectrum import Spectrum, whitened_spectrum
from rankfold.model.replace import with_replaced
from rankfold.search.allocate import RankPlan

CORRECTIONS = 5
SCORED_EXAMPLES, SCORED_WINDOWS = 512, 8
PROJECTED_EXAMPLES, PROJECTED_WINDOWS = 64, 1


def score_changes(spectrum: Spectrum, gradient: Tensor) -> Tensor:
    """First-order change of the loss when each component is cut off, ``(r,)``.

    ``left[:, i] right[i]`` is ``s_i u_i v_i^T L^-1``, so the change is minus its product with G.
    """
    g = gradient.to(torch.float64)
    return -((spectrum.left.T @ g) * spectrum.right).sum(1)


@dataclass(frozen=True)
class Pruned:
    """What the greedy rule made.

    Attributes:
        ranks: By layer, None where it stays dense.
        sums: The running sum of first-order changes after each cut.
    """

    ranks: dict[str, int | None]
    sums: list[float]


def zero_sum_ranks(
    changes: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: float
) -> Pruned:
    """Cut singular values by the zero-sum rule until the layers cost no more than the budget.

    Args:
        changes: By layer, the change of each component, the largest singular value first.
        shapes: ``(out, in)`` by layer.
        budget: Of parameters in pairs of factors.

    Raises:
        ValueError: Rank 1 everywhere costs more.
    """
    ranks = {name: len(found) for name, found in changes.items()}
    signs: dict[bool, list[tuple[float, str]]] = {True: [], False: []}

    def cost(name: str) -> int:
        out, in_ = shapes[name]
        if ranks[name] > break_even_rank(out, in_):
            return out * in_
        return factor_parameters(out, in_, ranks[name], "pair")

    def offer(name: str) -> None:
        if ranks[name] > 1:
            change = float(changes[name][ranks[name] - 1])
            heapq.heappush(signs[change >= 0], (abs(change), name))

    for name in ranks:
        offer(name)
    total = sum(cost(name) for name in ranks)
    running, sums = 0.0, []
    while total > budget:
        wanted = running <= 0
        queue = signs[wanted] or signs[not wanted]
        if not queue:
            raise ValueError(f"rank 1 everywhere costs {total}, the budget is {budget:.0f}")
        _, name = heapq.heappop(queue)
        before = cost(name)
        running += float(changes[name][ranks[name] - 1])
        sums.append(running)
        ranks[name] -= 1
        total += cost(name) - before
        offer(name)
    kept = {
        name: None if rank > break_even_rank(*shapes[name]) else rank
        for name, rank in ranks.items()
    }
    return Pruned(kept, sums)


def _plan(study: Study, spectra: Mapping[str, Spectrum], pruned: Pruned) -> RankPlan:
    plan = {}
    for name, rank in pruned.ranks.items():
        out, in_ = study.weights[name].shape
        cost = out * in_ if rank is None else factor_parameters(out, in_, rank, "pair")
        plan[name] = Choice(rank, cost, 0.0)
    return plan


def _truncated(
    study: Study, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], size: float
) -> tuple[dict[str, Spectrum], RankPlan]:
    found = {
        name: whitened_spectrum(weight, study.input_gram(name)) for name, weight in weights.items()
    }
    changes = {name: score_changes(found[name], gradients[name]) for name in found}
    shapes = {name: (w.shape[0], w.shape[1]) for name, w in weights.items()}
    pruned = zero_sum_ranks(changes, shapes, size * study.factorizable)
    return found, _plan(study, found, pruned)


def _own_gradients(study: Study) -> dict[str, Tensor]:
    return {name: study.collected.statistics[name].gradient for name in study.layers}


def zero_sum(study: Study) -> AtSize:
    gradients = _own_gradients(study)

    def at(size: float) -> Compressed:
        found, plan = _truncated(study, study.weights, gradients, size)
        return build(study, found, plan, "pair")

    return at


def zero_sum_corrected(study: Study) -> AtSize:
    start = _own_gradients(study)
    model, task = study.collected.model, study.collected.task
    scored = study.calibration(SCORED_WINDOWS if study.language else SCORED_EXAMPLES)
    few = study.calibration(PROJECTED_WINDOWS if study.language else PROJECTED_EXAMPLES)
    names = list(study.layers)

    def at(size: float) -> Compressed:
        found, plan = _truncated(study, study.weights, start, size)
        for _ in range(CORRECTIONS):
            cut = {
                name: study.weights[name].double()
                if choice.rank is None
                else found[name].truncated(choice.rank)
                for name, choice in plan.items()
            }
            there = with_replaced(model, {}, cut, share=True)
            gradients = mean_gradients(there, task, few, names)
            moved = {
                name: weight + projection(study.weights[name] - weight, gradients[name])
                for name, weight in cut.items()
            }
            there = with_replaced(model, {}, moved, share=True)
            found, plan = _truncated(study, moved, mean_gradients(there, task, scored, names), size)
        # A layer that ends dense is the original one.
        return build(study, found, plan, "pair")

    return at


def projection(lost: Tensor, gradient: Tensor) -> Tensor:
    """The part of what was lost that lies along the gradient, ``(out, in)``."""
    g = gradient.to(torch.float64)
    energy = g.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (lost.double() * g).sum() / energy * g


SOURCE = "Abbasi et al. 2026, arXiv 2602.02848"
METHODS = {
    "zero-sum": Method("Zero Sum SVD", SOURCE, zero_sum, needs_labels=True),
    "zero-sum-corrected": Method(
        "Zero Sum SVD, corrected", SOURCE, zero_sum_corrected, needs_labels=True
    ),
}
