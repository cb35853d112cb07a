"""Low-rank stand-ins for the modules that use one embedding matrix: lookups and output layers.

The matrix E ``(words, dim)`` of rank k is the product of ``weight`` ``(words, k)``, which has a row
for each word, and of a small factor that is stored as ``mix``:

- ``pair``: ``mix`` is ``(dim, k)`` and ``E = weight @ mix.T``; k (words + dim) parameters;
- ``pivoted``: ``weight`` holds k columns of E itself and ``mix`` ``(dim - k, k)`` writes the other
  columns as combinations of them; k (words + dim - k) parameters. ``order`` says which column of
  ``[pivot columns; other columns]`` each one is.

All stand-ins of one matrix hold the same two parameters. The large one is called ``weight`` so that
``tie_weights`` of transformers, which knows that name, ties what is tied already.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.forms.storage import Storage, features_in_order, left_rows, with_identity_rows
from rankfold.model.stock_layers import embedding, linear


class FactorizedUse(nn.Module):
    """One use of an embedding matrix: the two factors and the order of the columns."""

    weight: nn.Parameter
    mix: nn.Parameter
    order: Tensor | None
    # transformers' save_pretrained keeps one copy of shared tensors under such names.
    _tied_weights_keys: ClassVar[dict[str, str]] = {"mix": "mix"}

    def __init__(self, weight: nn.Parameter, mix: nn.Parameter, order: Tensor | None):
        super().__init__()
        self.weight = weight
        self.mix = mix
        # Of each module its own: transformers ties no buffers, and it is short.
        self.register_buffer("order", None if order is None else order.to(torch.int32, copy=True))

    @property
    def rank(self) -> int:
        """Rank of the matrix."""
        return self.weight.shape[1]

    @property
    def form(self) -> Storage:
        """``pair`` or ``pivoted``."""
        return "pair" if self.order is None else "pivoted"

    @property
    def dim(self) -> int:
        """Values in a row of the matrix."""
        return len(self.mix) if self.order is None else len(self.order)

    def full_mix(self) -> Tensor:
        """The small factor with its identity rows, ``(dim, rank)``."""
        return with_identity_rows(self.mix, self.order)

    def dense_matrix(self) -> Tensor:
        """The product of the factors, ``(words, dim)``."""
        return self.weight @ self.full_mix().T

    @abstractmethod
    def to_dense(self) -> nn.Embedding | nn.Linear:
        """The same module as one stock module, factors multiplied out."""

    @abstractmethod
    def to_stock(self) -> nn.Sequential:
        """The same module as two stock modules, one after the other."""

    def extra_repr(self) -> str:
        """Shapes, rank and form for ``print(model)``."""
        return f"{len(self.weight)}, {self.dim}, rank={self.rank}, form={self.form}"


def embedding_flops(
    shape: tuple[int, int], rank: int | None, storage: Storage, looked_up: int, scored: int
) -> int:
    """Floating-point operations (2 a multiply-add) of all uses of a matrix.

    Args:
        shape: ``(words, dim)``.
        rank: None for the dense matrix, of which a lookup computes nothing.
        storage: Of the factors.
        looked_up: Rows that are looked up.
        scored: Rows that a head scores all words for.
    """
    words, dim = shape
    if rank is None:
        return 2 * scored * words * dim
    small = rank * left_rows(dim, rank, storage)
    return 2 * (looked_up * small + scored * (small + words * rank))


class LowRankEmbedding(FactorizedUse):
    """An Embedding whose matrix has low rank.

    Args:
        weight: ``(words, rank)``.
        mix: ``(dim, rank)``, or ``(dim - rank, rank)`` when pivoted.
        order: ``(dim,)`` integers when pivoted, None for the pair.
        padding_idx: The word whose row gets no gradient, or None.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        mix: nn.Parameter,
        order: Tensor | None = None,
        padding_idx: int | None = None,
    ):
        super().__init__(weight, mix, order)
        self.padding_idx = padding_idx
        self.num_embeddings, self.embedding_dim = len(weight), self.dim

    def forward(self, input: Tensor) -> Tensor:
        """Map integers ``(...)`` to ``(..., dim)``."""
        hidden = functional.embedding(input, self.weight, self.padding_idx)
        outputs = functional.linear(hidden, self.mix)
        if self.order is None:
            return outputs
        return features_in_order(torch.cat([hidden, outputs], dim=-1), self.order)

    def to_dense(self) -> nn.Embedding:
        """The same module as one ``nn.Embedding``, factors multiplied out."""
        return embedding(self.dense_matrix().detach(), self.padding_idx)

    def to_stock(self) -> nn.Sequential:
        """The same module as an ``nn.Embedding`` and an ``nn.Linear``."""
        first = embedding(self.weight.detach(), self.padding_idx)
        return nn.Sequential(first, linear(self.full_mix().detach(), None))


class LowRankHead(FactorizedUse):
    """A Linear that scores words by an embedding matrix of low rank.

    Args:
        weight: ``(words, rank)``.
        mix: ``(dim, rank)``, or ``(dim - rank, rank)`` when pivoted.
        order: ``(dim,)`` integers when pivoted, None for the pair.
        bias: ``(words,)`` or None.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        mix: nn.Parameter,
        order: Tensor | None = None,
        bias: nn.Parameter | None = None,
    ):
        super().__init__(weight, mix, order)
        self.bias = bias
        self.in_features, self.out_features = self.dim, len(weight)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., dim)`` to ``(..., words)``."""
        if self.order is None:
            hidden = input @ self.mix
        else:
            # The inverse of the order: where each of [pivot columns; other columns] stands.
            sorted_inputs = features_in_order(input, self.order.argsort())
            pivots, others = sorted_inputs.split([self.rank, self.dim - self.rank], dim=-1)
            hidden = pivots + others @ self.mix
        return functional.linear(hidden, self.weight, self.bias)

    def to_dense(self) -> nn.Linear:
        """The same module as one ``nn.Linear``, factors multiplied out."""
        return linear(self.dense_matrix().detach(), self.bias)

    def to_stock(self) -> nn.Sequential:
        """The same module as two ``nn.Linear``, one after the other."""
        last = linear(self.weight.detach(), self.bias)
        return nn.Sequential(linear(self.full_mix().T.detach(), None), last)
