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
    """As the model's folder says, or as timm keeps it with its models, but for what is asked for.

    Args:
        asked: What a user asks for.
        model: The model.
        folder: Where it says how inputs are prepared, or None.
    """
    mean, std, size, _ = asked
    if folder is not None:
        return asked._replace(prepare=image_preparation(folder, mean, std, size))
    kept = getattr(model, "pretrained_cfg", None)
    if isinstance(kept, Mapping) and kept.get("mean") and kept.get("std"):
        side = (kept.get("input_size") or (DEFAULT_SIZE,))[-1]
        return Pixels(mean or kept["mean"], std or kept["std"], size or side)
    return asked
