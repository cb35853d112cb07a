"""From a spectrum and a rank to the factors of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.forms.storage import Storage
from rankfold.maths.linalg import pivot_rows
from rankfold.maths.spectrum import Spectrum


@dataclass(frozen=True)
class Factors:
    """A rank-k matrix in one of the two storages of ``rankfold.forms.storage``.

    Attributes:
        left: ``(out, k)`` or ``(out - k, k)``.
        right: ``(k, in)``.
        order: ``(out,)`` when pivoted, else None.
    """

    left: Tensor
    right: Tensor
    order: Tensor | None

    def product(self) -> Tensor:
        """The matrix itself, ``(out, in)``."""
        product = self.left @ self.right
        return product if self.order is None else torch.cat([self.right, product])[self.order]


def truncate(spectrum: Spectrum, rank: int, storage: Storage) -> Factors:
    """The best rank-``rank`` factors, stored as asked, float64.

    Raises:
        ValueError: ``rank`` is not in 1..min(out, in).
    """
    if not 1 <= rank <= len(spectrum.singular_values):
        raise ValueError(f"rank {rank} is not in 1..{len(spectrum.singular_values)}")
    left, right = spectrum.factors(rank)
    return balanced_pair(left, right) if storage == "pair" else pivoted(left, right)


def balanced_pair(left: Tensor, right: Tensor) -> Factors:
    """Give both factors of each component the same norm, so that low precision hurts neither."""
    left_norms, right_norms = left.norm(dim=0), right.norm(dim=1)
    alive = (left_norms > 0) & (right_norms > 0)
    scale = torch.where(alive, (right_norms / left_norms.where(alive, 1)).sqrt(), 1)
    inverse = torch.where(alive, 1 / scale.where(alive, 1), 1)
    return Factors(left * scale, inverse[:, None] * right, None)


def pivoted(left: Tensor, right: Tensor) -> Factors:
    """Rewrite ``left @ right`` as k of its own rows and the coefficients of the others.

    The product is the same up to rounding, and no coefficient exceeds
    ``linalg.LARGEST_COEFFICIENT``, so that rounding to a low precision hurts little more than it
    hurts a pair.
    """
    rank = right.shape[0]
    # The product's rows in an orthonormal basis of its row space: pivots found there are the
    # product's own, at the price of (out x k) instead of (out x in).
    _, triangular = torch.linalg.qr(right.T, mode="r")  # (k, k)
    basis = pivot_rows(left @ triangular.T)  # of (out, k)
    order = torch.empty_like(basis.order)
    order[basis.order] = torch.arange(len(order), device=order.device)
    return Factors(basis.coefficients, left[basis.order[:rank]] @ right, order)
