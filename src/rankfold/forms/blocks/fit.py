"""From a layer's matrix and statistics to its block forms of every pair of ranks.

The long side is cut in two halves: the rows (or columns) that matter most, and the others. What
matters is ``B_ii (W A W^T)_ii``, the loss predicted for leaving row i out. Each half has the
spectrum of a layer of its own, under its own part of the Grams: from these come the ranks. What
both halves' errors do to each other is counted in the predicted change of every pair of ranks.

At its ranks each half also makes up for the other's error (``block_factors``): with the error E_2
of the second half given, the loss is lowest where the first is the truncation of
``W_1 - B_11^-1 B_12 E_2`` in place of W_1, and they take turns. What that takes off the predicted
change is nearly the same share at any ranks, so that of one pair stands for all.

The turns start from the truncation of the second half alone, whose directions are kept (``Cut``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from rankfold.forms.blocks.modules import (
    BlockForm,
    BlocksConv2d,
    ColumnBlocksLinear,
    RowBlocksLinear,
    block_module,
    block_sizes,
    check_block_ranks,
    has_blocks,
)
from rankfold.forms.factors import pivoted
from rankfold.forms.layer import take_flags
from rankfold.maths.knapsack import hull
from rankfold.maths.linalg import damped, descending_eigh, inverse_factor, whitening
from rankfold.maths.spectrum import Spectrum, whitened_spectrum
from rankfold.model.layer_matrix import MatrixLayer, kept_dtype, matrix_shape

# How often a half is truncated, both together, after the second one alone. On SmolLM2 three come
# within half a percent of what five reach (docs/notebook/forms.md).
TURNS = 3

# Added to a half's Gram, as a share of its mean eigenvalue, where it makes up for the error of the
# other: truncation smooths over what the data show only by chance, this regression of one half's
# errors on the other's does not (docs/notebook/forms.md).
RIDGE = 0.3


def block_form(layer: nn.Module) -> BlockForm | None:
    """The block form that a layer may take, None where a half of it would not be long any more.

    On SmolLM2 (docs/notebook/forms.md) blocks of the square layers gain nothing.
    """
    if not has_blocks(layer):
        return None
    out, in_ = matrix_shape(cast("MatrixLayer", layer))
    if max(out, in_) // 2 <= min(out, in_):
        return None
    return "row-blocks" if out > in_ else "column-blocks"


@dataclass(frozen=True)
class Cut:
    """How a weight is cut in halves, and where they start to make up for each other.

    Attributes:
        form: ``row-blocks``; or ``column-blocks``, for which all is that of the transposed weight.
        order: ``(long side,)`` rows (columns) of the weight, those of the first half first.
        directions: ``(r, short side)``, singular directions of the second half where A is the
            identity, the largest first: its truncation alone keeps the first so many.
    """

    form: BlockForm
    order: Tensor
    directions: Tensor


@dataclass(frozen=True)
class BlockSpectra:
    """The spectra of both halves of a weight.

    Attributes:
        form: ``row-blocks``; or ``column-blocks``, for which all is that of the transposed weight.
        order: ``(long side,)`` rows (columns) of the weight, those of the first half first.
        halves: Spectra of both.
    """

    form: BlockForm
    order: Tensor
    halves: tuple[Spectrum, Spectrum]

    def cut(
        self, input_gram: Tensor, output_gram: Tensor, dtype: torch.dtype = torch.float64
    ) -> Cut:
        """What of them ``block_factors`` starts from.

        Args:
            input_gram: A that they were made with, ``(in, in)`` float64.
            output_gram: B, ``(out, out)`` float64, likewise.
            dtype: To keep it in.
        """
        a = input_gram if self.form == "row-blocks" else output_gram
        # Their norms are 1 already, or the singular values where the half is wider than long.
        directions = normalize(self.halves[1].right @ (a @ inverse_factor(a)), dim=1)
        return Cut(self.form, self.order, directions.to(dtype))


@dataclass(frozen=True)
class BlockFactors:
    """A weight of two halves, each of low rank.

    Attributes:
        form: ``row-blocks``; or ``column-blocks``, for which all is that of the transposed weight.
        order: ``(long side,)`` rows (columns) of the weight, those of the first half first.
        halves: Of both, ``(rows, k)`` and ``(k, short side)``; a half is their product. In float64,
            or as ``kept``.
    """

    form: BlockForm
    order: Tensor
    halves: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

    @property
    def ranks(self) -> tuple[int, int]:
        """Ranks of both halves."""
        first, second = self.halves
        return len(first[1]), len(second[1])

    def kept(self, keep: Callable[[Tensor], Tensor]) -> BlockFactors:
        """The same with what ``keep`` makes of factors, where those of all layers are kept."""
        first, second = ((keep(left), keep(right)) for left, right in self.halves)
        return BlockFactors(self.form, self.order, (first, second))

    def _exact(self) -> list[tuple[Tensor, Tensor]]:
        return [(left.to(torch.float64), right.to(torch.float64)) for left, right in self.halves]

    def weight(self) -> Tensor:
        """The weight, ``(out, in)`` float64."""
        rows = [left @ right for left, right in self._exact()]
        weight = torch.cat(rows)[torch.argsort(self.order)]
        return weight if self.form == "row-blocks" else weight.T

    def module(self, layer: MatrixLayer) -> RowBlocksLinear | ColumnBlocksLinear | BlocksConv2d:
        """The module that replaces a layer: its dtype, device and bias kept."""
        parts = [pivoted(left, right) for left, right in self._exact()]
        # order[i] of a factor is the place of its row i among [pivots; rest].
        placed = [
            rows[torch.argsort(cast("Tensor", part.order))]
            for rows, part in zip(split_rows(self.order), parts, strict=True)
        ]
        pivots = [rows[:rank] for rows, rank in zip(placed, self.ranks, strict=True)]
        rest = [rows[rank:] for rows, rank in zip(placed, self.ranks, strict=True)]
        like = layer.weight
        shared, first, second = (
            factor.to(like.device, like.dtype)
            for factor in (torch.cat([p.right for p in parts]), parts[0].left, parts[1].left)
        )
        lines = torch.cat([*pivots, *rest]).to(like.device)
        module = block_module(layer, self.form, shared, (first, second), lines)
        take_flags(module, layer)
        return module


def split_rows(order: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of both halves."""
    first, second = torch.split(order, list(block_sizes(len(order))))
    return first, second


def _by_rows(
    weight: Tensor, input_gram: Tensor, output_gram: Tensor, form: BlockForm
) -> tuple[Tensor, Tensor, Tensor]:
    """W, A and B of the matrix whose rows are cut, float64: transposed for ``column-blocks``."""
    w = weight.detach().to(torch.float64)
    if form == "row-blocks":
        return w, input_gram, output_gram
    return w.T, output_gram, input_gram


def importance_order(weight: Tensor, input_gram: Tensor, output_gram: Tensor) -> Tensor:
    """Rows of a weight by the loss predicted for leaving each out, the largest first.

    Args:
        weight: ``(out, in)``.
        input_gram: A, ``(in, in)`` float64.
        output_gram: B, ``(out, out)`` float64.
    """
    w = weight.detach().to(torch.float64)
    lost = ((w @ input_gram) * w).sum(1) * output_gram.diagonal()
    return torch.argsort(lost, descending=True, stable=True)


def block_spectra(
    weight: Tensor,
    input_gram: Tensor,
    output_gram: Tensor,
    form: BlockForm,
    order: Tensor | None = None,
) -> BlockSpectra:
    """The spectra of both halves, each exact for itself (``spectrum.whitened_spectrum``).

    Args:
        weight: ``(out, in)``, moved by the step.
        input_gram: A, ``(in, in)`` float64, damped as wanted.
        output_gram: B, ``(out, out)`` float64, likewise.
        form: Which side is cut.
        order: Rows (columns), those of the first half first; None: by importance.
    """
    w, a, b = _by_rows(weight, input_gram, output_gram, form)
    if order is None:
        order = importance_order(w, a, b)
    halves = [whitened_spectrum(w[rows], a, b[rows][:, rows]) for rows in split_rows(order)]
    return BlockSpectra(form, order, (halves[0], halves[1]))


def block_factors(
    weight: Tensor,
    input_gram: Tensor,
    output_gram: Tensor,
    cut: Cut,
    ranks: Sequence[int],
    *,
    turns: int = TURNS,
    ridge: float = RIDGE,
) -> BlockFactors:
    """Both halves at given ranks, each making up for the error of the other.

    The halves are truncated in turn, the first one first, for the error that the truncation of the
    second one alone would make. Without a ridge each is the best of its rank for the other half as
    it stands (block coordinate descent), so the predicted change falls with every turn.

    Args:
        weight: ``(out, in)``, moved by the step.
        input_gram: A, ``(in, in)`` float64, damped as wanted.
        output_gram: B, ``(out, out)`` float64, likewise.
        cut: From the spectra of this weight under these Grams.
        ranks: Of both halves.
        turns: How many truncations, of both halves together; 2 or more.
        ridge: More damping where a half makes up for the other's error.

    Raises:
        ValueError: A half has no such rank.
    """
    check_block_ranks(weight.shape[0], weight.shape[1], cut.form, ranks)
    dtype = kept_dtype(weight)
    w, a, b = _by_rows(weight, input_gram, output_gram, cut.form)
    parts = split_rows(cut.order)
    q = inverse_factor(a)
    whole = (w @ (a @ q)).to(dtype)  # in coordinates where A is the identity
    targets = [whole[rows] for rows in parts]
    halves = [b[rows][:, rows] for rows in parts]
    answers = [whitening(damped(half, ridge), dtype) for half in halves]
    grams = [half.to(dtype) for half in halves]
    across = b[parts[0]][:, parts[1]].to(dtype)
    kept = cut.directions[: ranks[1]].to(whole)
    errors = {1: (targets[1] @ kept.T) @ kept - targets[1]}
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for turn in range(turns):
        half, other = turn % 2, 1 - turn % 2
        pull = (across if half == 0 else across.T) @ errors[other]
        answer = answers[half]  # B_11^-1 B_12 E_2, or B_22^-1 B_21 E_1
        wanted = targets[half] - answer.up(answer.down(pull))
        _, v = descending_eigh(wanted.T @ (grams[half] @ wanted))
        left, v = wanted @ v[:, : ranks[half]], v[:, : ranks[half]]
        errors[half] = left @ v.T - targets[half]
        found[half] = left, v.T @ q.T.to(dtype)
    return BlockFactors(cut.form, cut.order, (found[0], found[1]))


def block_changes(blocks: BlockSpectra, input_gram: Tensor, output_gram: Tensor) -> Tensor:
    """Predicted loss change of every pair of truncated spectra, ``(r1 + 1, r2 + 1)`` float64.

    ``1/2 tr(B E A E^T)`` for the error E of both halves together. Beside each half's own change it
    has ``tr(B_12 E_2 A E_1^T)``, for all pairs of ranks a sum over a trailing block of
    ``(L_1^T B_12 L_2) * (R_1 A R_2^T)``.

    Args:
        blocks: From ``block_spectra``.
        input_gram: A, ``(in, in)`` float64, as measured.
        output_gram: B, ``(out, out)`` float64, likewise.
    """
    a, b = input_gram, output_gram
    if blocks.form == "column-blocks":
        a, b = b, a
    first, second = blocks.halves
    rows, others = split_rows(blocks.order)
    own = [
        half.changes_under(a, b[part][:, part])
        for half, part in zip(blocks.halves, (rows, others), strict=True)
    ]
    left = first.left.T @ b[rows][:, others] @ second.left
    products = left * (first.right @ a @ second.right.T)
    between = torch.zeros(len(own[0]), len(own[1]), dtype=a.dtype, device=a.device)
    between[:-1, :-1] = products.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1)
    return (own[0][:, None] + own[1] + between).clamp(min=0)


def ranks_worth_having(changes: Tensor, form: BlockForm, shape: Sequence[int]) -> Tensor:
    """The pairs of ranks on the way that spends each parameter best, ``(n, 2)`` int64.

    Each half's own way is the lower convex hull of its changes with the other half whole; both are
    joined by their steepest steps.

    Args:
        changes: From ``block_changes``.
        form: Which side is cut.
        shape: ``(out, in)`` of the weight.
    """
    out, in_ = shape
    long_side, short_side = (out, in_) if form == "row-blocks" else (in_, out)
    table = changes.cpu().numpy()
    ways = []
    for size, own in zip(block_sizes(long_side), (table[1:, -1], table[-1, 1:]), strict=True):
        ranks = np.arange(1, len(own) + 1)
        ways.append((ranks * (size + short_side - ranks), own))
    return torch.from_numpy(1 + _joined_ways(ways))


def _joined_ways(
    curves: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]],
) -> NDArray[np.int64]:
    """Positions ``(n, 2)`` on two curves, from the cheapest pair up by the steepest steps."""
    hulls = [hull(costs, changes) for costs, changes in curves]
    steps = []
    for which, ((costs, changes), places) in enumerate(zip(curves, hulls, strict=True)):
        slopes = np.diff(changes[places]) / np.diff(costs[places])
        steps += [(slope, which, place) for slope, place in zip(slopes, places[1:], strict=True)]
    at = [int(places[0]) for places in hulls]
    way = [tuple(at)]
    for _, which, place in sorted(steps):
        at[which] = int(place)
        way.append(tuple(at))
    return np.array(way, dtype=np.int64)
