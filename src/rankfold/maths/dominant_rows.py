"""Rows of a layer that have most of its gradient: which they are.

Language models send attention that has nowhere to go to one token, mostly the first of a window (an
attention sink, Xiao et al. 2023, arXiv 2309.17453). Its key and value receive gradients from all
tokens after it: of SmolLM2's value projections one row of 512 has nine tenths of the squared
gradient. K-FAC takes inputs and gradients for independent. Such rows are not: the huge gradients
always meet the same input. ``rankfold.statistics`` counts them apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A row is heavy with this many times the mean squared gradient of its example's rows, and dominant
# with so many times the mean of those that are not heavy. On SmolLM2 rows of the keys and values of
# the first token have 500 to 10,000 times that mean, and hardly any other row has 64 times.
HEAVY = 16.0
DOMINANT = 64.0


def dominant_rows(squared_gradients: Tensor) -> Tensor:
    """Which rows have by far more than their share of their example's squared gradient.

    Rows without a gradient (padding) count for nothing. An example of fewer than ``HEAVY`` rows has
    no dominant ones.

    Args:
        squared_gradients: ``(examples, rows)``, of each row the squared norm, 0 or more.

    Returns:
        ``(examples, rows)`` bool.
    """
    g = squared_gradients
    mean = _mean(g, g > 0)
    light = (g > 0) & (g <= HEAVY * mean)
    dominant: Tensor = (g > HEAVY * mean) & (g > DOMINANT * _mean(g, light))
    return dominant


def _mean(values: Tensor, among: Tensor) -> Tensor:
    """Mean of each line over some of its places, ``(lines, 1)``; 0 where there are none."""
    count = among.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(among, values, 0).sum(-1, keepdim=True) / count
