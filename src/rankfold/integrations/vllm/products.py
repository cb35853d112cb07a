"""Several factorized matrices that share their inputs, as few products.

vLLM computes queries, keys and values in one layer, and so gate and up. Each of these matrices has
a form and ranks of its own here. All first factors are stacked: one product gives what all second
factors need, the pivot outputs, and the outputs of the matrices that are dense. The second factors
follow, one each, and one gather puts all outputs into their order.

With tensor parallelism a process holds some outputs, or some inputs, of each matrix. Pivots and
their coefficients are cut accordingly; the sum or the joint outputs of all processes are those of
the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class ByRows:
    """A matrix ``(out, in)`` whose outputs are those of a product, or combinations of them.

    Attributes:
        first: ``(hidden, in)``.
        seconds: Each a range of ``hidden`` by its start, and a matrix ``(more, range)``.
        order: ``(out,)``, which of ``[hidden; more of all seconds]`` each output is.
    """

    first: Tensor
    seconds: tuple[tuple[int, Tensor], ...]
    order: Tensor

    def of(self, rows: Tensor | None, columns: slice | None) -> ByRows:
        """The outputs ``rows`` as far as the inputs ``columns`` make them; None: all."""
        first = self.first if columns is None else self.first[:, columns]
        if rows is None:
            return ByRows(first, self.seconds, self.order)
        order, hidden = self.order[rows], len(first)
        here: list[tuple[int, Tensor]] = []
        used = torch.zeros(hidden, dtype=torch.bool, device=order.device)
        used[order[order < hidden]] = True
        begin, place = hidden, torch.full((self._pool(),), -1, device=order.device)
        wanted = torch.zeros(self._pool(), dtype=torch.bool, device=order.device)
        wanted[order] = True
        for start, matrix in self.seconds:
            kept = wanted[begin : begin + len(matrix)]
            if kept.any():
                here.append((start, matrix[kept]))
                used[start : start + matrix.shape[1]] = True
            begin += len(matrix)
        # Where what is kept of the pool stands now.
        kept = torch.cat([used, wanted[hidden:]])
        place[kept] = torch.arange(int(kept.sum()), device=order.device)
        moved = tuple((int(place[start]), matrix) for start, matrix in here)
        return ByRows(first[used], moved, place[order])

    def _pool(self) -> int:
        return len(self.first) + sum(len(matrix) for _, matrix in self.seconds)


@dataclass(frozen=True)
class ByColumns:
    """A matrix ``(out, in)`` some of whose inputs are combined into others before its product.

    Attributes:
        order: ``(in,)``, which input each line of ``[pivots of all blocks; others of all blocks]``
            is; ``width`` stands for zero.
        factors: A block's ``(pivots, others)``.
        shared: ``(out, all pivots)``.
        width: Inputs that there are.
    """

    order: Tensor
    factors: tuple[Tensor, ...]
    shared: Tensor
    width: int

    def of(self, rows: Tensor | None, columns: slice | None) -> ByColumns:
        """The outputs ``rows`` as far as the inputs ``columns`` make them; None: all."""
        shared = self.shared if rows is None else self.shared[rows]
        if columns is None:
            return ByColumns(self.order, self.factors, shared, self.width)
        start, stop, _ = columns.indices(self.width)
        here = (self.order >= start) & (self.order < stop)
        pivots = shared.shape[1]
        lines = [torch.where(here, self.order - start, stop - start)[:pivots]]
        factors: list[Tensor] = []
        begin = pivots
        for factor in self.factors:
            kept = here[begin : begin + factor.shape[1]]
            lines.append(self.order[begin : begin + factor.shape[1]][kept] - start)
            factors.append(factor[:, kept])
            begin += factor.shape[1]
        return ByColumns(torch.cat(lines), tuple(factors), shared, stop - start)


Part = ByRows | ByColumns


def dense(weight: Tensor) -> ByRows:
    """A matrix as it is."""
    return ByRows(weight, (), torch.arange(len(weight), device=weight.device))


def pair(left: Tensor, right: Tensor) -> ByRows:
    """``left @ right``."""
    outputs = torch.arange(len(left), device=left.device)
    return ByRows(right, ((0, left),), len(right) + outputs)


def pivoted(left: Tensor, right: Tensor, order: Tensor) -> ByRows:
    """``[right; left @ right]`` in an order."""
    return ByRows(right, ((0, left),) if len(left) else (), order.long())


def row_blocks(shared: Tensor, first: Tensor, second: Tensor, order: Tensor) -> ByRows:
    """The pivots of two sets of outputs, and the other outputs of each by its own pivots."""
    blocks = ((0, first), (first.shape[1], second))
    return ByRows(shared, tuple(b for b in blocks if len(b[1])), order.long())


def column_blocks(shared: Tensor, first: Tensor, second: Tensor, order: Tensor) -> ByColumns:
    """The pivots of two sets of inputs, to which the other inputs of each are added."""
    return ByColumns(order.long(), (first, second), shared, len(order))


FORMS: Mapping[str, tuple[tuple[str, ...], Callable[..., Part]]] = {
    "dense": (("weight",), dense),
    "pair": (("left", "right"), pair),
    "pivoted": (("left", "right", "order"), pivoted),
    "row-blocks": (("shared", "first", "second", "order"), row_blocks),
    "column-blocks": (("shared", "first", "second", "order"), column_blocks),
}


def shapes(form: str, ranks: Sequence[int], out: int, in_: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a form's tensors."""
    if form == "dense":
        return {"weight": (out, in_)}
    if form in ("pair", "pivoted"):
        (k,) = ranks
        pivots = {"left": (out - k, k), "right": (k, in_), "order": (out,)}
        return pivots if form == "pivoted" else {"left": (out, k), "right": (k, in_)}
    long = out if form == "row-blocks" else in_
    sizes = (long - long // 2, long // 2)
    first, second = ((n - k, k) for n, k in zip(sizes, ranks, strict=True))
    if form == "row-blocks":
        return {"shared": (sum(ranks), in_), "first": first, "second": second, "order": (out,)}
    return {
        "shared": (out, sum(ranks)), "first": first[::-1], "second": second[::-1], "order": (in_,),
    }  # fmt: skip


def scores(weight: Tensor, mix: Tensor, order: Tensor | None) -> Part:
    """The head of a factorized embedding matrix: ``(words, rank)`` and ``(dim, rank)``.

    With an order ``mix`` is ``(dim - rank, rank)``: how the other columns follow from pivots.
    """
    if order is None:
        return pair(weight, mix.T.contiguous())
    return ByColumns(order.long().argsort(), (mix.T.contiguous(),), weight, len(order))


class Products(nn.Module):
    """The matrices of one layer, computed together.

    Args:
        parts: In the order of their outputs.
        product: Makes of a weight ``(out, in)`` a module from ``(rows, in)`` to ``(rows, out)``.
    """

    order: Tensor | None

    def __init__(self, parts: Sequence[Part], product: Callable[[Tensor], nn.Module]) -> None:
        super().__init__()
        by_rows = [part for part in parts if isinstance(part, ByRows)]
        by_columns = [part for part in parts if isinstance(part, ByColumns)]
        self.stacked = product(torch.cat([p.first for p in by_rows])) if by_rows else None
        self.seconds = nn.ModuleList(product(m) for p in by_rows for _, m in p.seconds)
        self.columns = nn.ModuleList(_Columns(part, product) for part in by_columns)
        self.ranges, order = _placed(parts)
        # Hidden values none of which is an output stay out of the pool.
        hidden = sum(len(part.first) for part in by_rows)
        self.hidden_too = bool((order < hidden).any())
        order = order if self.hidden_too else order - hidden
        self.one = int(self.hidden_too) + len(self.seconds) + len(self.columns) == 1
        plain = torch.arange(len(order), device=order.device)
        self.register_buffer(
            "order", None if torch.equal(order, plain) else order, persistent=False
        )

    def forward(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        pool: list[Tensor] = []
        if self.stacked is not None:
            hidden = self.stacked(rows)
            pool += [hidden] if self.hidden_too else []
            for (start, stop), second in zip(self.ranges, self.seconds, strict=True):
                pool.append(second(hidden[:, start:stop]))
        pool += [columns(rows) for columns in self.columns]
        outputs = pool[0] if self.one else torch.cat(pool, dim=-1)
        if self.order is not None:
            outputs = outputs.index_select(-1, self.order)
        if bias is not None:
            outputs = outputs + bias
        return outputs.view(*inputs.shape[:-1], outputs.shape[-1])


def _placed(parts: Sequence[Part]) -> tuple[list[tuple[int, int]], Tensor]:
    """Where each second factor's inputs are, and where each output is.

    Returns:
        ``(ranges of all hidden values, (out,) places in [all hidden; all seconds; all columns])``.
    """
    by_rows = [part for part in parts if isinstance(part, ByRows)]
    hidden, second = 0, sum(len(part.first) for part in by_rows)
    column = second + sum(len(matrix) for part in by_rows for _, matrix in part.seconds)
    ranges: list[tuple[int, int]] = []
    places: list[Tensor] = []
    for part in parts:
        if isinstance(part, ByColumns):
            outputs = torch.arange(len(part.shared), device=part.order.device)
            places.append(outputs + column)
            column += len(part.shared)
            continue
        own = len(part.first)
        places.append(torch.where(part.order < own, part.order + hidden, part.order - own + second))
        for start, matrix in part.seconds:
            ranges.append((hidden + start, hidden + start + matrix.shape[1]))
            second += len(matrix)
        hidden += own
    return ranges, torch.cat(places)


class _Columns(nn.Module):
    """The products of a ``ByColumns``."""

    order: Tensor

    def __init__(self, part: ByColumns, product: Callable[[Tensor], nn.Module]) -> None:
        super().__init__()
        self.pivots = [len(factor) for factor in part.factors]
        self.others = [factor.shape[1] for factor in part.factors]
        self.factors = nn.ModuleList(product(f.contiguous()) for f in part.factors if f.shape[1])
        self.shared = product(part.shared.contiguous())
        self.padded = bool((part.order >= part.width).any())
        self.register_buffer("order", part.order, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Map ``(rows, in)`` to ``(rows, out)``."""
        rows = functional.pad(rows, (0, 1)) if self.padded else rows
        lines = rows.index_select(-1, self.order)
        pivots, *others = lines.split([sum(self.pivots), *self.others], dim=-1)
        mixed: list[Tensor] = []
        place = iter(self.factors)
        begin = 0
        for count, other in zip(self.pivots, others, strict=True):
            own = pivots[:, begin : begin + count]
            mixed.append(own + next(place)(other) if other.shape[1] else own)
            begin += count
        hidden = mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=-1)
        outputs: Tensor = self.shared(hidden)
        return outputs
