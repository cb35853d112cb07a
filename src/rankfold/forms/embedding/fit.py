"""From the spectrum of an embedding matrix to the modules of all its uses."""

from __future__ import annotations

from torch import nn

from rankfold.forms.embedding.modules import LowRankEmbedding, LowRankHead
from rankfold.forms.factors import truncate
from rankfold.forms.layer import copied
from rankfold.forms.storage import Storage
from rankfold.maths.spectrum import Spectrum
from rankfold.model.find_layers import EmbeddingMatrix


def low_rank_uses(
    matrix: EmbeddingMatrix, spectrum: Spectrum, rank: int, form: Storage
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
