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

from rankfold.maths.linalg import add_gram
from rankfold.maths.patch_gram import add_patch_gram

MatrixLayer: TypeAlias = nn.Linear | nn.Conv2d

# A 3x3 conv unfolds its input to nine times its size: rows are made in blocks of at most this
# many values. 4 MiB of float32 stay in caches, and below what is mapped anew for each block
# (``freed_memory.LARGE_BLOCK``): blocks of 64 MiB took 1.5 times the CPU time.
BLOCK_VALUES = 1 << 20


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


def _kept(values: Tensor) -> Tensor:
    return values.detach().to(kept_dtype(values))


def _images(inputs: Tensor) -> Tensor:
    """What a conv received, ``(n, in, h, w)`` in the dtype that is kept."""
    values = _kept(inputs)
    return values if values.dim() == 4 else values.unsqueeze(0)


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
    if isinstance(layer, nn.Linear):
        return _kept(inputs).reshape(-1, layer.in_features).square().sum(0)
    squares = _padded(layer, _images(inputs)).square().sum(0)  # (in, h, w)
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
    if isinstance(layer, nn.Linear):
        yield from _kept(inputs).reshape(-1, layer.in_features).split(1 << 14)
        return
    for block in _in_blocks(_images(inputs), layer.kernel_size[0] * layer.kernel_size[1]):
        yield patches(layer, block)


def _in_blocks(images: Tensor, times: int) -> Iterator[Tensor]:
    """Blocks of images that are unfolded to so many times their values."""
    yield from images.split(max(1, BLOCK_VALUES // (images[0].numel() * times)))


def add_input_gram(upper: Tensor, layer: MatrixLayer, inputs: Tensor, sign: int = 1) -> None:
    """Add the Gram of a layer's input rows to a running one, on and above its diagonal.

    Args:
        upper: ``(in, in)`` float32, or float64 for float64 inputs (``linalg.add_gram``).
        layer: The layer.
        inputs: As for ``input_rows``.
        sign: -1 to subtract.
    """
    axis = None if isinstance(layer, nn.Linear) else _moved_axis(layer, inputs)
    if isinstance(layer, nn.Linear) or axis is None:
        for rows in input_rows(layer, inputs):
            add_gram(upper, rows, sign)
        return
    other = 1 - axis
    for block in _in_blocks(_images(inputs), layer.kernel_size[other]):
        add_patch_gram(
            upper,
            _padded(layer, block),
            layer.kernel_size,
            layer.dilation,
            layer.stride[other],
            across=axis == 1,
            sign=sign,
        )


def _moved_axis(layer: nn.Conv2d, inputs: Tensor) -> int | None:
    """Along which axis, if any, a conv's patches are so often moved that unfolding does not pay.

    Products of all pairs of taps take K^2 / 2 times a line's, moved ones one for each tap and two
    border lines for each pair (``patch_gram``).
    """
    best = None
    for axis in (0, 1):
        taps, dilation = layer.kernel_size[axis], layer.dilation[axis]
        margins = layer._reversed_padding_repeated_twice[2 - 2 * axis :][:2]
        lines = inputs.shape[axis - 2] + sum(margins) - dilation * (taps - 1)
        pays = layer.stride[axis] == 1 and lines * (taps - 2) > 2 * taps * dilation
        if pays and (best is None or taps > layer.kernel_size[best]):
            best = axis
    return best


def output_rows(layer: MatrixLayer, outputs: Tensor) -> Tensor:
    """Output vectors, or gradients of them, as float32 (or float64) rows.

    Args:
        layer: The layer.
        outputs: ``(..., out)`` or ``(n, out, h, w)`` or ``(out, h, w)``.

    Returns:
        ``(rows, out)``, in the order of ``input_rows``.
    """
    values = _kept(outputs)
    if isinstance(layer, nn.Linear):
        return values.reshape(-1, layer.out_features)
    return values.movedim(-3, -1).reshape(-1, layer.out_channels)
