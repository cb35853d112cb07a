"""Factorized Conv2d layers with more than one small kernel: spatial and Tucker-2.

- ``vertical``: a ``kh x 1`` conv to r channels, then a ``1 x kw`` conv (Jaderberg et al. 2014,
  arXiv 1405.3866); ``horizontal``: the other way round. Both are ``SpatialConv2d``;
- ``tucker``: a 1x1 conv to r_in channels, a ``kh x kw`` conv to r_out channels, a 1x1 conv (Kim et
  al. 2016, arXiv 1511.06530). ``TuckerConv2d``.

Factors of a product are not unique: for every r x r matrix M, ``(H M, M^-1 V)`` is the same.
Pivoted (``rankfold.forms.storage``), the freedom is used up: r rows of H are those of the identity
and are not stored; ``order`` says which. That saves r^2 parameters at each joint, and the stored
coefficients are small.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.forms.factored_weight import FactoredWeight
from rankfold.forms.layer import ConvStandIn, conv_part, mixed_channels, mixing_conv, stock_conv
from rankfold.forms.output_change import Group, OutputChange, all_outputs, put_lines, put_values
from rankfold.forms.storage import multiplies_identity, with_identity_rows

ConvForm: TypeAlias = Literal["vertical", "horizontal", "tucker"]
CONV_FORMS: tuple[ConvForm, ...] = ("vertical", "horizontal", "tucker")


def conv_factor_shapes(
    weight: tuple[int, ...], form: ConvForm, ranks: tuple[int, ...], pivoted: bool = True
) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a factorized conv, bias not counted.

    Args:
        weight: ``(out, in, kh, kw)``.
        form: The form.
        ranks: ``(rank,)``, or ``(input rank, output rank)`` for ``tucker``.
        pivoted: Whether identity rows are left out.

    Raises:
        ValueError: The weight has no such ranks; a kernel of one pixel has no spatial form.
    """
    out, in_, height, width = weight
    taps = height * width
    if form == "tucker":
        first, last = ranks
        if not (1 <= first <= min(in_, last * taps) and 1 <= last <= min(out, first * taps)):
            raise ValueError(f"a {weight} weight has no Tucker ranks {ranks}")
        shapes: dict[str, tuple[int, ...]] = {"core": (last, first, height, width)}
        if first < in_:
            shapes["first"] = (in_ - first * pivoted, first)
        if last < out:
            shapes["last"] = (out - last * pivoted, last)
        return shapes
    (rank,) = ranks
    kernel, others = ((height, 1), width) if form == "vertical" else ((1, width), height)
    if taps == 1 or not 1 <= rank <= min(in_ * max(kernel), out * others):
        raise ValueError(f"a {weight} weight has no {form} rank {rank}")
    return {"first": (rank, in_, *kernel), "second": (out * others - rank * pivoted, rank)}


def conv_factor_parameters(
    weight: tuple[int, ...], form: ConvForm, ranks: tuple[int, ...], pivoted: bool = True
) -> int:
    """Parameters of a factorized conv, bias not counted; arguments as ``conv_factor_shapes``."""
    shapes = conv_factor_shapes(weight, form, ranks, pivoted)
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _short(order: Tensor | None) -> Tensor | None:
    # int32: it is stored with the weights, and no layer has 2^31 outputs.
    return None if order is None else order.to(torch.int32)


class _FactorizedConv2d(ConvStandIn):
    """Geometry and bias of the conv that is replaced, and the way back to it."""

    takes_changes = True

    def __init__(self, in_channels: int, out_channels: int, like: nn.Conv2d, bias: Tensor | None):
        super().__init__()
        if like.groups != 1:
            raise ValueError(f"a conv with {like.groups} groups has no such factorization")
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self._stand_for(like, in_channels, out_channels)

    @property
    def weight(self) -> Tensor:
        """What the conv's ``weight`` would be; multiplied out when it is computed with."""
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        return FactoredWeight.of(self.dense_weight, shape, next(self.parameters()))

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The factors multiplied out, ``(out, in, kh, kw)``."""

    def dense_matrix(self) -> Tensor:
        """The factors multiplied out, ``(out, in * kh * kw)``."""
        return self.dense_weight().flatten(1)

    def to_dense(self) -> nn.Conv2d:
        """The same layer as one ``nn.Conv2d``, factors multiplied out."""
        return stock_conv(self, self.dense_weight().detach())

    @abstractmethod
    def to_stock(self) -> nn.Sequential:
        """The same layer as ``nn.Conv2d`` modules, one after the other."""

    def _geometry(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}"
        )


class SpatialConv2d(_FactorizedConv2d):
    """A conv along one axis to ``rank`` channels, then a conv along the other.

    Args:
        first: ``(rank, in, kh, 1)`` or ``(rank, in, 1, kw)``; decides which axis comes first.
        second: ``(out * taps, rank)``, or ``(out * taps - rank, rank)`` when pivoted; taps is the
            kernel's length along the other axis, rows go by output channel, then tap.
        like: The conv it replaces; stride, padding, dilation and padding mode are taken from it.
        bias: ``(out,)`` or None; copied.
        order: ``(out * taps,)`` integers when pivoted, which row of ``[identity; second]`` each
            row is; else None.

    Raises:
        ValueError: Kernel shapes don't fit, or ``like`` has groups.
    """

    order: Tensor | None

    def __init__(
        self,
        first: Tensor,
        second: Tensor,
        like: nn.Conv2d,
        bias: Tensor | None = None,
        order: Tensor | None = None,
    ):
        height, width = like.kernel_size
        kernels = {(height, 1): width, (1, width): height}
        kernel = (first.shape[2], first.shape[3])
        if kernel not in kernels:
            raise ValueError(f"a kernel of {kernel} is no part of one of {like.kernel_size}")
        self.taps = kernels[kernel]
        rows = second.shape[0] if order is None else len(order)
        super().__init__(first.shape[1], rows // self.taps, like, bias)
        self.form: ConvForm = "vertical" if kernel == (height, 1) else "horizontal"
        self.first = nn.Parameter(first.contiguous())
        self.second = nn.Parameter(second.contiguous())
        self.register_buffer("order", _short(order))

    @property
    def ranks(self) -> tuple[int]:
        """Channels between both convs."""
        return (self.first.shape[0],)

    def _second_kernel(self) -> Tensor:
        """``(out, rank, 1, kw)`` or ``(out, rank, kh, 1)``."""
        rows = with_identity_rows(self.second, self.order).view(self.out_channels, self.taps, -1)
        return rows.transpose(1, 2).unsqueeze(2 if self.form == "vertical" else 3)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(n, in, h, w)`` or ``(in, h, w)`` to the conv's output."""
        vertical = self.form == "vertical"
        hidden = self._along(input, self.first, None, vertical)
        return self._along(hidden, self._second_kernel(), self.bias, not vertical)

    def _along(self, images: Tensor, kernel: Tensor, bias: Tensor | None, vertical: bool) -> Tensor:
        """Convolve along one axis, with that axis' part of the geometry."""
        geometry = self._axis(vertical)
        if self.padding_mode != "zeros":
            # A conv along one axis without bias commutes with padding along the other.
            left, right, top, bottom = self._margins
            margins = [0, 0, top, bottom] if vertical else [left, right, 0, 0]
            images = functional.pad(images, margins, mode=self.padding_mode)
            geometry["padding"] = (0, 0)
        return functional.conv2d(images, kernel, bias, **geometry)

    def to_stock(self) -> nn.Sequential:
        """The same layer as two ``nn.Conv2d`` along one axis each."""
        vertical = self.form == "vertical"
        second = self._second_kernel().detach()
        return nn.Sequential(
            conv_part(self, self.first.detach(), **self._axis(vertical)),
            conv_part(self, second, self.bias, **self._axis(not vertical)),
        )

    def _axis(self, vertical: bool) -> dict[str, Any]:
        """The part of the geometry that lies along one axis."""
        axis, unit = (0, 1) if vertical else (1, 0)
        stride, dilation = [1, 1], [1, 1]
        stride[axis], dilation[axis] = self.stride[axis], self.dilation[axis]
        padding: Any = self.padding
        if not isinstance(padding, str):  # of a text, a kernel of one pixel gets none
            padding = list(padding)
            padding[unit] = 0
            padding = tuple(padding)
        return {"stride": tuple(stride), "padding": padding, "dilation": tuple(dilation)}

    def output_groups(self) -> list[Group]:
        """All outputs are combinations of as many as the second factor has columns."""
        return [all_outputs(self._kernel_lines(), None)]

    def take_up(self, change: OutputChange) -> None:
        """Multiply a change of the outputs into the second factor."""
        lines = change.of_lines(self._kernel_lines().double()).view(-1, self.ranks[0])
        self.order = put_lines(lines, self.second, self.first, self.order)

    def _kernel_lines(self) -> Tensor:
        """The second factor, ``(out, taps * rank)``."""
        lines = with_identity_rows(self.second, self.order)
        return lines.reshape(self.out_channels, -1)

    def dense_weight(self) -> Tensor:
        """The factors multiplied out, ``(out, in, kh, kw)``."""
        # Each kernel has one axis of length 1, so that summing over it joins the two.
        second = self._second_kernel()
        along = "riax,oryb->oiab" if self.form == "vertical" else "rixb,oray->oiab"
        return torch.einsum(along, self.first, second)

    def extra_repr(self) -> str:
        """Shapes, form and rank for ``print(model)``."""
        return (
            f"{self._geometry()}, form={self.form}, rank={self.ranks[0]}, "
            f"pivoted={self.order is not None}, bias={self.bias is not None}"
        )


class TuckerConv2d(_FactorizedConv2d):
    """A 1x1 conv to r_in channels, the kernel on r_in x r_out channels, and a 1x1 conv.

    A side of full rank has no 1x1 conv.

    Args:
        first: ``(in, r_in)``, or ``(in - r_in, r_in)`` when pivoted; None where r_in is ``in``.
        core: ``(r_out, r_in, kh, kw)``.
        last: ``(out, r_out)``, or ``(out - r_out, r_out)`` when pivoted; None where r_out is
            ``out``.
        like: The conv it replaces; stride, padding, dilation and padding mode are taken from it.
        bias: ``(out,)`` or None; copied.
        first_order: ``(in,)`` integers when pivoted, which row of ``[identity; first]`` each input
            channel is; else None.
        last_order: ``(out,)`` integers when pivoted, likewise of the outputs.

    Raises:
        ValueError: ``like`` has groups.
    """

    first: nn.Parameter | None
    last: nn.Parameter | None
    first_order: Tensor | None
    last_order: Tensor | None
    form: ConvForm = "tucker"

    def __init__(
        self,
        first: Tensor | None,
        core: Tensor,
        last: Tensor | None,
        like: nn.Conv2d,
        bias: Tensor | None = None,
        first_order: Tensor | None = None,
        last_order: Tensor | None = None,
    ):
        super().__init__(like.in_channels, like.out_channels, like, bias)
        self.first = None if first is None else nn.Parameter(first.contiguous())
        self.core = nn.Parameter(core.contiguous())
        self.last = None if last is None else nn.Parameter(last.contiguous())
        self.register_buffer("first_order", _short(first_order))
        self.register_buffer("last_order", _short(last_order))

    @property
    def ranks(self) -> tuple[int, int]:
        """Channels before and after the kernel."""
        return self.core.shape[1], self.core.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(n, in, h, w)`` or ``(in, h, w)`` to the conv's output."""
        hidden = input if self.first is None else self._mixed(input, self.first)
        bias = self.bias if self.last is None else None
        # Padded only here: a 1x1 conv without bias commutes with padding.
        hidden = self._convolve(hidden, self.core, bias)
        if self.last is None:
            return hidden
        return mixed_channels(hidden, self.last, self.last_order, self.bias)

    def _mixed(self, images: Tensor, first: Tensor) -> Tensor:
        """The first conv; pivoted, it adds what the other channels give to the pivots."""
        order, rank = self.first_order, first.shape[1]
        if order is None or multiplies_identity(rank, self.in_channels):
            return functional.conv2d(images, with_identity_rows(first, order).T[:, :, None, None])
        # Pivots first, as in [identity; first].
        channels = images.index_select(-3, torch.argsort(order))
        pivots, others = torch.split(channels, [rank, len(first)], dim=-3)
        return pivots + functional.conv2d(others, first.T[:, :, None, None])

    def to_stock(self) -> nn.Sequential:
        """The same layer as two or three ``nn.Conv2d``: 1x1, the kernel, 1x1."""
        parts = []
        if self.first is not None:
            mix = with_identity_rows(self.first, self.first_order)
            parts.append(mixing_conv(mix.T.detach(), None))
        bias = self.bias if self.last is None else None
        parts.append(conv_part(self, self.core.detach(), bias))
        if self.last is not None:
            mix = with_identity_rows(self.last, self.last_order)
            parts.append(mixing_conv(mix.detach(), self.bias))
        return nn.Sequential(*parts)

    def output_groups(self) -> list[Group]:
        """All outputs are combinations of as many as the rank of the last factor, or the core."""
        if self.last is None:
            return [all_outputs(self.core.flatten(1), None)]
        return [all_outputs(self.last, self.last_order)]

    def take_up(self, change: OutputChange) -> None:
        """Multiply a change of the outputs into the last factor, or the core."""
        if self.last is None:
            put_values(self.core, change.of_lines(self.core.double().flatten(1)))
            return
        lines = change.of_lines(with_identity_rows(self.last.double(), self.last_order))
        self.last_order = put_lines(lines, self.last, self.core, self.last_order)

    def dense_weight(self) -> Tensor:
        """The factors multiplied out, ``(out, in, kh, kw)``."""
        weight: Tensor = self.core
        if self.first is not None:
            mix = with_identity_rows(self.first, self.first_order)
            weight = torch.einsum("pqhw,iq->pihw", weight, mix)
        if self.last is not None:
            mix = with_identity_rows(self.last, self.last_order)
            weight = torch.einsum("op,pihw->oihw", mix, weight)
        return weight

    def extra_repr(self) -> str:
        """Shapes, ranks and whether pivoted for ``print(model)``."""
        pivoted = self.first_order is not None or self.last_order is not None
        return (
            f"{self._geometry()}, form=tucker, ranks={self.ranks}, "
            f"pivoted={pivoted}, bias={self.bias is not None}"
        )


def empty_conv(
    layer: nn.Conv2d, form: ConvForm, ranks: tuple[int, ...], pivoted: bool = True
) -> SpatialConv2d | TuckerConv2d:
    """A module of the right shapes, in ``layer``'s dtype and device, to load saved tensors into.

    Raises:
        ValueError: The layer has no such ranks.
    """
    shape = tuple(layer.weight.shape)
    shapes = conv_factor_shapes(shape, form, ranks, pivoted)
    factors = {name: layer.weight.new_empty(size) for name, size in shapes.items()}
    bias = None if layer.bias is None else layer.bias.detach()

    def order(rows: int) -> Tensor | None:
        return torch.arange(rows, device=layer.weight.device) if pivoted else None

    if form == "tucker":
        first, last = factors.get("first"), factors.get("last")
        return TuckerConv2d(
            first,
            factors["core"],
            last,
            layer,
            bias,
            None if first is None else order(layer.in_channels),
            None if last is None else order(layer.out_channels),
        )
    second = factors["second"]
    rows = second.shape[0] + ranks[0] * pivoted
    return SpatialConv2d(factors["first"], second, layer, bias, order(rows))


def conv_factor_flops(
    layer: nn.Conv2d,
    form: ConvForm,
    ranks: tuple[int, ...],
    height: int,
    width: int,
    pivoted: bool = True,
) -> int:
    """Floating-point operations of the convs that run, for one image; 2 a multiply-add.

    The identity rows of a pivoted Tucker form are whole channels and need not be multiplied; they
    are not counted, though of a low rank multiplying them is quicker (``multiplies_identity``).
    Those of a spatial form are single taps of a kernel: they are stored nowhere but multiplied.

    Args:
        layer: The conv that is replaced.
        form: The form.
        ranks: Its ranks.
        height: Height of the layer's input.
        width: Width of the layer's input.
        pivoted: Whether identity rows are left out.
    """
    shape = tuple(layer.weight.shape)
    kernel = shape[2:]
    shapes = conv_factor_shapes(shape, form, ranks, pivoted=pivoted and form == "tucker")
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    sizes = (height, width)
    ends = tuple(
        (size + margin - dilation * (taps - 1) - 1) // stride + 1
        for size, margin, dilation, taps, stride in zip(
            sizes, (top + bottom, left + right), layer.dilation, kernel, layer.stride, strict=True
        )
    )
    outputs = ends[0] * ends[1]
    if form == "tucker":
        multiplied = torch.Size(shapes["core"]).numel() * outputs
        if "last" in shapes:
            multiplied += torch.Size(shapes["last"]).numel() * outputs
        if "first" in shapes:
            multiplied += torch.Size(shapes["first"]).numel() * height * width
        return 2 * multiplied
    between = ends[0] * width if form == "vertical" else height * ends[1]
    first, second = (torch.Size(shapes[name]).numel() for name in ("first", "second"))
    return 2 * (first * between + second * outputs)
