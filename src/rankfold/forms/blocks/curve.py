"""What the block form of a layer offers: pairs of ranks, as a curve."""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.forms.blocks.fit import (
    Cut,
    block_changes,
    block_factors,
    block_spectra,
    ranks_worth_having,
)
from rankfold.forms.blocks.modules import BlockForm, block_parameters
from rankfold.forms.curve import Curve, beyond_rounding
from rankfold.maths.linalg import Damping
from rankfold.maths.spectrum import quadratic_change
from rankfold.model.layer_matrix import kept_dtype
from rankfold.statistics.grams import damped_grams, expected_grams
from rankfold.statistics.layer_statistics import LayerStatistics

TYPICAL_SIZE = 0.75  # share kept of a layer at which its halves are looked at together


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
    table = beyond_rounding(block_changes(blocks, *grams))
    pairs = ranks_worth_having(table, form, shape)
    costs = torch.tensor([block_parameters(*shape, form, pair) for pair in pairs.tolist()])
    changes = table.cpu()[pairs[:, 0], pairs[:, 1]]
    dense_cost = shape[0] * shape[1]
    typical = int((costs - TYPICAL_SIZE * dense_cost).abs().argmin())
    if float(changes[typical]) > 0:
        factors = block_factors(weight, *chosen_by, cut, pairs[typical].tolist())
        rounded = (gram.to(kept_dtype(weight)) for gram in grams)
        left = quadratic_change(factors.weight() - weight.to(torch.float64), *rounded)
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
