"""A folder of class folders of images, read when they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rankfold.data.account import Account
from rankfold.data.input_settings import InputSettings
from rankfold.data.sources.class_folders import ClassFolder, class_files, labelled, without_broken
from rankfold.data.sources.normalize import channel_values, normalize_images
from rankfold.data.sources.pictures import read_picture
from rankfold.errors import InputError, require

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif", ".jp2",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
DEFAULT_SIZE = 224
PREPARED = "images are prepared as the model's folder says"
# Of an RGB image of Pillow, and of what messages call it, to what the model is given.
ImagePreparation: TypeAlias = Callable[[Any, str], Any]


@dataclass(frozen=True)
class ImageReader:
    """A function of a file, or of one in memory, and of what messages call it: an image's values.

    Attributes:
        make: Of an RGB image of Pillow.
        inputs: What it does, to be recorded.
    """

    make: ImagePreparation
    inputs: InputSettings

    def __call__(self, file: Path | BytesIO, what: str) -> Any:
        """The values of an image.

        Raises:
            InputError: It can't be read.
        """
        return self.make(read_picture(file, what), what)


def read_image_folder(
    folder: Path,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
    *,
    prepare: ImagePreparation | None = None,
    label_ids: Mapping[str, int] | None = None,
    labels_wanted: bool = True,
    skip_broken: bool = False,
) -> ClassFolder:
    """Images whose class is the place of their folder's name among the sorted names.

    Each is read as a person sees it, upright and in sRGB (``pictures.read_picture``). The shorter
    side is resized to ``size`` (224 if None), the middle square is cut out, values
    are scaled to 0..1 and then normalised.

    Args:
        folder: Holds one folder per class.
        mean: Subtracted, per channel (red, green, blue).
        std: Divided by, per channel.
        size: Side of the square, pixels.
        prepare: In place of all that: what the model's own image processor makes of an image,
            with the mean, std and size that are given.
        label_ids: The model's number of each label: that of the folders' names, where it has them.
        labels_wanted: Without it files that don't stand in class folders have no class.
        skip_broken: Leave out images that can't be read; ``skipped`` of the result names them.

    Returns:
        Pairs of a ``(3, size, size)`` float32 image, or what ``prepare`` gives, and its class
        (``class_folders.labelled``).

    Raises:
        InputError: Fewer than two classes, a class without images, names of which the model has
            some as labels and others not, or Pillow isn't installed; when an image is used: it
            can't be read.
    """
    read_image = image_reader(mean, std, size, prepare)
    files = class_files(folder, SUFFIXES, "image", label_ids, labels_wanted=labels_wanted)

    def read(file: Path) -> Any:
        return read_image(file, f"the image {file}")

    found = without_broken(files, read) if skip_broken else ClassFolder(*files, read)
    side = size or DEFAULT_SIZE
    note = f"of each image the middle {side} x {side} pixels"
    if prepare is not None:
        given = [n for n in ("mean", "std", "image_size") if n in read_image.inputs.decided()]
        note = PREPARED + f", but for {', '.join(given)}" * bool(given)
    notes = [*found.account.notes, note]
    found.account = replace(found.account, notes=notes, inputs=read_image.inputs)
    return found


def image_reader(
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
    prepare: ImagePreparation | None = None,
) -> ImageReader:
    """What reads images, from files or from memory.

    Args:
        mean: As for ``read_image_folder``.
        std: Likewise.
        size: Likewise.
        prepare: Likewise.

    Raises:
        InputError: A value is out of its range, or Pillow isn't installed.
    """
    require("PIL", "images")
    if size is not None and size < 1:
        raise InputError(f"image_size= is {size}; expected 1 pixel or more.")
    channels = 3
    means = channel_values("mean", mean, channels)
    stds = channel_values("std", std, channels)
    side = size or DEFAULT_SIZE

    def squares(image: Any, _: str) -> Tensor:
        return normalize_images(_square(image, side), means, stds)

    if prepare is not None:
        return ImageReader(prepare, InputSettings.of_processor(mean, std, size))
    return ImageReader(squares, InputSettings.of_images(mean, std, side, (channels, side, side)))


class TableImages(Dataset[Any]):
    """Images that stand in a table, with their labels where there are some; opened when used.

    Args:
        images: What each image file holds, by the number of its record.
        labels: Of each, or None.
        read: From ``image_reader``.
        where: The table and its column, for messages.
        account: What became of the records.
    """

    def __init__(
        self,
        images: Mapping[int, bytes],
        labels: Sequence[int] | None,
        read: ImageReader,
        where: str,
        account: Account,
    ) -> None:
        self.images, self.places = images, list(images)
        self.labels, self.read, self.where, self.account = labels, read, where, account

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        place = self.places[index]
        image = self.read(
            BytesIO(self.images[place]), f"the image in record {place} of {self.where}"
        )
        return image if self.labels is None else labelled(image, self.labels[index])


def _square(image: Any, size: int) -> Tensor:
    """The middle square of an image whose shorter side is resized to it, ``(3, size, size)``."""
    pillow: Any = require("PIL.Image", "images")
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), pillow.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    square = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(square, dtype=np.float32) / 255  # (h, w, c)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
