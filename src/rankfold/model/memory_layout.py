"""In which order the axes of a tensor lie in memory, and how to lay it out like that again.

The same numbers may be summed in another order where strides differ: a ``(1, 7)`` matrix whose
strides are ``(1, 1)`` (a transposed column) and one whose strides are ``(7, 1)`` are contiguous to
torch, but a BLAS takes another kernel for either. A file holds no strides. So a finished model's
tensors are laid out in one way that only the order of their axes decides, and a file names the
orders that differ from the plain one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes; torch's own allocations on a CPU have it


def axes_by_stride(tensor: Tensor) -> tuple[int, ...]:
    """The axes from the one with the longest stride to the one with the shortest.

    A vector or matrix that is contiguous to torch has ``(0, 1)``. So has not every image kernel:
    with one tap both memory formats are contiguous, and strides alone say that it is
    ``channels_last``, ``(0, 2, 3, 1)``.
    """
    if tensor.dim() < 4 and tensor.is_contiguous():
        return tuple(range(tensor.dim()))
    shape, strides = tensor.shape, tensor.stride()
    # Of equal strides, all but the first belong to axes of one entry.
    return tuple(sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], shape[axis] == 1)))


def laid_out(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """The same values in memory of their own, dense, with the axes in this order.

    Args:
        tensor: Of any strides.
        axes: A permutation of its axes, the one with the longest stride first.
    """
    back = sorted(range(len(axes)), key=lambda place: axes[place])
    copy = tensor.permute(tuple(axes)).clone(memory_format=torch.contiguous_format)
    return copy.permute(back)


def lay_out(model: nn.Module, orders: Mapping[str, Sequence[int]] | None = None) -> None:
    """Lay out all tensors of a model as their orders of axes say, in place.

    Values, names and shared tensors stay.

    Args:
        model: A model that belongs to the caller.
        orders: By tensor name, where it isn't the order that the tensor has now.
    """
    orders = orders or {}
    with torch.no_grad():
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if tensor.layout != torch.strided or type(tensor.data) is not Tensor:
                continue  # sparse, or packed by another library: it has no strides
            axes = orders.get(name, axes_by_stride(tensor))
            if tensor.is_meta or _lies(tensor, axes):
                continue
            tensor.data = laid_out(tensor.data, axes)


def unusual_orders(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The orders of those tensors whose axes don't lie in their plain order."""
    orders = {name: list(axes_by_stride(tensor)) for name, tensor in tensors.items()}
    return {name: axes for name, axes in orders.items() if axes != sorted(axes)}


def _lies(tensor: Tensor, axes: Sequence[int]) -> bool:
    aligned = tensor.device.type != "cpu" or tensor.data_ptr() % ALIGNMENT == 0
    stride, expected = 1, [0] * len(axes)
    for axis in reversed(axes):
        expected[axis] = stride
        stride *= max(1, tensor.shape[axis])
    return aligned and tensor.stride() == tuple(expected)
