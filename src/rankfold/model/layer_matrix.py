"""The only place where a layer is read as a matrix: Linear and Conv2d, weights, inputs, outputs.

A Linear is its weight. A Conv2d is ``out x (in * kh * kw)``; its inputs are the unfolded patches,
its outputs the channel vectors at each position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

MatrixLayer: TypeAlias = nn.Linear | nn.Conv2d

# A 3x3 conv unfolds its input to nine times its size: rows are made in blocks of at most this
# many float32 values (64 MiB) so that memory does not depend on the batch.
BLOCK_VALUES = 1 << 24


def weight_matrix(layer: MatrixLayer) -> Tensor:
    """The layer's weight as a matrix, detached: ``(out, in)`` or ``(out, in * kh * kw)``."""
    return layer.weight.detach().flatten(1)


def matrix_shape(layer: MatrixLayer) -> tuple[int, int]:
    """``(out, in)`` of the layer's matrix."""
    return layer.weight.shape[0], layer.weight.shape[1:].numel()


def kept_dtype(values: Tensor) -> torch.dtype:
    """In what statistics and factors are kept: float32, or float64 for a float64 model.

    Batches are no more exact, and of a large model what is kept takes the most memory.
    """
    return torch.promote_types(values.dtype, torch.float32)


def call_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer was called with; torch's own layers name it ``input``."""
    return args[0] if args else kwargs["input"]


def input_squares(layer: MatrixLayer, inputs: Tensor) -> Tensor:
    """Summed squares of the vectors that the layer's matrix multiplies: their Gram's diagonal.

    Args:
        layer: The layer.
        inputs: As for ``input_rows``.

    Returns:
        ``(in,)`` float32, or float64 for float64 inputs; no patch of a conv is unfolded for it.
    """
    values = inputs.detach()
    values = values.to(kept_dtype(values))
    if isinstance(layer, nn.Linear):
        return values.reshape(-1, layer.in_features).square().sum(0)
    images = values if values.dim() == 4 else values.unsqueeze(0)
    squares = _padded(layer, images).square().sum(0)  # (in, h, w)
    spans = [
        side - spread * (taps - 1)
        for side, spread, taps in zip(
            squares.shape[1:], layer.dilation, layer.kernel_size, strict=True
        )
    ]
    tall, wide = layer.stride
    of_taps = [
        squares[:, down : down + spans[0] : tall, right : right + spans[1] : wide].sum((1, 2))
        for down in range(0, layer.dilation[0] * layer.kernel_size[0], layer.dilation[0])
        for right in range(0, layer.dilation[1] * layer.kernel_size[1], layer.dilation[1])
    ]
    return torch.stack(of_taps, 1).flatten()


def _padded(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """Images with the layer's own margins."""
    # The layer's own list: pairs (left, right), last dimension first, also for padding="same".
    margins = layer._reversed_padding_repeated_twice
    if not any(margins):
        return images
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return functional.pad(images, list(margins), mode=mode)


def patches(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """Unfold images to the rows that the conv's matrix is applied to.

    Stride, dilation, any padding and any padding mode are the layer's own.

    Args:
        layer: A conv with ``groups == 1``.
        images: ``(n, in, h, w)``.

    Returns:
        ``(n * positions, in * kh * kw)``.
    """
    unfolded = functional.unfold(
        _padded(layer, images), layer.kernel_size, dilation=layer.dilation, stride=layer.stride
    )  # (n, in * kh * kw, positions)
    return unfolded.transpose(1, 2).flatten(0, 1)


def input_rows(layer: MatrixLayer, inputs: Tensor) -> Iterator[Tensor]:
    """The vectors that the layer's matrix multiplies, in blocks of float32 (or float64) rows.

    Args:
        layer: The layer.
        inputs: What its forward received: ``(..., in)`` or ``(n, in, h, w)`` or ``(in, h, w)``.

    Yields:
        ``(rows, in)`` blocks.
    """
    values = inputs.detach()
    values = values.to(kept_dtype(values))
    if isinstance(layer, nn.Linear):
        yield from values.reshape(-1, layer.in_features).split(1 << 14)
        return
    images = values if values.dim() == 4 else values.unsqueeze(0)
    per_image = images[0].numel() * layer.kernel_size[0] * layer.kernel_size[1]
    for block in images.split(max(1, BLOCK_VALUES // per_image)):
        yield patches(layer, block)


def output_rows(layer: MatrixLayer, outputs: Tensor) -> Tensor:
    """Output vectors, or gradients of them, as float32 (or float64) rows.

    Args:
        layer: The layer.
        outputs: ``(..., out)`` or ``(n, out, h, w)`` or ``(out, h, w)``.

    Returns:
        ``(rows, out)``, in the order of ``input_rows``.
    """
    values = outputs.detach()
    values = values.to(kept_dtype(values))
    if isinstance(layer, nn.Linear):
        return values.reshape(-1, layer.out_features)
    return values.movedim(-3, -1).reshape(-1, layer.out_channels)
