"""What every module that stands for a layer shares: geometry, flags, the way to stock layers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Self

from rankfold.forms.output_change import Group, OutputChange
from rankfold.forms.storage import multiplies_identity, plus_bias, with_identity_rows
from rankfold.model.layer_matrix import MatrixLayer
from rankfold.model.of_user import bare_copy
from rankfold.model.stock_layers import conv2d


class FactorizedLayer(nn.Module):
    """What stands for a Linear or Conv2d and holds its matrix as factors.

    A form's modules derive from it; what reads, exports or refits a model knows no other name.

    Attributes:
        takes_changes: Whether a change of its outputs can be taken up in its factors. A module that
            says so has ``output_groups`` and ``take_up``; others are left as they are by a refit.
    """

    bias: nn.Parameter | None
    takes_changes: ClassVar[bool] = False

    @abstractmethod
    def dense_matrix(self) -> Tensor:
        """The factors multiplied out, ``(out, in)``, or ``(out, in * kh * kw)`` of a conv."""

    @abstractmethod
    def to_dense(self) -> nn.Linear | nn.Conv2d:
        """The same layer as one stock layer, factors multiplied out."""

    @abstractmethod
    def to_stock(self) -> nn.Sequential:
        """The same layer as stock layers, one after the other."""

    def output_groups(self) -> list[Group]:
        """Outputs that are combinations of a few of them, the groups that a change speaks of."""
        raise NotImplementedError(f"a {type(self).__name__} takes no changes of its outputs")

    def take_up(self, change: OutputChange) -> None:
        """Multiply a change of the groups into the factor at the outputs, in place; bias apart."""
        raise NotImplementedError(f"a {type(self).__name__} takes no changes of its outputs")

    def with_output_change(self, change: OutputChange) -> Self:
        """A copy, of the same form and ranks, that computes the changed outputs."""
        twin = bare_copy(self)
        with torch.no_grad():
            twin.take_up(change)
            if change.shift is not None and twin.bias is not None:
                twin.bias.add_(change.shift.to(twin.bias))
        return twin


class ConvStandIn(FactorizedLayer):
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


def copied(bias: nn.Parameter | None) -> nn.Parameter | None:
    """A copy of a bias, if there is one."""
    return None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)


def take_flags(module: nn.Module, layer: MatrixLayer) -> None:
    """Train or evaluate, and let be trained, what stands for ``layer`` as ``layer`` was."""
    module.train(layer.training)
    module.requires_grad_(layer.weight.requires_grad)
    if isinstance(module.bias, nn.Parameter) and layer.bias is not None:
        module.bias.requires_grad_(layer.bias.requires_grad)
