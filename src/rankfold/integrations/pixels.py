"""How a model's images are prepared: as asked for, or as its folder says, or timm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from rankfold.data.sources import DEFAULT_SIZE, ImagePreparation
from rankfold.integrations.processors import image_preparation


class Pixels(NamedTuple):
    """The arguments of ``sources.image_reader``."""

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: int | None = None
    prepare: ImagePreparation | None = None


def pixels_of(asked: Pixels, model: nn.Module, folder: Path | None) -> Pixels:
    """As asked for, or as the model's folder says, or what timm keeps with its models.

    Args:
        asked: What a user asks for.
        model: The model.
        folder: Where it says how inputs are prepared, or None.
    """
    if asked != Pixels():
        return asked
    if folder is not None:
        return Pixels(prepare=image_preparation(folder))
    kept = getattr(model, "pretrained_cfg", None)
    if isinstance(kept, Mapping) and kept.get("mean") and kept.get("std"):
        size = kept.get("input_size") or (DEFAULT_SIZE,)
        return Pixels(kept["mean"], kept["std"], size[-1])
    return Pixels()
