"""The objectives as settings of one function, and how each spends a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from rankfold.allocate import (
    Curve,
    RankPlan,
    best_within_cost,
    cheapest_within_change,
    first_order_within_cost,
    uniform_within_cost,
)
from rankfold.block_forms import (
    Cut,
    block_changes,
    block_factors,
    block_spectra,
    ranks_worth_having,
)
from rankfold.block_modules import BlockForm, block_parameters
from rankfold.calibrate import LayerStatistics
from rankfold.conv_forms import conv_candidates
from rankfold.conv_modules import CONV_FORMS, ConvForm, conv_factor_flops
from rankfold.curvature import damped_grams, expected_grams
from rankfold.embedding_statistics import EmbeddingStatistics
from rankfold.layer_matrix import MatrixLayer, kept_dtype, matrix_shape, weight_matrix
from rankfold.linalg import Damping, damped, marginal_product
from rankfold.modules import Form, factor_parameters
from rankfold.spectrum import Spectrum, quadratic_change, whitened_spectrum

Cost: TypeAlias = Literal["parameters", "flops"]
ObjectiveName: TypeAlias = Literal[
    "svd", "fwsvd", "activation", "kronecker", "joint", "first-order"
]


NEGLIGIBLE = 1e-12  # share of a layer's largest predicted change
TYPICAL_SIZE = 0.75  # share kept of a layer at which its halves are looked at together


@dataclass(frozen=True)
class Objective:
    """What an objective minimises, and what it needs.

    Attributes:
        input_gram: Whitens with A.
        output_gram: Whitens with B: ``none``, ``diagonal`` or ``full``.
        step: Moves the weights by the gradient term before truncating.
        allocation: ``uniform`` ratio, ``multiplier`` over predicted loss changes, or the greedy
            ``first-order`` rule.
        source: Where it comes from.
    """

    input_gram: bool
    output_gram: Literal["none", "diagonal", "full"]
    step: bool
    allocation: Literal["uniform", "multiplier", "first-order"]
    source: str

    @property
    def needs_backward(self) -> bool:
        """Whether the statistics need gradients."""
        return self.output_gram != "none" or self.step or self.allocation == "first-order"

    @property
    def needs_data(self) -> bool:
        """Whether the statistics need data at all."""
        return self.input_gram or self.needs_backward

    @property
    def predicts_loss(self) -> bool:
        """Whether its curves are in the unit of the loss."""
        return self.allocation != "uniform"


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "svd": Objective(False, "none", False, "uniform", "Eckart and Young 1936"),
    "fwsvd": Objective(
        False, "diagonal", False, "uniform", "Hsu et al. 2022, arXiv 2207.00112 (row weights)"
    ),
    "activation": Objective(
        True, "none", False, "uniform", "Wang et al. 2024, SVD-LLM, arXiv 2403.07378"
    ),
    "kronecker": Objective(
        True, "full", False, "multiplier", "K-FAC whitening on both sides; docs/theory.md, 1"
    ),
    "joint": Objective(True, "full", True, "multiplier", "docs/theory.md, 1 and 2"),
    "first-order": Objective(
        False, "none", False, "first-order", "arXiv 2412.06867 as summarised; docs/theory.md, 6"
    ),
}


def layer_spectrum(
    objective: Objective, weight: Tensor, statistics: LayerStatistics | None, damping: Damping
) -> Spectrum:
    """Spectrum of one (already moved) weight ``(out, in)`` under an objective."""
    if objective.output_gram == "full":
        if statistics is None:
            raise ValueError("this objective needs statistics with gradients")
        return whitened_spectrum(weight, *damped_grams(statistics, damping))
    a = b = None
    if objective.input_gram:
        if statistics is None:
            raise ValueError("this objective needs statistics")
        a = damped(statistics.input_gram, damping.input)
    if objective.output_gram == "diagonal":
        if statistics is None or statistics.output_gram is None:
            raise ValueError("this objective needs statistics with gradients")
        energies = statistics.output_gram.diagonal()
        if statistics.dominant is not None:
            energies = energies + statistics.dominant.output_squares
        b = damped(energies, damping.output)
    return whitened_spectrum(weight, a, b)


def layer_curve(
    objective: Objective,
    layer: MatrixLayer,
    spectrum: Spectrum,
    statistics: LayerStatistics | None,
    form: Form,
    cost_per_parameter: int,
) -> Curve:
    """Ranks 1..r with their costs and predicted changes.

    An objective that predicts the loss predicts it by the Grams as they were measured: damping
    chooses the directions, and would count as loss what the data never used.

    Args:
        objective: Decides what a change is.
        layer: The layer.
        spectrum: Its spectrum.
        statistics: Of the layer, for the objectives that need them.
        form: Decides the cost of a rank.
        cost_per_parameter: 1 for parameters, 2 x rows for FLOPs.
    """
    errors = None
    if objective.allocation == "first-order":
        if statistics is None:
            raise ValueError("the first-order objective needs statistics with gradients")
        changes, errors = first_order_changes(weight_matrix(layer), spectrum, statistics.gradient)
    elif objective.allocation == "multiplier":
        if statistics is None:
            raise ValueError("this objective needs statistics with gradients")
        changes = _beyond_rounding(spectrum.changes_under(*expected_grams(statistics))[1:])
    else:
        changes = spectrum.truncation_changes()[1:]
    out, in_ = matrix_shape(layer)
    return Curve(
        ranks=torch.arange(1, len(changes) + 1),
        costs=rank_costs(layer, form, cost_per_parameter),
        changes=changes.cpu(),
        dense_cost=out * in_ * cost_per_parameter,
        errors=None if errors is None else errors.cpu(),
    )


def embedding_spectrum(
    weight: Tensor, statistics: EmbeddingStatistics, damping: Damping
) -> Spectrum:
    """Spectrum of an embedding matrix ``(words, dim)`` under all its uses together."""
    words, gram = marginal_product([use.damped(damping) for use in statistics.uses.values()])
    return whitened_spectrum(weight, gram, words)


def embedding_curve(
    spectrum: Spectrum, statistics: EmbeddingStatistics, costs: Tensor, dense_cost: int
) -> Curve:
    """Ranks 1..r of an embedding matrix; their changes are summed over its uses.

    The spectrum's directions are those of one product in place of the uses' sum; the changes are
    those of the sum itself, and not damped.

    Args:
        spectrum: From ``embedding_spectrum``.
        statistics: Of the matrix.
        costs: ``(r,)`` int64, of the ranks.
        dense_cost: Of the matrix left dense.
    """
    changes = torch.stack([use.changes(spectrum) for use in statistics.uses.values()]).sum(0)[1:]
    changes = _beyond_rounding(changes)
    return Curve(torch.arange(1, len(changes) + 1), costs, changes.cpu(), dense_cost)


def conv_curve(
    layer: nn.Conv2d,
    weight: Tensor,
    statistics: LayerStatistics,
    spectrum: Spectrum,
    damping: Damping,
    form: Form,
    cost: Cost,
    rows: int,
    image_sizes: Sequence[tuple[int, int]],
) -> Curve:
    """What the forms of a conv with more than one small kernel offer; see ``conv_forms``.

    Choices that take more operations than the dense conv are left out, also where parameters are
    counted: behind a stride, or with identity rows that are multiplied, a form may store less and
    take longer.

    Their changes are those of the damped Grams. They are brought to the scale of the other curves
    by what the plain truncations of the same layer show at the same damped change: the share of it
    that the Grams as measured confirm.

    Args:
        layer: The conv.
        weight: Its weight ``(out, in * kh * kw)``, moved by the step.
        statistics: Its statistics, with gradients.
        spectrum: Its spectrum under the damped Grams.
        damping: Of both Grams.
        form: ``pivoted``, or ``pair`` for stock convs.
        cost: What the curve counts.
        rows: Outputs of one channel in one example, over all calls.
        image_sizes: Height and width of the input of every call in one example.
    """
    a, b = damped_grams(statistics, damping)
    pivoted = form == "pivoted"
    dense_flops = 2 * rows * layer.weight.numel()

    def flops(conv_form: ConvForm, ranks: tuple[int, ...]) -> int:
        return sum(conv_factor_flops(layer, conv_form, ranks, *s, pivoted) for s in image_sizes)

    found = conv_candidates(
        weight.view_as(layer.weight),
        a,
        b,
        pivot=pivoted,
        allowed=lambda conv_form, ranks: flops(conv_form, ranks) <= dense_flops,
    )
    regular = spectrum.truncation_changes()[1:-1].flip(0)  # rising
    measured = spectrum.changes_under(*expected_grams(statistics))[1:-1].flip(0)
    changes = np.array([candidate.change for candidate in found])
    if len(regular):
        share = (measured / regular.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
        changes = changes * np.interp(changes, regular.cpu().numpy(), share.cpu().numpy())
    in_flops = cost == "flops"
    costs = [flops(c.form, c.ranks) if in_flops else c.parameters for c in found]
    return Curve(
        ranks=torch.tensor([candidate.ranks[0] for candidate in found], dtype=torch.int64),
        costs=torch.tensor(costs, dtype=torch.int64),
        changes=torch.from_numpy(changes),
        dense_cost=dense_flops if in_flops else layer.weight.numel(),
        forms=CONV_FORMS,
        form_of=torch.tensor([CONV_FORMS.index(c.form) for c in found], dtype=torch.int64),
        second_ranks=torch.tensor([(*c.ranks, 0)[1] for c in found], dtype=torch.int64),
    )


def block_curve(
    weight: Tensor,
    statistics: LayerStatistics,
    form: BlockForm,
    damping: Damping,
    order: Tensor | None,
    cost_per_parameter: int,
) -> tuple[Curve, Cut]:
    """What the block form of a Linear or 1x1 conv offers: pairs of ranks; see ``block_forms``.

    The changes are those of the halves' spectra, times what is left of them at one pair of ranks
    where each half makes up for the other's error: finding that for all pairs would take a
    decomposition for each, and the share hardly depends on the ranks.

    Args:
        weight: ``(out, in)``, moved by the step.
        statistics: Of the layer, with gradients.
        form: Which side is cut.
        damping: Of both Grams.
        order: Rows (columns), those of the first half first; None: by importance.
        cost_per_parameter: 1 for parameters, 2 x rows for FLOPs.

    Returns:
        The curve, and how the layer is cut.
    """
    shape = (weight.shape[0], weight.shape[1])
    grams, chosen_by = expected_grams(statistics), damped_grams(statistics, damping)
    blocks = block_spectra(weight, *chosen_by, form, order)
    cut = blocks.cut(*chosen_by, kept_dtype(weight))
    table = _beyond_rounding(block_changes(blocks, *grams))
    pairs = ranks_worth_having(table, form, shape)
    costs = torch.tensor([block_parameters(*shape, form, pair) for pair in pairs.tolist()])
    changes = table.cpu()[pairs[:, 0], pairs[:, 1]]
    dense_cost = shape[0] * shape[1]
    typical = int((costs - TYPICAL_SIZE * dense_cost).abs().argmin())
    if float(changes[typical]) > 0:
        factors = block_factors(weight, *chosen_by, cut, pairs[typical].tolist())
        left = quadratic_change(factors.weight() - weight.to(torch.float64), *grams)
        changes = changes * (left / float(changes[typical]))
    curve = Curve(
        ranks=pairs[:, 0].contiguous(),
        costs=costs * cost_per_parameter,
        changes=changes,
        dense_cost=dense_cost * cost_per_parameter,
        forms=(form,),
        second_ranks=pairs[:, 1].contiguous(),
    )
    return curve, cut


def _beyond_rounding(changes: Tensor) -> Tensor:
    """Zeros where only rounding keeps from 0: a weight cut in rank before is not worth more."""
    return changes.where(changes > NEGLIGIBLE * changes.max(), 0)


def rank_costs(layer: MatrixLayer, form: Form, cost_per_parameter: int) -> Tensor:
    """Cost of every rank 1..min(out, in) of a layer in a form, int64."""
    out, in_ = matrix_shape(layer)
    ranks = range(1, min(out, in_) + 1)
    parameters = [factor_parameters(out, in_, rank, form) for rank in ranks]
    return torch.tensor(parameters) * cost_per_parameter


def first_order_changes(
    weight: Tensor, spectrum: Spectrum, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """``<G, W_k - W>`` and ``|W_k - W|_F / |W|_F`` of the ranks 1..r of a plain SVD.

    Args:
        weight: ``(out, in)``.
        spectrum: Of the weight, not whitened.
        gradient: ``(out, in)``.

    Returns:
        Two ``(r,)`` float64 tensors.
    """
    g = gradient.to(torch.float64)
    components = ((spectrum.left.T @ g) * spectrum.right).sum(1)  # <G, u_i s_i v_i^T>
    total = (weight.to(torch.float64) * g).sum()
    energies = 2 * spectrum.truncation_changes()[1:]
    norm = spectrum.singular_values.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return components.cumsum(0) - total, energies.clamp(min=0).sqrt() / norm


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
