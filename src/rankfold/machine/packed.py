"""Objects on their way from one process of a run to another: their tensors apart, as bytes.

Only processes of one run exchange them; what comes from a file or a user never passes here.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """What a tensor is beside its values; its strides leave no gap."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    on_cpu: bool

    def empty(self, device: torch.device) -> Tensor:
        """A tensor of this layout; on the CPU where it was there, else on a device."""
        place = torch.device("cpu") if self.on_cpu else device
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=place)


class Packed(NamedTuple):
    """An object without its tensors, and their layouts."""

    rest: bytes
    layouts: tuple[Layout, ...]


def pack(value: object) -> tuple[Packed, list[Tensor]]:
    """An object and its tensors; those that occur twice are one.

    Tensors come with the layout that all processes then have: of other strides, products with one
    might differ in the last bit.
    """
    stream, tensors = io.BytesIO(), list[Tensor]()
    _Packer(stream, tensors).dump(value)
    return Packed(stream.getvalue(), tuple(map(_layout, tensors))), tensors


def unpack(packed: Packed, tensors: Sequence[Tensor]) -> Any:
    """The object again."""
    return _Unpacker(io.BytesIO(packed.rest), tensors).load()


def flat_bytes(tensor: Tensor) -> Tensor:
    """A tensor without gaps as ``(bytes,)`` uint8, in the order in which it lies in memory."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


class _Packer(pickle.Pickler):
    """Leaves tensors out, each as its place in a list."""

    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if type(value) not in (Tensor, torch.nn.Parameter):
            return None
        if id(value) not in self._places:
            self._places[id(value)] = len(self._tensors)
            self._tensors.append(_dense(value.detach()))
            self._given = (*getattr(self, "_given", ()), value)  # so that no other has its id
        return self._places[id(value)]


class _Unpacker(pickle.Unpickler):
    """Puts tensors back."""

    def __init__(self, stream: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_load(self, place: Any) -> Tensor:
        tensor: Tensor = self._tensors[place]
        return tensor


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where what lies in memory has gaps or is used twice."""
    return tensor if torch.empty_like(tensor).stride() == tensor.stride() else tensor.contiguous()


def _layout(tensor: Tensor) -> Layout:
    return Layout(
        tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device.type == "cpu"
    )
