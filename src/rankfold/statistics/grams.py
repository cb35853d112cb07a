"""From a layer's statistics to the two Grams of its curvature, ``1/2 tr(B Delta A Delta^T)``.

A is the mean Gram of inputs and B that of output gradients (K-FAC), but for rows that dominate the
gradient (``dominant_rows``). Of such a row the curvature is ``g g^T x x x^T``, and its g in B would
say that outputs matter for any input as they do for this x. So it is left out of B, and x x^T goes
into A as often as its g is worth gradients of the other rows, ``|g|^2 / tr B`` times: what the
layer does to x is kept above all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.maths.linalg import UNDAMPED, Damping, damped, trace
from rankfold.statistics.layer_statistics import LayerStatistics


def expected_grams(statistics: LayerStatistics) -> tuple[Tensor, Tensor]:
    """A and B of a layer as other examples are expected to have them, in float64.

    Raises:
        ValueError: The statistics were collected without gradients.
    """
    return damped_grams(statistics, UNDAMPED)


def damped_grams(statistics: LayerStatistics, damping: Damping) -> tuple[Tensor, Tensor]:
    """A and B of a layer, damped by shares of the mean eigenvalues of all other than dominant rows.

    Where a Gram lacks more than the share, it is damped by what it lacks.

    Raises:
        ValueError: The statistics were collected without gradients.
    """
    if statistics.output_gram is None:
        raise ValueError("this objective needs statistics with gradients")
    damping = damping.at_least(statistics.lacking)
    a = damped(statistics.input_gram, damping.input)
    b = statistics.output_gram.to(torch.float64)
    if statistics.dominant is not None and a.dim() == 2:
        a += _of_dominant(statistics)
    return a, damped(b, damping.output)


def smaller_side_grams(
    statistics: LayerStatistics, weight: Tensor, damping: Damping
) -> tuple[Tensor, Tensor]:
    """The Gram of the smaller side and the product of the other one, damped as ``damped_grams``.

    Args:
        statistics: With a product.
        weight: ``(out, in)``.
        damping: Shares of the mean eigenvalues.

    Raises:
        ValueError: The statistics have no product.
    """
    if statistics.product is None:
        raise ValueError("these statistics have the Grams of both sides")
    a, b = damped_grams(statistics, damping)
    damping = damping.at_least(statistics.lacking)
    if a.dim() == 2:
        w, (_, of_output) = weight.detach().to(torch.float64), _added(statistics, damping)
        return a, statistics.product.to(torch.float64) + of_output * (w.T @ w)
    product = damped_outputs(statistics, weight, damping.input)
    if statistics.dominant is not None:
        product += _of_dominant(statistics)
    return b, product


def damped_outputs(statistics: LayerStatistics, weight: Tensor, share: float) -> Tensor:
    """``W A W^T`` with A damped by a share of its mean eigenvalue, ``(out, out)`` float64.

    Args:
        statistics: With the product, and the diagonal of A.
        weight: ``(out, in)``.
        share: Of the mean eigenvalue.

    Raises:
        ValueError: The statistics have no product.
    """
    if statistics.product is None:
        raise ValueError("these statistics have the Grams of both sides")
    w, diagonal = weight.detach().to(torch.float64), statistics.input_gram.to(torch.float64)
    return statistics.product.to(torch.float64) + share * diagonal.mean() * (w @ w.T)


def _of_dominant(statistics: LayerStatistics) -> Tensor:
    """What dominant rows add to A, or to the product in its place."""
    assert statistics.dominant is not None and statistics.output_gram is not None
    rows = statistics.dominant.inputs.to(torch.float64)
    return rows.T @ rows / trace(statistics.output_gram.to(torch.float64))


def more_damped(statistics: LayerStatistics, damping: Damping) -> tuple[float, float]:
    """What the damped Grams A and B have more on their diagonals than the expected ones.

    Raises:
        ValueError: The statistics were collected without gradients.
    """
    if statistics.output_gram is None:
        raise ValueError("this objective needs statistics with gradients")
    most = _added(statistics, damping.at_least(statistics.lacking))
    least = _added(statistics, statistics.lacking)
    return most[0] - least[0], most[1] - least[1]


def _added(statistics: LayerStatistics, shares: Damping) -> tuple[float, float]:
    """What shares of their mean eigenvalues are of A and B."""
    assert statistics.output_gram is not None  # the caller has checked
    a, b = (
        float(trace(gram.to(torch.float64))) / len(gram)
        for gram in (statistics.input_gram, statistics.output_gram)
    )
    return shares.input * a, shares.output * b
