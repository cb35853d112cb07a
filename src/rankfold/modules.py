"""Low-rank layers that take the place of Linear and Conv2d.

Both hold a rank-k matrix W' in one of two forms:

- ``pair``: ``W' = left @ right`` with left ``(out, k)`` and right ``(k, in)``; k (out + in)
  parameters;
- ``pivoted``: right ``(k, in)`` holds k rows of W' itself and left ``(out - k, k)`` writes the
  other rows as combinations of them; k (out + in - k) parameters, fewer than out * in for every
  k < min(out, in) (Pivoting Factorization, arXiv 2501.19090).

``order`` says which row of ``[pivot rows; other rows]`` each output is.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.factored_weight import FactoredWeight
from rankfold.stock_layers import conv2d, linear

Form: TypeAlias = Literal["pair", "pivoted"]
FORMS: tuple[Form, ...] = ("pair", "pivoted")


def left_rows(out: int, rank: int, form: Form) -> int:
    """Rows of the left factor: all of them in a pair, those that are no pivot otherwise."""
    return out if form == "pair" else out - rank


def factor_parameters(out: int, in_: int, rank: int, form: Form) -> int:
    """Parameters of both factors of an ``(out, in_)`` matrix of this rank, bias not counted."""
    return rank * (left_rows(out, rank, form) + in_)


def with_identity_rows(factor: Tensor, order: Tensor | None) -> Tensor:
    """A factor with the identity rows that a pivoted form leaves out, ``(rows, rank)``."""
    if order is None:
        return factor
    rank = factor.shape[1]
    identity = torch.eye(rank, dtype=factor.dtype, device=factor.device)
    return torch.cat([identity, factor]).index_select(0, order)


def features_in_order(features: Tensor, order: Tensor) -> Tensor:
    """``features[..., order]``, of ``(..., n)`` by ``(n,)`` integers.

    As a matrix: with more axes torch walks down all rows once for each feature, which took 4 to 28
    times as long on a CPU.
    """
    return features.reshape(-1, features.shape[-1]).index_select(-1, order).view(features.shape)


def plus_bias(outputs: Tensor, bias: Tensor | None) -> Tensor:
    """Outputs that nobody else holds plus a bias of matching shape, without another copy."""
    return outputs if bias is None else outputs.add_(bias)


class _LowRank(nn.Module):
    """The two factors, the order of the outputs, and the bias."""

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
    def form(self) -> Form:
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


class LowRankLinear(_LowRank):
    """A Linear whose weight has low rank.

    Args:
        left: ``(out, rank)``, or ``(out - rank, rank)`` in the pivoted form.
        right: ``(rank, in)``.
        bias: ``(out,)`` or None; copied.
        order: ``(out,)`` integers for the pivoted form, None for the pair.
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
        hidden = functional.linear(input, self.right)
        if self.order is None:
            return functional.linear(hidden, self.left, self.bias)
        rest = functional.linear(hidden, self.left)
        outputs = features_in_order(torch.cat([hidden, rest], dim=-1), self.order)
        return plus_bias(outputs, self.bias)

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


class ConvStandIn(nn.Module):
    """What stands for a Conv2d keeps its geometry: a model may ask for it, to foresee sizes."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str
    groups: int
    bias: nn.Parameter | None

    def _stand_for(self, conv: nn.Conv2d, in_channels: int, out_channels: int) -> None:
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = conv.kernel_size
        self.stride = conv.stride
        self.padding = conv.padding
        self.dilation = conv.dilation
        self.padding_mode = conv.padding_mode
        self.groups = conv.groups
        # (left, right, top, bottom), also for padding="same".
        self._margins = list(conv._reversed_padding_repeated_twice)

    def _convolve(self, images: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """Apply a kernel with the conv's own stride, padding and dilation."""
        padding = self.padding
        if self.padding_mode != "zeros":
            images = functional.pad(images, self._margins, mode=self.padding_mode)
            padding = (0, 0)
        return functional.conv2d(images, kernel, bias, self.stride, padding, self.dilation)


class LowRankConv2d(_LowRank, ConvStandIn):
    """A Conv2d whose matrix has low rank: a conv to ``rank`` channels, then a 1x1 conv.

    Args:
        left: ``(out, rank)``, or ``(out - rank, rank)`` in the pivoted form.
        right: ``(rank, in, kh, kw)``.
        like: The conv it replaces; stride, padding, dilation and padding mode are taken from it.
        bias: ``(out,)`` or None; copied.
        order: ``(out,)`` integers for the pivoted form, None for the pair.
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


def multiplies_identity(rank: int, channels: int) -> bool:
    """Whether a 1x1 conv is faster with the identity rows of a pivoted factor than without.

    Leaving them out saves ``rank^2`` products a position, and the channels are written three times:
    joined, in order, with their bias. Measured on a CPU, both cost the same near ``rank^2 = 40
    channels``.
    """
    return rank**2 <= 40 * channels


def mixed_channels(
    hidden: Tensor, left: Tensor, order: Tensor | None, bias: Tensor | None
) -> Tensor:
    """A 1x1 conv by a left factor.

    Args:
        hidden: ``(n, rank, h, w)`` or ``(rank, h, w)``.
        left: ``(out, rank)``, or ``(out - rank, rank)`` with an order.
        order: ``(out,)``, which row of ``[identity; left]`` each output is; None: a plain factor.
        bias: ``(out,)`` or None.
    """
    if order is None or multiplies_identity(left.shape[1], len(order)):
        return functional.conv2d(hidden, with_identity_rows(left, order)[:, :, None, None], bias)
    rest = functional.conv2d(hidden, left[:, :, None, None])
    outputs = torch.cat([hidden, rest], dim=-3).index_select(-3, order)
    return plus_bias(outputs, None if bias is None else bias[:, None, None])


def stock_conv(like: ConvStandIn, weight: Tensor) -> nn.Conv2d:
    """An ``nn.Conv2d`` of the same geometry and bias with this weight, of as many values."""
    shape = (like.out_channels, like.in_channels, *like.kernel_size)
    return conv_part(like, weight.view(shape), like.bias)


def conv_part(
    like: ConvStandIn, weight: Tensor, bias: Tensor | None = None, **geometry: Any
) -> nn.Conv2d:
    """An ``nn.Conv2d`` with this weight ``(out, in, kh, kw)``.

    Args:
        like: Its geometry is taken.
        weight: Copied.
        bias: ``(out,)`` or None; copied.
        geometry: What differs: ``stride``, ``padding``, ``dilation``.
    """
    own = {name: getattr(like, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    return conv2d(weight, bias, **{**own, **geometry})


def mixing_conv(matrix: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A 1x1 ``nn.Conv2d`` of this ``(out, in)`` matrix."""
    return conv2d(matrix[:, :, None, None], bias)
