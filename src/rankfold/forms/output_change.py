"""What a factorized layer's outputs have in common, and a change of them that it can take up.

The outputs of a rank-k layer are combinations of k of them, its pivots. So ``y + C y[pivots]`` is
the output of another layer of the same form and ranks, whatever the coefficients C: they are
multiplied into the factor that stands at the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from rankfold.forms.factors import pivoted
from rankfold.maths.linalg import pivot_rows


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


def all_outputs(factor: Tensor, order: Tensor | None) -> Group:
    """The one group of a factor at the outputs, as it is stored.

    Args:
        factor: ``(out, k)``, or ``(out - k, k)`` with an order.
        order: ``(out,)``, which row of ``[identity; factor]`` each output is; None: a plain factor.
    """
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


def put_lines(lines: Tensor, left: Tensor, right: Tensor, order: Tensor | None) -> Tensor | None:
    """Put an output factor's changed lines ``(out, k)`` into the factors; returns their order.

    Pivots are chosen anew, so that coefficients stay as small as those of a new layer.
    """
    if order is None:
        put_values(left, lines)
        return None
    factors = pivoted(lines, right.double().flatten(1))
    put_values(left, factors.left)
    put_values(right, factors.right)
    return cast("Tensor", factors.order).to(order)


def put_values(parameter: Tensor, values: Tensor) -> None:
    """Overwrite a parameter with as many values, in its own shape and type."""
    parameter.copy_(values.view_as(parameter))
