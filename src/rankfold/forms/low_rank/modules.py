"""Low-rank layers that take the place of Linear and Conv2d, in either storage (``storage``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.forms.factored_weight import FactoredWeight
from rankfold.forms.layer import (
    ConvStandIn,
    FactorizedLayer,
    conv_part,
    mixed_channels,
    mixing_conv,
    stock_conv,
)
from rankfold.forms.output_change import Group, OutputChange, all_outputs, put_lines
from rankfold.forms.pivoted_product import pivoted_features
from rankfold.forms.storage import Storage, with_identity_rows
from rankfold.model.stock_layers import linear


class _LowRank(FactorizedLayer):
    """The two factors, the order of the outputs, and the bias."""

    takes_changes = True
    left: nn.Parameter
    right: nn.Parameter
    bias: nn.Parameter | None
    order: Tensor | None

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None, order: Tensor | None):
        super().__init__()
        self.left = nn.Parameter(left.contiguous())
        self.right = nn.Parameter(right.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        # int32: it is stored with the weights, and no layer has 2^31 outputs.
        self.register_buffer("order", None if order is None else order.to(torch.int32))

    @property
    def rank(self) -> int:
        """Rank of the layer's matrix."""
        return self.right.shape[0]

    @property
    def form(self) -> Storage:
        """``pair`` or ``pivoted``."""
        return "pair" if self.order is None else "pivoted"

    @property
    def weight(self) -> Tensor:
        """What the dense layer's ``weight`` would be; multiplied out when it is computed with."""
        rows = self.left.shape[0] if self.order is None else len(self.order)
        shape = (rows, *self.right.shape[1:])
        return FactoredWeight.of(lambda: self.dense_matrix().view(shape), shape, self.right)

    def dense_matrix(self) -> Tensor:
        """The product of the factors, ``(out, in)`` or ``(out, in * kh * kw)``."""
        right = self.right.flatten(1)
        product = self.left @ right
        if self.order is None:
            return product
        return torch.cat([right, product])[self.order]

    def full_left(self) -> Tensor:
        """The left factor with its identity rows, ``(out, rank)``."""
        return with_identity_rows(self.left, self.order)

    def output_groups(self) -> list[Group]:
        """All outputs are combinations of as many as the rank."""
        return [all_outputs(self.left, self.order)]

    def take_up(self, change: OutputChange) -> None:
        """Multiply a change of the outputs into the left factor."""
        lines = change.of_lines(self.full_left().double())
        self.order = put_lines(lines, self.left, self.right, self.order)


class LowRankLinear(_LowRank):
    """A Linear whose weight has low rank.

    Args:
        left: ``(out, rank)``, or ``(out - rank, rank)`` when pivoted.
        right: ``(rank, in)``.
        bias: ``(out,)`` or None; copied.
        order: ``(out,)`` integers when pivoted, None for the pair.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None = None,
        order: Tensor | None = None,
    ):
        super().__init__(left, right, bias, order)
        self.in_features = right.shape[1]
        self.out_features = left.shape[0] if order is None else len(order)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        if self.order is not None:
            return pivoted_features(input, self.right, [self.left], self.order, self.bias)
        return functional.linear(functional.linear(input, self.right), self.left, self.bias)

    def to_dense(self) -> nn.Linear:
        """The same layer as one ``nn.Linear``, factors multiplied out."""
        return linear(self.dense_matrix().detach(), self.bias)

    def to_stock(self) -> nn.Sequential:
        """The same layer as two ``nn.Linear``, one after the other."""
        return nn.Sequential(
            linear(self.right.detach(), None),
            linear(self.full_left().detach(), self.bias),
        )

    def extra_repr(self) -> str:
        """Shapes, rank and form for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, form={self.form}, bias={self.bias is not None}"
        )


class LowRankConv2d(_LowRank, ConvStandIn):
    """A Conv2d whose matrix has low rank: a conv to ``rank`` channels, then a 1x1 conv.

    Args:
        left: ``(out, rank)``, or ``(out - rank, rank)`` when pivoted.
        right: ``(rank, in, kh, kw)``.
        like: The conv it replaces; stride, padding, dilation and padding mode are taken from it.
        bias: ``(out,)`` or None; copied.
        order: ``(out,)`` integers when pivoted, None for the pair.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        like: nn.Conv2d,
        bias: Tensor | None = None,
        order: Tensor | None = None,
    ):
        super().__init__(left, right, bias, order)
        rows = left.shape[0] if order is None else len(order)
        self._stand_for(like, right.shape[1], rows)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(n, in, h, w)`` or ``(in, h, w)`` to the conv's output."""
        hidden = self._convolve(input, self.right, None)
        return mixed_channels(hidden, self.left, self.order, self.bias)

    def to_dense(self) -> nn.Conv2d:
        """The same layer as one ``nn.Conv2d``, factors multiplied out."""
        return stock_conv(self, self.dense_matrix().detach())

    def to_stock(self) -> nn.Sequential:
        """The same layer as two ``nn.Conv2d``, one after the other."""
        return nn.Sequential(
            conv_part(self, self.right.detach()),
            mixing_conv(self.full_left().detach(), self.bias),
        )

    def extra_repr(self) -> str:
        """Shapes, rank and form for ``print(model)``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, rank={self.rank}, "
            f"form={self.form}, bias={self.bias is not None}"
        )
