"""Stock layers with given weights."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

StockLayer = TypeVar("StockLayer", bound="nn.Linear | _ConvNd")


def embedding(weight: Tensor, padding_idx: int | None = None) -> nn.Embedding:
    """An Embedding with a copy of this weight ``(words, dim)``."""
    words, dim = weight.shape
    layer: nn.Embedding = empty(nn.Embedding, weight, words, dim, padding_idx=padding_idx)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear with a copy of this weight ``(out, in)`` and bias ``(out,)``."""
    out, in_ = weight.shape
    layer: nn.Linear = empty(nn.Linear, weight, in_, out, bias=bias is not None)
    return filled(layer, weight, bias)


def conv2d(weight: Tensor, bias: Tensor | None, **geometry: Any) -> nn.Conv2d:
    """A Conv2d without groups with a copy of this weight ``(out, in, kh, kw)`` and bias."""
    out, in_, *kernel = weight.shape
    layer: nn.Conv2d = empty(
        nn.Conv2d, weight, in_, out, tuple(kernel), bias=bias is not None, **geometry
    )  # fmt: skip
    return filled(layer, weight, bias)


def empty(kind: Any, like: Tensor, *args: Any, **options: Any) -> Any:
    """A layer whose parameters are not initialised: torch's random state stays as it was."""
    return nn.utils.skip_init(kind, *args, device=like.device, dtype=like.dtype, **options)


def filled(layer: StockLayer, weight: Tensor, bias: Tensor | None) -> StockLayer:
    """The layer with these values."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
    return layer
