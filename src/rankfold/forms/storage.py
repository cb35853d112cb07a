"""How a product of two factors is stored: as a pair, or pivoted.

Both hold a rank-k matrix W':

- ``pair``: ``W' = left @ right`` with left ``(out, k)`` and right ``(k, in)``; k (out + in)
  parameters;
- ``pivoted``: right ``(k, in)`` holds k rows of W' itself and left ``(out - k, k)`` writes the
  other rows as combinations of them; k (out + in - k) parameters, fewer than out * in for every
  k < min(out, in) (Pivoting Factorization, arXiv 2501.19090).

``order`` says which row of ``[pivot rows; other rows]`` each output is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.forms.names import STORAGES as STORAGES
from rankfold.forms.names import Storage as Storage


def left_rows(out: int, rank: int, storage: Storage) -> int:
    """Rows of the left factor: all of them in a pair, those that are no pivot otherwise."""
    return out if storage == "pair" else out - rank


def factor_parameters(out: int, in_: int, rank: int, storage: Storage) -> int:
    """Parameters of both factors of an ``(out, in_)`` matrix of this rank, bias not counted."""
    return rank * (left_rows(out, rank, storage) + in_)


def with_identity_rows(factor: Tensor, order: Tensor | None) -> Tensor:
    """A factor with the identity rows that a pivoted factor leaves out, ``(rows, rank)``."""
    if order is None:
        return factor
    rank = factor.shape[1]
    identity = torch.eye(rank, dtype=factor.dtype, device=factor.device)
    return torch.cat([identity, factor]).index_select(0, order)


def features_in_order(features: Tensor, order: Tensor) -> Tensor:
    """``features[..., order]``, of ``(..., n)`` by ``(n,)`` integers.

    As a matrix: with more axes torch walks down all rows once for each feature, which took 4 to 28
    times as long on a CPU.
    """
    return features.reshape(-1, features.shape[-1]).index_select(-1, order).view(features.shape)


def plus_bias(outputs: Tensor, bias: Tensor | None) -> Tensor:
    """Outputs that nobody else holds plus a bias of matching shape, without another copy."""
    return outputs if bias is None else outputs.add_(bias)


def multiplies_identity(rank: int, channels: int) -> bool:
    """Whether a 1x1 conv is faster with the identity rows of a pivoted factor than without.

    Leaving them out saves ``rank^2`` products a position, and the channels are written three times:
    joined, in order, with their bias. Measured on a CPU, both cost the same near ``rank^2 = 40
    channels``.
    """
    return rank**2 <= 40 * channels
