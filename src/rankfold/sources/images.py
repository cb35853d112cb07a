"""A folder of class folders of images, read when they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rankfold.errors import InputError, require
from rankfold.sources.normalize import channel_values, normalize_images

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
DEFAULT_SIZE = 224


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Pairs of a ``(3, size, size)`` float32 image and its class, in the order of their paths."""

    def __init__(
        self,
        files: Sequence[tuple[Path, int]],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        size: int,
    ) -> None:
        self.files, self.mean, self.std, self.size = files, mean, std, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.files[index]
        return normalize_images(_read(file, self.size), self.mean, self.std), label


def read_image_folder(
    folder: Path,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
) -> ImageFolder:
    """Images whose class is the place of their folder's name among the sorted names.

    The shorter side is resized to ``size`` (224 if None), the middle square is cut out, values
    are scaled to 0..1 and then normalised.

    Args:
        folder: Holds one folder per class.
        mean: Subtracted, per channel (red, green, blue).
        std: Divided by, per channel.
        size: Side of the square, pixels.

    Raises:
        InputError: Fewer than two classes, a class without images, or Pillow isn't installed;
            when an image is used: it can't be read.
    """
    require("PIL", "images")
    if size is not None and size < 1:
        raise InputError(f"--image-size is {size}; expected 1 pixel or more.")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if len(classes) < 2:
        found = f"the one class folder {classes[0].name}" if classes else "no class folder"
        raise InputError(
            f"the image folder {folder} has {found}; expected two or more folders, one a class, "
            "with the images of that class in it."
        )
    files: list[tuple[Path, int]] = []
    for label, directory in enumerate(classes):
        images = sorted(p for p in directory.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not images:
            raise InputError(
                f"the class folder {directory} holds no image; expected {', '.join(SUFFIXES)} "
                "files. Remove the folder or add images."
            )
        files += [(image, label) for image in images]
    channels = 3
    return ImageFolder(
        files,
        channel_values("--mean", mean, channels),
        channel_values("--std", std, channels),
        size or DEFAULT_SIZE,
    )


def _read(file: Path, size: int) -> Tensor:
    pillow: Any = require("PIL.Image", "images")
    try:
        with pillow.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise InputError(
            f"the image {file} can't be read: {error}. Replace or remove it."
        ) from error
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), pillow.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    square = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(square, dtype=np.float32) / 255  # (h, w, c)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
