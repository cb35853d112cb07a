"""Factorized Linear and 1x1 Conv2d of two blocks, each with its own rank: block low rank (BLR).

A matrix that is much longer than wide, as those around a transformer's hidden layer are, costs a
rank-k factorization k (out + in - k) parameters, most of them for the long side. Cut in two across
it, each half is nearer to a square, and the half that matters more may keep more.
Only halves that are still longer than wide are made, so that no factor is empty:

- ``row-blocks``: two sets of outputs, for layers with more outputs than inputs;
- ``column-blocks``: two sets of inputs, for the others.

Both blocks are pivoted (``rankfold.forms.storage``). The lines (rows or columns) of the matrix are
held as ``[pivots of the first; pivots of the second; rest of the first; rest of the second]``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.forms.factored_weight import FactoredWeight
from rankfold.forms.factors import pivoted
from rankfold.forms.layer import ConvStandIn, FactorizedLayer, conv_part, mixing_conv, stock_conv
from rankfold.forms.output_change import Group, OutputChange, all_outputs, put_values
from rankfold.forms.pivoted_product import pivoted_features
from rankfold.forms.storage import features_in_order
from rankfold.model.layer_matrix import MatrixLayer, matrix_shape
from rankfold.model.stock_layers import linear

BlockForm: TypeAlias = Literal["row-blocks", "column-blocks"]
BLOCK_FORMS: tuple[BlockForm, ...] = ("row-blocks", "column-blocks")


def block_sizes(long_side: int) -> tuple[int, int]:
    """Rows (or columns) of both blocks."""
    return long_side - long_side // 2, long_side // 2


def block_parameters(out: int, in_: int, form: BlockForm, ranks: Sequence[int]) -> int:
    """Parameters of an ``(out, in_)`` matrix in a block form, bias not counted."""
    long_side, short_side = (out, in_) if form == "row-blocks" else (in_, out)
    sizes = block_sizes(long_side)
    return sum(k * (size + short_side - k) for k, size in zip(ranks, sizes, strict=True))


def check_block_ranks(out: int, in_: int, form: BlockForm, ranks: Sequence[int]) -> None:
    """Refuse ranks that an ``(out, in_)`` matrix has not in a block form.

    Raises:
        ValueError: A block has no such rank.
    """
    long_side, short_side = (out, in_) if form == "row-blocks" else (in_, out)
    sizes = block_sizes(long_side)
    if not all(1 <= k <= min(n, short_side) for k, n in zip(ranks, sizes, strict=True)):
        raise ValueError(f"a {(out, in_)} weight has no {form} of ranks {tuple(ranks)}")


class _BlockLinear(FactorizedLayer):
    """What both block forms share.

    Args:
        shared: All pivot rows (or columns) of both blocks, ``(k1 + k2, in)`` or ``(out, k1 + k2)``.
        first: ``(n1 - k1, k1)``, the other rows of the first block by its pivots; of columns
            ``(k1, n1 - k1)``.
        second: ``(n2 - k2, k2)`` or ``(k2, n2 - k2)``, likewise of the second.
        order: ``(n1 + n2,)`` integers by which the forward pass picks: of rows, which line each
            output is; of columns, which input each line is.
        bias: ``(out,)`` or None; copied.
    """

    takes_changes = True
    form: BlockForm
    order: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, shared: Tensor, first: Tensor, second: Tensor, order: Tensor, bias: Tensor | None
    ):
        super().__init__()
        self.shared = nn.Parameter(shared.contiguous())
        self.first = nn.Parameter(first.contiguous())
        self.second = nn.Parameter(second.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        # int32: it is stored with the weights, and no layer has 2^31 outputs.
        self.register_buffer("order", order.to(torch.int32))

    @property
    @abstractmethod
    def ranks(self) -> tuple[int, int]:
        """Ranks of both blocks."""

    @property
    @abstractmethod
    def in_features(self) -> int:
        """Inputs."""

    @property
    @abstractmethod
    def out_features(self) -> int:
        """Outputs."""

    @property
    def weight(self) -> Tensor:
        """What the dense layer's ``weight`` would be; multiplied out when it is computed with."""
        shape = (self.out_features, self.in_features)
        return FactoredWeight.of(self.dense_matrix, shape, self.shared)

    @abstractmethod
    def dense_matrix(self) -> Tensor:
        """The factors multiplied out, ``(out, in)``."""

    def _lines(self, first: Tensor, second: Tensor) -> Tensor:
        """All lines by all pivots, zeros between the blocks, ``(n1 + n2, k1 + k2)``."""
        identity = torch.eye(sum(self.ranks), dtype=first.dtype, device=first.device)
        return torch.cat([identity, torch.block_diag(first, second)])

    def to_dense(self) -> nn.Linear:
        """The same layer as one ``nn.Linear``, factors multiplied out."""
        return linear(self.dense_matrix().detach(), self.bias)

    @abstractmethod
    def to_stock(self) -> nn.Sequential:
        """The same layer as two ``nn.Linear``, the zeros between the blocks stored."""

    def extra_repr(self) -> str:
        """Shapes, form and ranks for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"form={self.form}, ranks={self.ranks}, bias={self.bias is not None}"
        )


class RowBlocksLinear(_BlockLinear):
    """A Linear whose outputs are in two blocks, each of low rank; see ``_BlockLinear``."""

    form: BlockForm = "row-blocks"

    @property
    def ranks(self) -> tuple[int, int]:
        """Ranks of both blocks."""
        return self.first.shape[1], self.second.shape[1]

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.shared.shape[1]

    @property
    def out_features(self) -> int:
        """Outputs."""
        return len(self.order)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        blocks = [self.first, self.second]
        return pivoted_features(input, self.shared, blocks, self.order, self.bias)

    def dense_matrix(self) -> Tensor:
        """The factors multiplied out, ``(out, in)``."""
        return self._mix() @ self.shared

    def to_stock(self) -> nn.Sequential:
        """The same layer as two ``nn.Linear``, the zeros between the blocks stored."""
        mix = self._mix().detach()
        return nn.Sequential(linear(self.shared.detach(), None), linear(mix, self.bias))

    def output_groups(self) -> list[Group]:
        """The outputs of each block."""
        sizes = [*self.ranks, len(self.first), len(self.second)]
        first, second, *rest = torch.split(torch.argsort(self.order), sizes)
        return [Group(torch.cat([p, r]), p) for p, r in zip((first, second), rest, strict=True)]

    def take_up(self, change: OutputChange) -> None:
        """Each block has pivots, coefficients, and columns of the output factor of its own."""
        rows: list[Tensor] = []
        pivots: list[Tensor] = []
        shared: list[Tensor] = []
        blocks = zip(
            self.output_groups(),
            (self.first, self.second),
            torch.split(self.shared, list(self.ranks)),
            change.coefficients,
            strict=True,
        )
        for group, factor, old, coefficients in blocks:
            rank = len(group.pivots)
            # The block's lines in terms of its old pivots.
            own = torch.cat([torch.eye(rank).to(factor), factor]).double()
            own += coefficients.to(own)
            factors = pivoted(own, old.double())
            put_values(factor, factors.left)
            shared.append(factors.right)
            places = group.rows[torch.argsort(cast("Tensor", factors.order))]
            pivots.append(places[:rank])
            rows.append(places[rank:])
        put_values(self.shared, torch.cat(shared))
        self.order = torch.argsort(torch.cat([*pivots, *rows])).to(self.order)

    def _mix(self) -> Tensor:
        return self._lines(self.first, self.second).index_select(0, self.order)


class ColumnBlocksLinear(_BlockLinear):
    """A Linear whose inputs are in two blocks, each of low rank; see ``_BlockLinear``."""

    form: BlockForm = "column-blocks"

    @property
    def ranks(self) -> tuple[int, int]:
        """Ranks of both blocks."""
        return self.first.shape[0], self.second.shape[0]

    @property
    def in_features(self) -> int:
        """Inputs."""
        return len(self.order)

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.shared.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        sizes = [sum(self.ranks), self.first.shape[1], self.second.shape[1]]
        pivots, *rest = torch.split(features_in_order(input, self.order), sizes, dim=-1)
        # The other inputs give what they have in common with the pivots.
        factors = (self.first, self.second)
        added = [functional.linear(x, factor) for x, factor in zip(rest, factors, strict=True)]
        return functional.linear(pivots + torch.cat(added, dim=-1), self.shared, self.bias)

    def dense_matrix(self) -> Tensor:
        """The factors multiplied out, ``(out, in)``."""
        return self.shared @ self._mix()

    def to_stock(self) -> nn.Sequential:
        """The same layer as two ``nn.Linear``, the zeros between the blocks stored."""
        mix = self._mix().detach()
        return nn.Sequential(linear(mix, None), linear(self.shared.detach(), self.bias))

    def output_groups(self) -> list[Group]:
        """All outputs are combinations of as many as both ranks."""
        return [all_outputs(self.shared, None)]

    def take_up(self, change: OutputChange) -> None:
        """Multiply a change of the outputs into the shared factor."""
        put_values(self.shared, change.of_lines(self.shared.double()))

    def _mix(self) -> Tensor:
        lines = self._lines(self.first.T, self.second.T)
        return lines.index_select(0, torch.argsort(self.order)).T


class BlocksConv2d(ConvStandIn):
    """A 1x1 Conv2d without padding, whose matrix is applied at each position in a block form.

    Args:
        matrix: The layer of its matrix and bias.
        like: The conv it replaces, whose stride is taken.
    """

    takes_changes = True

    def __init__(self, matrix: RowBlocksLinear | ColumnBlocksLinear, like: nn.Conv2d):
        super().__init__()
        self.matrix = matrix
        self._stand_for(like, matrix.in_features, matrix.out_features)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """``(out,)`` or None."""
        return self.matrix.bias

    @property
    def weight(self) -> Tensor:
        """What the dense layer's ``weight`` would be; multiplied out when it is computed with."""
        shape = (self.out_channels, self.in_channels, 1, 1)
        return FactoredWeight.of(
            lambda: self.matrix.dense_matrix().view(shape), shape, self.matrix.shared
        )

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(n, in, h, w)`` or ``(in, h, w)`` to the conv's output."""
        down, right = self.stride
        positions = input[..., ::down, ::right].movedim(-3, -1)
        outputs: Tensor = self.matrix(positions)
        # As a conv's: a model may take a view of it.
        return outputs.movedim(-1, -3).contiguous()

    def dense_matrix(self) -> Tensor:
        """The factors multiplied out, ``(out, in)``."""
        return self.matrix.dense_matrix()

    def output_groups(self) -> list[Group]:
        """Those of its matrix."""
        return self.matrix.output_groups()

    def take_up(self, change: OutputChange) -> None:
        """Multiply a change of the outputs into its matrix."""
        self.matrix.take_up(change)

    def to_dense(self) -> nn.Conv2d:
        """The same layer as one ``nn.Conv2d``, factors multiplied out."""
        return stock_conv(self, self.matrix.dense_matrix().detach())

    def to_stock(self) -> nn.Sequential:
        """The same layer as two ``nn.Conv2d``, the zeros between the blocks stored."""
        first, second = cast("tuple[nn.Linear, nn.Linear]", tuple(self.matrix.to_stock()))
        return nn.Sequential(
            conv_part(self, first.weight.detach()[:, :, None, None]),
            mixing_conv(second.weight.detach(), second.bias),
        )

    def extra_repr(self) -> str:
        """The stride for ``print(model)``; the rest is the matrix' own."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


def has_blocks(layer: nn.Module) -> bool:
    """Whether a layer is of a kind that has block forms: Linear, or a 1x1 conv without padding."""
    if isinstance(layer, nn.Conv2d):
        padded = any(layer._reversed_padding_repeated_twice)
        return layer.kernel_size == (1, 1) and layer.groups == 1 and not padded
    return isinstance(layer, nn.Linear)


def block_module(
    layer: MatrixLayer,
    form: BlockForm,
    shared: Tensor,
    factors: tuple[Tensor, Tensor],
    lines: Tensor,
) -> RowBlocksLinear | ColumnBlocksLinear | BlocksConv2d:
    """The module of these factors that stands for ``layer``, whose bias is copied.

    Args:
        layer: Linear, or a conv that ``has_blocks``.
        form: For column-blocks the factors are those of the transposed matrix.
        shared: ``(k1 + k2, in)``, see ``_BlockLinear``.
        factors: Of both blocks.
        lines: ``(n1 + n2,)``, which row (column) each line is.
    """
    first, second = factors
    module: RowBlocksLinear | ColumnBlocksLinear
    if form == "row-blocks":
        module = RowBlocksLinear(shared, first, second, torch.argsort(lines), layer.bias)
    else:
        module = ColumnBlocksLinear(shared.T, first.T, second.T, lines, layer.bias)
    return BlocksConv2d(module, layer) if isinstance(layer, nn.Conv2d) else module


def empty_blocks(
    layer: MatrixLayer, form: BlockForm, ranks: Sequence[int]
) -> RowBlocksLinear | ColumnBlocksLinear | BlocksConv2d:
    """A module of the right shapes, in ``layer``'s dtype and device, to load saved tensors into.

    Raises:
        ValueError: The layer has no such ranks, or no block forms.
    """
    if not has_blocks(layer):
        raise ValueError(f"a {type(layer).__name__} of this geometry has no {form}")
    out, in_ = matrix_shape(layer)
    check_block_ranks(out, in_, form, ranks)
    long_side, short_side = (out, in_) if form == "row-blocks" else (in_, out)
    sizes = block_sizes(long_side)
    new = layer.weight.new_empty
    first, second = (new(n - k, k) for k, n in zip(ranks, sizes, strict=True))
    lines = torch.arange(long_side, device=layer.weight.device)
    return block_module(layer, form, new(sum(ranks), short_side), (first, second), lines)
