"""The user's model as a set of matrices to factorize, and what each of them costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from rankfold.files.tensors import model_sizes
from rankfold.forms.embedding.modules import embedding_flops
from rankfold.forms.low_rank.form import rank_costs
from rankfold.forms.problem import Calls
from rankfold.forms.storage import Storage, factor_parameters
from rankfold.model.find_layers import EmbeddingMatrix, Skipped
from rankfold.model.layer_matrix import MatrixLayer
from rankfold.model.sizes import model_parameters
from rankfold.model.unpack import Unpacked
from rankfold.objective import Cost
from rankfold.statistics.trace import Trace


@dataclass(frozen=True)
class Subject:
    """The user's model as a set of matrices to factorize.

    Attributes:
        unpacked: The user's own model, and the same function from plain layers.
        base: The model whose weights are factorized: the unpacked one, or in a later round what
            the one before made of it.
        dense: The unpacked model moved by the steps of earlier rounds, for the control.
        layers: Layers of ``base`` to factorize.
        embeddings: Embedding matrices of ``base`` to factorize, by the name of their first use.
        skipped: Layers that stay as they are.
        seen: Calls and FLOPs of one example.
    """

    unpacked: Unpacked
    base: nn.Module
    dense: nn.Module
    layers: Mapping[str, MatrixLayer]
    embeddings: Mapping[str, EmbeddingMatrix]
    skipped: tuple[Skipped, ...]
    seen: Trace

    @property
    def model(self) -> nn.Module:
        """The user's model, unpacked."""
        return self.unpacked.model

    @property
    def matrices(self) -> dict[str, MatrixLayer | EmbeddingMatrix]:
        """All that can be factorized."""
        return {**self.layers, **self.embeddings}

    @property
    def sizes(self) -> dict[str, int]:
        """Parameters, those of the layers that can be factorized, bytes, FLOPs of one example."""
        return {
            **model_sizes(self.unpacked.given),
            "factorizable_parameters": sum(m.weight.numel() for m in self.matrices.values()),
            "flops": sum(self.seen.flops.values()),
        }

    def total(self, cost: Cost) -> int:
        """Cost of the whole model: parameters, or FLOPs of one example."""
        if cost == "parameters":
            return model_parameters(self.model)
        return sum(self.seen.flops.values())

    def calls(self, name: str) -> Calls:
        """How one example uses a layer."""
        sizes = tuple(self.seen.image_sizes.get(name, ()))
        return Calls(self.seen.rows.get(name, 0), sizes)

    def price(self, name: str, cost: Cost) -> int:
        """Cost of a parameter of a layer: 1, or for FLOPs a multiply-add for each row."""
        return 1 if cost == "parameters" else 2 * self.seen.rows.get(name, 0)

    def rank_costs(self, name: str, storage: Storage, cost: Cost) -> Tensor:
        """Cost of every rank of a layer or an embedding matrix in a storage, ``(r,)`` int64."""
        if name in self.layers:
            return rank_costs(self.layers[name], storage, self.price(name, cost))
        words, dim = self.embeddings[name].weight.shape
        ranks = range(1, min(words, dim) + 1)
        if cost == "parameters":
            return torch.tensor([factor_parameters(words, dim, rank, storage) for rank in ranks])
        return torch.tensor([self.embedding_flops(name, rank, storage) for rank in ranks])

    def dense_cost(self, name: str, cost: Cost) -> int:
        """Cost of a layer or an embedding matrix left dense."""
        if name in self.embeddings and cost == "flops":
            return self.embedding_flops(name, None, "pair")
        price = 1 if name in self.embeddings else self.price(name, cost)
        return self.matrices[name].weight.numel() * price

    def embedding_flops(self, name: str, rank: int | None, storage: Storage) -> int:
        """Of all uses of an embedding matrix, for one example."""
        matrix = self.embeddings[name]
        words, dim = matrix.weight.shape
        looked_up, scored = (
            sum(self.seen.rows.get(use, 0) for use in uses)
            for uses in (matrix.lookups, matrix.heads)
        )
        return embedding_flops((words, dim), rank, storage, looked_up, scored)

    def without(self, names: Iterable[str], reason: str) -> Subject:
        """The same with some layers or embedding matrices among the skipped ones."""
        layers, embeddings, skipped = dict(self.layers), dict(self.embeddings), [*self.skipped]
        for name in names:
            uses: Mapping[str, nn.Module]
            uses = embeddings.pop(name).uses if name in embeddings else {name: layers.pop(name)}
            for use, layer in uses.items():
                count = sum(parameter.numel() for parameter in layer.parameters())
                skipped.append(Skipped(use, type(layer).__name__, count, reason))
        return replace(self, layers=layers, embeddings=embeddings, skipped=tuple(skipped))

    def standing_on(self, base: nn.Module, dense: nn.Module) -> Subject:
        """The same matrices of another model, which a round has made."""
        return replace(
            self,
            base=base,
            dense=dense,
            layers={name: cast("MatrixLayer", base.get_submodule(name)) for name in self.layers},
            embeddings={name: matrix.of(base) for name, matrix in self.embeddings.items()},
        )
