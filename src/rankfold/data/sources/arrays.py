"""Arrays of inputs and labels in a NumPy ``.npz`` file, read without pickle."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from rankfold.data.account import Account
from rankfold.data.input_settings import InputSettings
from rankfold.data.labels import class_numbers
from rankfold.data.sources.class_folders import labelled
from rankfold.data.sources.images import ImagePreparation
from rankfold.data.sources.normalize import channel_values, normalize_images
from rankfold.errors import InputError, note, require

MOST_CHANNELS = 4


class PreparedImages(Dataset[Any]):
    """Images of an array and their labels, each prepared when it is used.

    Args:
        images: uint8 ``(n, h, w, 3)``, or ``(n, h, w)`` or ``(n, h, w, 1)`` of grey ones.
        labels: ``(n,)`` int64.
        prepare: Of an RGB image of Pillow.
        account: What became of the file, which it names for messages.
    """

    def __init__(
        self, images: np.ndarray, labels: Tensor, prepare: ImagePreparation, account: Account
    ) -> None:
        self.images, self.labels, self.prepare, self.account = images, labels, prepare, account

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        pillow: Any = require("PIL.Image", "images")
        pixels = self.images[index]
        image = pillow.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
        inputs = self.prepare(image.convert("RGB"), f"image {index} of {self.account.source}")
        return labelled(inputs, int(self.labels[index]))


class ArrayExamples(TensorDataset):
    """Pairs of an input and a label.

    Attributes:
        account: What became of the file.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, account: Account) -> None:
        super().__init__(inputs, labels)
        self.account = account


def read_npz(
    file: Path,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
    *,
    prepare: ImagePreparation | None = None,
    label_ids: Mapping[str, int] | None = None,
) -> ArrayExamples | PreparedImages:
    """Inputs ``x`` and labels ``y``.

    Args:
        file: ``x`` uint8 ``(n, h, w, c)`` or ``(n, h, w)``, scaled to 0..1, or float
            ``(n, c, h, w)`` or of any other shape, taken as it is; ``y`` ``(n,)`` whole numbers.
        mean: Subtracted, per channel.
        std: Divided by, per channel.
        size: Side of the squares that ``prepare`` makes, pixels, where it was asked for.
        prepare: What the model's own image processor makes of an image, where ``x`` is uint8.
        label_ids: The model's number of each label, or None (``labels.class_numbers``).

    Returns:
        Pairs of a float32 input and an int64 label; what ``prepare`` gives in place of the input.

    Raises:
        InputError: Names what is wrong with the file.
    """
    x, y = _arrays(file)
    if x.dtype.kind not in "uf" or (x.dtype.kind == "u" and x.dtype != np.uint8):
        raise InputError(
            f"x in {file} is {x.dtype}; expected uint8 images (n, h, w, c) or floats (n, c, h, w)."
        )
    if len(x) != len(y):
        raise InputError(f"{file} has {len(x)} inputs in x but {len(y)} labels in y.")
    if len(x) == 0:
        raise InputError(f"{file} is empty: x and y hold no example.")
    labels, account = _labels(file, y, label_ids)
    pictures = x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and x.shape[3] in (1, 3)))
    if prepare is not None and pictures:
        account = replace(account, inputs=InputSettings.of_processor(mean, std, size))
        return PreparedImages(x, labels, prepare, account)
    inputs = _inputs(file, x)
    if mean is not None or std is not None:
        if inputs.dim() != 4:
            raise InputError(
                f"mean= and std= need images; x in {file} has the shape {x.shape}, expected "
                "(n, h, w, c) or (n, c, h, w)."
            )
        channels = inputs.shape[1]
        inputs = normalize_images(
            inputs, channel_values("mean", mean, channels), channel_values("std", std, channels)
        )
    account = replace(account, inputs=_decided(x, inputs, mean, std))
    return ArrayExamples(inputs, labels, account)


def _decided(
    x: np.ndarray, inputs: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> InputSettings:
    """What was done to images; floats that nothing is done to may have been prepared before."""
    if inputs.dim() != 4:
        return InputSettings()
    shape = tuple(inputs.shape[1:])
    if x.dtype != np.uint8 and mean is None and std is None:
        return InputSettings(shape=shape)
    return InputSettings.of_images(mean, std, shape=shape)


def _arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The arrays x and y; a file that holds others too is refused, since they would be dropped."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{file} is a single array; expected an .npz with x and y.")
            names = archive.files
            note(*names)
            if "x" not in names or "y" not in names:
                raise InputError(
                    f"{file} holds {', '.join(names) or 'nothing'}; expected the arrays x and y "
                    "(numpy.savez(file, x=..., y=...))."
                )
            others = [name for name in names if name not in ("x", "y")]
            if others:
                raise InputError(
                    f"{file} holds {', '.join(others)} beside x and y; expected these two alone. "
                    "Save them in a file of their own, or give the data as file.py:function."
                )
            return archive["x"], archive["y"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{file} can't be read as an .npz of plain arrays: {error}. rankfold reads no pickles; "
            "write it with numpy.savez(file, x=..., y=...)."
        ) from error


def _inputs(file: Path, x: np.ndarray) -> Tensor:
    if x.dtype == np.uint8:
        if x.ndim not in (3, 4):
            raise InputError(
                f"x in {file} is uint8 of shape {x.shape}; expected images (n, h, w, c) or "
                "(n, h, w)."
            )
        if x.ndim == 4 and x.shape[3] > MOST_CHANNELS:
            raise InputError(
                f"x in {file} is uint8 of shape {x.shape}; expected images (n, h, w, c) with at "
                f"most {MOST_CHANNELS} channels, which stand last: x.transpose(0, 2, 3, 1) of "
                "(n, c, h, w). Values of another kind are given as floats."
            )
        images = torch.from_numpy(x if x.ndim == 4 else x[..., None])
        return images.permute(0, 3, 1, 2).contiguous().float() / 255
    if x.ndim < 2:
        raise InputError(f"x in {file} has the shape {x.shape}; expected one input a row.")
    with np.errstate(over="ignore"):
        inputs = torch.from_numpy(x.astype(np.float32))
    if not bool(torch.isfinite(inputs).all()):
        bad = int((~torch.isfinite(inputs.flatten(1)).all(1)).nonzero()[0])
        raise InputError(
            f"x in {file} holds values that are NaN, infinite or too large for float32 (first in "
            f"example {bad}); expected finite ones."
        )
    return inputs


def _labels(
    file: Path, y: np.ndarray, label_ids: Mapping[str, int] | None
) -> tuple[Tensor, Account]:
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise InputError(
            f"y in {file} is {y.dtype} of shape {y.shape}; expected one whole number per example: "
            "its class, from 0."
        )
    found = class_numbers(f"y in {file}", y.tolist(), label_ids)
    account = Account(str(file), "row", len(y), len(y), classes=found.counts, notes=found.notes)
    return torch.tensor(found.numbers, dtype=torch.int64), account
