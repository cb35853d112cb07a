"""Low rank: one product of two factors, which every layer may become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankfold.forms.curve import Choice, Curve
from rankfold.forms.factors import truncate
from rankfold.forms.low_rank.fit import low_rank_module
from rankfold.forms.low_rank.modules import LowRankConv2d, LowRankLinear
from rankfold.forms.problem import Calls, LayerProblem, Size
from rankfold.forms.storage import STORAGES, Storage, factor_parameters, left_rows
from rankfold.maths.spectrum import Spectrum
from rankfold.model.layer_matrix import MatrixLayer, matrix_shape


@dataclass(frozen=True)
class LowRankFactors:
    """A spectrum cut at a rank.

    Attributes:
        spectrum: Of the layer's matrix.
        rank: The rank.
        storage: How the factors are stored.
    """

    spectrum: Spectrum
    rank: int
    storage: Storage

    def dense(self, layer: MatrixLayer) -> Tensor:
        """The product itself: choosing pivots for it would take six times as long."""
        return self.spectrum.truncated(self.rank).to(layer.weight.device, layer.weight.dtype)

    def module(self, layer: MatrixLayer) -> LowRankLinear | LowRankConv2d:
        """The module that takes the layer's place."""
        return low_rank_module(layer, truncate(self.spectrum, self.rank, self.storage))


class LowRank:
    """One product of two factors (Eckart and Young 1936). It is written by its storage."""

    names: tuple[str, ...] = STORAGES
    storages: tuple[Storage, ...] = STORAGES
    setting: str | None = None

    def fits(self, layer: nn.Module) -> bool:
        """Every Linear and Conv2d."""
        return isinstance(layer, nn.Linear | nn.Conv2d)

    def curve(self, problem: LayerProblem) -> tuple[Curve, None]:
        """Ranks 1..r with their costs and predicted changes."""
        layer, storage = problem.layer, problem.storage
        return rank_curve(layer, problem.changes, problem.errors, storage, problem.price), None

    def kept(self, state: None, keep: Callable[[Tensor], Tensor]) -> None:
        """Nothing: the spectrum is the problem's."""

    def factors(
        self,
        problem: LayerProblem,
        choice: Choice,
        state: None,
        keep: Callable[[Tensor], Tensor],
    ) -> LowRankFactors:
        """The spectrum, cut at the choice's rank."""
        (rank,) = choice.ranks
        return LowRankFactors(problem.spectrum, rank, problem.storage)

    def size(
        self, layer: MatrixLayer, name: str, ranks: Sequence[int], storage: Storage, calls: Calls
    ) -> Size:
        """Parameters and FLOPs of both factors."""
        (rank,) = ranks
        kept = factor_parameters(*matrix_shape(layer), rank, storage)
        return Size(kept, 2 * calls.rows * kept)

    def empty(
        self, layer: MatrixLayer, name: str, ranks: Sequence[int], pivoted: bool
    ) -> LowRankLinear | LowRankConv2d:
        """A module of the right shapes, in the layer's dtype and device.

        Raises:
            ValueError: The layer has no such rank.
        """
        weight = layer.weight
        if len(ranks) != 1:
            raise ValueError(f"form {name} has one rank, not {tuple(ranks)}")
        (rank,) = ranks
        check_rank(rank, weight)
        storage: Storage = "pivoted" if name == "pivoted" else "pair"
        left = weight.new_empty(left_rows(weight.shape[0], rank, storage), rank)
        right = weight.new_empty(rank, *weight.shape[1:])
        rows = torch.arange(weight.shape[0], device=weight.device)
        order = rows if storage == "pivoted" else None
        bias = None if layer.bias is None else layer.bias.detach()
        if isinstance(layer, nn.Linear):
            return LowRankLinear(left, right, bias, order)
        return LowRankConv2d(left, right, layer, bias, order)


def rank_curve(
    layer: MatrixLayer, changes: Tensor, errors: Tensor | None, storage: Storage, price: int
) -> Curve:
    """Ranks 1..r of a layer with their costs and predicted changes.

    Args:
        layer: The layer.
        changes: ``(r,)`` predicted changes.
        errors: ``(r,)`` relative Frobenius errors, for the first-order rule.
        storage: Decides the cost of a rank.
        price: Cost of a parameter: 1, or 2 x rows for FLOPs.
    """
    out, in_ = matrix_shape(layer)
    return Curve(
        ranks=torch.arange(1, len(changes) + 1),
        costs=rank_costs(layer, storage, price),
        changes=changes,
        dense_cost=out * in_ * price,
        errors=errors,
    )


def rank_costs(layer: MatrixLayer, storage: Storage, price: int) -> Tensor:
    """Cost of every rank 1..min(out, in) of a layer, int64.

    Args:
        layer: The layer.
        storage: Of the factors.
        price: Cost of a parameter: 1, or 2 x rows for FLOPs.
    """
    out, in_ = matrix_shape(layer)
    ranks = range(1, min(out, in_) + 1)
    return torch.tensor([factor_parameters(out, in_, rank, storage) for rank in ranks]) * price


def check_rank(rank: int, weight: Tensor) -> None:
    """Refuse a rank that a weight hasn't.

    Raises:
        ValueError: It is above min(out, in).
    """
    if rank > min(weight.shape[0], weight[0].numel()):
        raise ValueError(f"rank {rank} is above what a weight of shape {tuple(weight.shape)} has")


LOW_RANK = LowRank()
