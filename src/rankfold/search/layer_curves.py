"""From a layer's statistics to its spectrum and the curve of its choices, under an objective."""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.forms.curve import Curve, beyond_rounding
from rankfold.maths.linalg import Damping, damped, marginal_product
from rankfold.maths.spectrum import Spectrum, smaller_side_spectrum, whitened_spectrum
from rankfold.model.layer_matrix import MatrixLayer, weight_matrix
from rankfold.objective import Objective
from rankfold.statistics.embeddings import EmbeddingStatistics
from rankfold.statistics.grams import (
    damped_grams,
    damped_outputs,
    more_damped,
    smaller_side_grams,
)
from rankfold.statistics.layer_statistics import LayerStatistics


def layer_spectrum(
    objective: Objective, weight: Tensor, statistics: LayerStatistics | None, damping: Damping
) -> Spectrum:
    """Spectrum of one (already moved) weight ``(out, in)`` under an objective."""
    if objective.output_gram == "full":
        if statistics is None:
            raise ValueError("this objective needs statistics with gradients")
        if statistics.product is not None:
            grams = smaller_side_grams(statistics, weight, damping)
            return smaller_side_spectrum(weight, *grams)
        return whitened_spectrum(weight, *damped_grams(statistics, damping))
    a = b = None
    if objective.input_gram:
        if statistics is None:
            raise ValueError("this objective needs statistics")
        if statistics.input_gram.dim() == 1:  # the outputs alone are known: B is the identity
            ones = torch.eye(weight.shape[0], dtype=torch.float64, device=weight.device)
            return smaller_side_spectrum(
                weight, ones, damped_outputs(statistics, weight, damping.input)
            )
        a = damped(statistics.input_gram, damping.input)
    if objective.output_gram == "diagonal":
        if statistics is None or statistics.output_gram is None:
            raise ValueError("this objective needs statistics with gradients")
        b = statistics.output_gram
        energies = b if b.dim() == 1 else b.diagonal()
        if statistics.dominant is not None:
            energies = energies + statistics.dominant.output_squares
        b = damped(energies, damping.output)
    return whitened_spectrum(weight, a, b)


def truncation_changes(
    objective: Objective,
    layer: MatrixLayer,
    spectrum: Spectrum,
    statistics: LayerStatistics | None,
    damping: Damping,
) -> tuple[Tensor, Tensor | None]:
    """Predicted changes of the ranks 1..r, and their errors for the first-order rule.

    An objective that predicts the loss predicts it by the Grams as they were measured: damping
    chooses the directions, and would count as loss what the data never used.

    Args:
        objective: Decides what a change is.
        layer: The layer.
        spectrum: Its spectrum, in float64.
        statistics: Of the layer, for the objectives that need them.
        damping: Of the Grams that the spectrum was made with.

    Returns:
        ``(r,)`` float64 changes; ``(r,)`` relative Frobenius errors, or None.
    """
    if objective.allocation == "uniform":
        return spectrum.truncation_changes()[1:].cpu(), None
    if statistics is None:
        raise ValueError(f"the {objective.allocation} allocation needs statistics with gradients")
    if objective.allocation == "first-order":
        changes, errors = first_order_changes(weight_matrix(layer), spectrum, statistics.gradient)
        return changes.cpu(), errors.cpu()
    changes = spectrum.changes_with_less(*more_damped(statistics, damping))[1:]
    return beyond_rounding(changes).cpu(), None


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
    changes = beyond_rounding(changes)
    return Curve(torch.arange(1, len(changes) + 1), costs, changes.cpu(), dense_cost)


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
