"""The Gram of a conv's patches, without unfolding them.

A patch is a window of the image: two taps see the same values, some lines apart. So along an axis
without a stride the block of taps t and u depends on u - t but for the lines at the borders (as for
a Toeplitz matrix; KFC, arXiv 1602.01407, section 3, assumes it for the borders as well): of K^2
blocks, K are products over all positions, and the others lose a line and gain one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def add_patch_gram(
    upper: Tensor,
    images: Tensor,
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: int,
    *,
    across: bool,
    sign: int = 1,
) -> None:
    """Add ``P^T P`` of the patches P to a running Gram, on and above its diagonal (``add_gram``).

    Args:
        upper: ``(in * kh * kw, in * kh * kw)``, contiguous; changed in place.
        images: ``(n, in, h, w)``, of the same dtype, with the conv's margins.
        kernel: Taps down and across; an image has one position at least.
        dilation: Down and across.
        stride: Of the other axis than the one that blocks are moved along, which has none.
        across: Move along the width, in place of the height.
        sign: -1 to subtract.
    """
    channels = images.shape[1]
    places = torch.arange(len(upper), device=upper.device).view(channels, *kernel)
    blocks = upper.view(channels, *kernel, channels, *kernel)
    moved, other = (1, 0) if across else (0, 1)
    along = images.transpose(2, 3) if across else images
    lines = _lines(along, kernel[other], dilation[other], stride)
    for first, second, block in _blocks_of_taps(lines, kernel[moved], dilation[moved]):
        pairs = ((first, second, block), (second, first, block.T))
        for row, column, values in pairs[: 1 if first == second else 2]:
            target = blocks.select(4 + moved, column).select(1 + moved, row)
            of_row = places.select(1 + moved, row).flatten()
            of_column = places.select(1 + moved, column).flatten()
            above = of_row[:, None] <= of_column
            target.add_(values.where(above, 0).view_as(target), alpha=sign)


def _lines(images: Tensor, taps: int, dilation: int, stride: int) -> Tensor:
    """Unfold images along the last axis alone: ``(in * taps, lines, n * positions)``."""
    span = images.shape[-1] - dilation * (taps - 1)
    values = images.permute(1, 2, 0, 3)
    seen = [values[..., tap * dilation :][..., :span:stride] for tap in range(taps)]
    return torch.stack(seen, 1).flatten(0, 1).flatten(2)


def _blocks_of_taps(lines: Tensor, taps: int, dilation: int) -> Iterator[tuple[int, int, Tensor]]:
    """For taps t <= u their ``(values, values)`` block of the Gram of patches.

    Args:
        lines: ``(values, lines, positions)``.
        taps: Of the kernel along the lines.
        dilation: Lines between two taps.
    """
    span = lines.shape[1] - dilation * (taps - 1)

    def product(first: int, second: int, count: int) -> Tensor:
        """Of lines from two places on."""
        left, right = (lines[:, at : at + count].flatten(1) for at in (first, second))
        return left @ right.T

    for apart in range(taps):
        block = product(0, apart * dilation, span)
        yield 0, apart, block
        for before, tap in pairwise(range(taps - apart)):
            left, entered = before * dilation, before * dilation + span
            block = (
                block
                - product(left, left + apart * dilation, dilation)
                + product(entered, entered + apart * dilation, dilation)
            )
            yield tap, tap + apart, block
