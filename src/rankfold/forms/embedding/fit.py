"""From the spectrum of an embedding matrix to the modules of all its uses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from rankfold.forms.embedding.modules import LowRankEmbedding, LowRankHead
from rankfold.forms.factors import truncate
from rankfold.forms.layer import copied
from rankfold.forms.low_rank.form import check_rank
from rankfold.forms.storage import Storage, left_rows
from rankfold.maths.spectrum import Spectrum
from rankfold.model.find_layers import EmbeddingMatrix


def low_rank_uses(
    matrix: EmbeddingMatrix, spectrum: Spectrum, rank: int, storage: Storage
) -> dict[str, LowRankEmbedding | LowRankHead]:
    """The modules that replace the uses of an embedding matrix; they share the factors.

    Pivots are columns of the matrix, of which there are few, in place of rows.

    Args:
        matrix: The matrix ``(words, dim)``.
        spectrum: Of it.
        rank: The rank.
        storage: Of the factors.

    Raises:
        ValueError: ``rank`` is not in 1..min(words, dim).
    """
    factors = truncate(spectrum.transposed(), rank, storage)
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


def empty_uses(
    uses: Mapping[str, nn.Linear | nn.Embedding], rank: int, storage: Storage
) -> dict[str, LowRankEmbedding | LowRankHead]:
    """Modules of the right shapes to load saved tensors into; they share the factors.

    Args:
        uses: By name, the modules that use one matrix ``(words, dim)``.
        rank: The rank.
        storage: Of the factors.

    Raises:
        ValueError: The matrix has no such rank, or the modules not one shape.
    """
    words, dim = next(iter(uses.values())).weight.shape
    made: dict[str, LowRankEmbedding | LowRankHead] = {}
    for name, module in uses.items():
        if module.weight.shape != (words, dim):
            raise ValueError(
                f"{', '.join(uses)} share one matrix, but have different shapes in the given model"
            )
        try:
            check_rank(rank, module.weight)
        except ValueError as error:
            raise ValueError(f"its layer {name}: {error}") from error
        if not made:
            new = module.weight.new_empty
            weight = nn.Parameter(new(words, rank))
            mix = nn.Parameter(new(left_rows(dim, rank, storage), rank))
        pivoted = storage == "pivoted"
        order = torch.arange(dim, device=module.weight.device) if pivoted else None
        made[name] = (
            LowRankEmbedding(weight, mix, order, module.padding_idx)
            if isinstance(module, nn.Embedding)
            else LowRankHead(weight, mix, order, module.bias)
        )
    return made
