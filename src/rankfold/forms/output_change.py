"""What a factorized layer's outputs have in common, and the layer with its output factor changed.

The outputs of a rank-k layer are combinations of k of them, its pivots. So ``y + C y[pivots]`` is
the output of another layer of the same form and ranks, whatever the coefficients C: they are
multiplied into the factor that stands at the outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

from rankfold.forms.blocks.modules import BlocksConv2d, ColumnBlocksLinear, RowBlocksLinear
from rankfold.forms.conv.modules import SpatialConv2d, TuckerConv2d
from rankfold.forms.factors import pivoted
from rankfold.forms.low_rank.modules import LowRankConv2d, LowRankLinear
from rankfold.forms.storage import with_identity_rows
from rankfold.maths.linalg import pivot_rows

Factorized: TypeAlias = (
    LowRankLinear
    | LowRankConv2d
    | RowBlocksLinear
    | ColumnBlocksLinear
    | BlocksConv2d
    | SpatialConv2d
    | TuckerConv2d
)


@dataclass(frozen=True)
class Group:
    """Outputs that are combinations of a few of them.

    Attributes:
        rows: ``(r,)`` outputs.
        pivots: ``(k,)`` those of them that all the others are combinations of.
    """

    rows: Tensor
    pivots: Tensor

    def features(self, outputs: Tensor, bias: Tensor | None) -> Tensor:
        """The pivots of ``(n, out)`` outputs without their bias, ``(n, k)``."""
        # As a matrix: of more axes torch picks columns many times as slowly.
        features = outputs.index_select(1, self.pivots)
        return features if bias is None else features - bias[self.pivots]


@dataclass(frozen=True)
class OutputChange:
    """A linear change of a layer's outputs: ``y[rows] += coefficients @ y[pivots]``, then a shift.

    Attributes:
        groups: Of the layer.
        coefficients: ``(r, k)`` for each group; of outputs without their bias.
        shift: ``(out,)`` added to the bias, None where the layer has none.
    """

    groups: Sequence[Group]
    coefficients: Sequence[Tensor]
    shift: Tensor | None

    def of_lines(self, lines: Tensor) -> Tensor:
        """The lines ``(out, n)`` of a factor at the outputs, changed."""
        changed = lines.clone()
        for group, coefficients in zip(self.groups, self.coefficients, strict=True):
            changed[group.rows] += coefficients.to(lines) @ lines[group.pivots]
        return changed

    def of_outputs(self, outputs: Tensor, bias: Tensor | None) -> Tensor:
        """Outputs ``(..., out)`` of the layer, with its bias if it has one, changed likewise."""
        values = outputs.flatten(0, -2)
        changed = values.clone()
        for group, coefficients in zip(self.groups, self.coefficients, strict=True):
            added = group.features(values, bias) @ coefficients.T.to(outputs)
            changed.index_add_(1, group.rows, added)
        if self.shift is not None:
            changed += self.shift.to(outputs)
        return changed.view(outputs.shape)


def output_groups(module: Factorized) -> list[Group]:
    """The groups of a factorized layer's outputs: one, or one for each block of rows."""
    if isinstance(module, BlocksConv2d):
        return output_groups(module.matrix)
    if isinstance(module, RowBlocksLinear):
        return _row_blocks(module)
    if isinstance(module, (LowRankLinear, LowRankConv2d)):
        return [_all_outputs(module.left, module.order)]
    if isinstance(module, TuckerConv2d) and module.last is not None:
        return [_all_outputs(module.last, module.last_order)]
    if isinstance(module, ColumnBlocksLinear):
        return [_all_outputs(module.shared, None)]
    if isinstance(module, SpatialConv2d):
        return [_all_outputs(_kernel_lines(module), None)]
    return [_all_outputs(module.core.flatten(1), None)]


def with_output_change(module: Factorized, change: OutputChange) -> Factorized:
    """A copy of a factorized layer, of the same form and ranks, that computes the changed outputs.

    Pivots are chosen anew, so that coefficients stay as small as those of a new layer.
    """
    twin = copy.deepcopy(module)
    with torch.no_grad():
        _multiply_in(twin, change)
        if change.shift is not None and twin.bias is not None:
            twin.bias.add_(change.shift.to(twin.bias))
    return twin


def _multiply_in(module: Factorized, change: OutputChange) -> None:
    if isinstance(module, BlocksConv2d):
        _multiply_in(module.matrix, change)
    elif isinstance(module, RowBlocksLinear):
        _change_row_blocks(module, change)
    elif isinstance(module, (LowRankLinear, LowRankConv2d)):
        lines = change.of_lines(module.full_left().double())
        module.order = _store(lines, module.left, module.right, module.order)
    elif isinstance(module, ColumnBlocksLinear):
        _assign(module.shared, change.of_lines(module.shared.double()))
    elif isinstance(module, SpatialConv2d):
        rank = module.ranks[0]
        lines = change.of_lines(_kernel_lines(module).double()).view(-1, rank)
        module.order = _store(lines, module.second, module.first, module.order)
    elif module.last is None:
        _assign(module.core, change.of_lines(module.core.double().flatten(1)))
    else:
        lines = with_identity_rows(module.last.double(), module.last_order)
        lines = change.of_lines(lines)
        module.last_order = _store(lines, module.last, module.core, module.last_order)


def _all_outputs(factor: Tensor, order: Tensor | None) -> Group:
    """The one group of a factor at the outputs, as it is stored."""
    if order is None:
        rank = min(factor.shape)
        # Of a wide factor each output is a pivot.
        pivots = (
            pivot_rows(factor.detach().double()).order[:rank]
            if factor.shape[0] > rank
            else torch.arange(rank, device=factor.device)
        )
        return Group(torch.arange(len(factor), device=factor.device), pivots.to(factor.device))
    return Group(
        torch.arange(len(order), device=order.device),
        torch.argsort(order)[: factor.shape[1]],
    )


def _row_blocks(module: RowBlocksLinear) -> list[Group]:
    sizes = [*module.ranks, len(module.first), len(module.second)]
    first, second, *rest = torch.split(torch.argsort(module.order), sizes)
    return [Group(torch.cat([p, r]), p) for p, r in zip((first, second), rest, strict=True)]


def _change_row_blocks(module: RowBlocksLinear, change: OutputChange) -> None:
    """Each block has pivots, coefficients, and columns of the output factor of its own."""
    rows: list[Tensor] = []
    pivots: list[Tensor] = []
    shared: list[Tensor] = []
    blocks = zip(
        _row_blocks(module),
        (module.first, module.second),
        torch.split(module.shared, list(module.ranks)),
        change.coefficients,
        strict=True,
    )
    for group, factor, old, coefficients in blocks:
        rank = len(group.pivots)
        # The block's lines in terms of its old pivots.
        own = torch.cat([torch.eye(rank).to(factor), factor]).double()
        own += coefficients.to(own)
        factors = pivoted(own, old.double())
        _assign(factor, factors.left)
        shared.append(factors.right)
        places = group.rows[torch.argsort(cast("Tensor", factors.order))]
        pivots.append(places[:rank])
        rows.append(places[rank:])
    _assign(module.shared, torch.cat(shared))
    module.order = torch.argsort(torch.cat([*pivots, *rows])).to(module.order)


def _store(lines: Tensor, left: Tensor, right: Tensor, order: Tensor | None) -> Tensor | None:
    """Put an output factor's changed lines ``(out, k)`` into the factors; returns their order."""
    if order is None:
        _assign(left, lines)
        return None
    factors = pivoted(lines, right.double().flatten(1))
    _assign(left, factors.left)
    _assign(right, factors.right)
    return cast("Tensor", factors.order).to(order)


def _kernel_lines(module: SpatialConv2d) -> Tensor:
    """The second factor of a spatial form, ``(out, taps * rank)``."""
    lines = with_identity_rows(module.second, module.order)
    return lines.reshape(module.out_channels, -1)


def _assign(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values.view_as(parameter))
