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

from rankfold.maths.linalg import UNDAMPED, Damping, damped
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
    if statistics.dominant is not None:
        rows = statistics.dominant.inputs.to(torch.float64)
        a = a + rows.T @ rows / b.trace()
    return a, damped(b, damping.output)


def more_damped(statistics: LayerStatistics, damping: Damping) -> tuple[float, float]:
    """What the damped Grams A and B have more on their diagonals than the expected ones.

    Raises:
        ValueError: The statistics were collected without gradients.
    """
    if statistics.output_gram is None:
        raise ValueError("this objective needs statistics with gradients")
    lacking, most = statistics.lacking, damping.at_least(statistics.lacking)
    grams = statistics.input_gram, statistics.output_gram
    a, b = (float(gram.diagonal().mean(dtype=torch.float64)) for gram in grams)
    return (most.input - lacking.input) * a, (most.output - lacking.output) * b
