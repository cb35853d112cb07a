"""Images and sounds as the ``preprocessor_config.json`` of a transformers folder prepares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.data.sources import ImagePreparation, SoundPreparation
from rankfold.errors import InputError, require
from rankfold.integrations.allowed import sealed

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def has_processor(folder: Path) -> bool:
    """Whether a folder says how the inputs of its model are prepared."""
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def image_preparation(folder: Path) -> ImagePreparation:
    """The folder's image processor: of an RGB image of Pillow, the inputs of its model by name.

    Raises:
        InputError: It can't be opened.
    """
    processor = _opened("AutoImageProcessor", folder, "image_size=, mean= or std=")

    def prepare(image: Any, what: str) -> dict[str, Tensor]:
        return _inputs(folder, what, lambda: processor(images=image, return_tensors="pt"))

    return prepare


def sound_preparation(folder: Path) -> SoundPreparation:
    """The folder's feature extractor: of ``(channels, samples)``, the inputs of its model by name.

    Raises:
        InputError: It can't be opened.
    """
    extractor = _opened("AutoFeatureExtractor", folder, "the data as file.py:function")

    def prepare(sound: Tensor, rate: int, what: str) -> dict[str, Tensor]:
        if len(sound) != 1:
            raise InputError(
                f"{what} has {len(sound)} channels, and the model of {folder} hears one. Mix them "
                "down to one."
            )
        samples = sound[0].numpy()
        return _inputs(
            folder, what, lambda: extractor(samples, sampling_rate=rate, return_tensors="pt")
        )

    return prepare


def _opened(kind: str, folder: Path, instead: str) -> Any:
    transformers = require("transformers", "transformers")
    try:
        with sealed():
            return getattr(transformers, kind).from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # a damaged file makes transformers fail in any way
        raise InputError(
            f"{folder} says how its model's inputs are prepared ({' or '.join(PROCESSOR_FILES)}), "
            f"and that can't be opened: {type(error).__name__}: {error}. Give {instead}."
        ) from error


def _inputs(folder: Path, what: str, run: Any) -> dict[str, Tensor]:
    """What a processor gives, without the batch of one that it makes."""
    try:
        found = {name: torch.as_tensor(values) for name, values in run().items()}
    except Exception as error:
        raise InputError(
            f"{what} can't be prepared as {folder} says: {error}. Change or remove it, or give the "
            "data as file.py:function."
        ) from error
    for name, values in found.items():
        if values.dim() == 0 or len(values) != 1:
            raise InputError(
                f"the processor of {folder} makes {name} of shape {tuple(values.shape)} of one "
                "input, and so no example that can stand in a batch with others. Give the data as "
                "file.py:function."
            )
    return {name: values[0] for name, values in found.items()}
