"""Mean and standard deviation of image channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankfold.errors import InputError


def channel_values(
    name: str, values: Sequence[float] | None, channels: int
) -> Sequence[float] | None:
    """One value per channel, from one for all or one for each.

    Raises:
        InputError: A wrong number of values, one that isn't finite, or a std of 0 or less.
    """
    if values is None:
        return None
    if len(values) not in (1, channels):
        raise InputError(f"{name}= has {len(values)} values; the images have {channels} channels.")
    for value in values:
        if not math.isfinite(value) or (name == "std" and value <= 0):
            raise InputError(f"{name}= has the value {value}; expected finite numbers, std > 0.")
    return list(values) * (channels if len(values) == 1 else 1)


def normalize_images(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    """``(images - mean) / std`` of ``(n, c, h, w)`` or ``(c, h, w)`` images."""
    if mean is not None:
        images = images - torch.tensor(mean, dtype=images.dtype)[:, None, None]
    if std is not None:
        images = images / torch.tensor(std, dtype=images.dtype)[:, None, None]
    return images
