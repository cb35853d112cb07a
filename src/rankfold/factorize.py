"""From a spectrum and a rank to factors, and to the module that takes the layer's place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankfold.embedding_modules import LowRankEmbedding, LowRankHead
from rankfold.layer_matrix import MatrixLayer
from rankfold.layers import EmbeddingMatrix
from rankfold.linalg import pivot_rows
from rankfold.modules import Form, LowRankConv2d, LowRankLinear
from rankfold.spectrum import Spectrum


@dataclass(frozen=True)
class Factors:
    """A rank-k matrix in one of the two forms of ``rankfold.modules``.

    Attributes:
        left: ``(out, k)`` or ``(out - k, k)``.
        right: ``(k, in)``.
        order: ``(out,)`` for the pivoted form, else None.
    """

    left: Tensor
    right: Tensor
    order: Tensor | None

    def product(self) -> Tensor:
        """The matrix itself, ``(out, in)``."""
        product = self.left @ self.right
        return product if self.order is None else torch.cat([self.right, product])[self.order]


def truncate(spectrum: Spectrum, rank: int, form: Form) -> Factors:
    """The best rank-``rank`` factors in the asked form, float64.

    Raises:
        ValueError: ``rank`` is not in 1..min(out, in).
    """
    if not 1 <= rank <= len(spectrum.singular_values):
        raise ValueError(f"rank {rank} is not in 1..{len(spectrum.singular_values)}")
    left, right = spectrum.factors(rank)
    return balanced_pair(left, right) if form == "pair" else pivoted(left, right)


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
    _, triangular = torch.linalg.qr(right.T)  # (k, k)
    basis = pivot_rows(left @ triangular.T)  # of (out, k)
    order = torch.empty_like(basis.order)
    order[basis.order] = torch.arange(len(order), device=order.device)
    return Factors(basis.coefficients, left[basis.order[:rank]] @ right, order)


def low_rank_uses(
    matrix: EmbeddingMatrix, spectrum: Spectrum, rank: int, form: Form
) -> dict[str, LowRankEmbedding | LowRankHead]:
    """The modules that replace the uses of an embedding matrix; they share the factors.

    Pivots are columns of the matrix, of which there are few, in place of rows.

    Args:
        matrix: The matrix ``(words, dim)``.
        spectrum: Of it.
        rank: The rank.
        form: Of the factors.

    Raises:
        ValueError: ``rank`` is not in 1..min(words, dim).
    """
    factors = truncate(spectrum.transposed(), rank, form)
    like = matrix.weight
    weight, mix = (
        nn.Parameter(factor.to(like.device, like.dtype).contiguous(), like.requires_grad)
        for factor in (factors.right.T, factors.left)
    )
    order = factors.order
    made: dict[str, LowRankEmbedding | LowRankHead] = {
        name: LowRankEmbedding(weight, mix, order, lookup.padding_idx)
        for name, lookup in matrix.lookups.items()
    }
    made |= {
        name: LowRankHead(weight, mix, order, copied(head.bias))
        for name, head in matrix.heads.items()
    }
    for name, module in matrix.uses.items():
        made[name].train(module.training)
    return made


def copied(bias: nn.Parameter | None) -> nn.Parameter | None:
    """A copy of a bias, if there is one."""
    return None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)


def low_rank_module(layer: MatrixLayer, factors: Factors) -> LowRankLinear | LowRankConv2d:
    """The module that replaces ``layer``: its dtype, device, bias, stride and padding kept."""
    weight = layer.weight
    left = factors.left.to(weight.device, weight.dtype)
    right = factors.right.to(weight.device, weight.dtype)
    module: LowRankLinear | LowRankConv2d
    if isinstance(layer, nn.Linear):
        module = LowRankLinear(left, right, layer.bias, factors.order)
    else:
        right = right.view(-1, *weight.shape[1:])
        module = LowRankConv2d(left, right, layer, layer.bias, factors.order)
    take_flags(module, layer)
    return module


def take_flags(module: nn.Module, layer: MatrixLayer) -> None:
    """Train or evaluate, and let be trained, what stands for ``layer`` as ``layer`` was."""
    module.train(layer.training)
    module.requires_grad_(layer.weight.requires_grad)
    if isinstance(module.bias, nn.Parameter) and layer.bias is not None:
        module.bias.requires_grad_(layer.bias.requires_grad)
