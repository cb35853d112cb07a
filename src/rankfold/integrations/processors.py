"""Images and sounds as the ``preprocessor_config.json`` of a transformers folder prepares them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.data.sources import ImagePreparation, SoundPreparation
from rankfold.data.sources.normalize import channel_values
from rankfold.errors import InputError, require
from rankfold.integrations.allowed import sealed

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
REPAIR = "Repair the file; without it, image_size=, mean= and std= say how"


def has_processor(folder: Path) -> bool:
    """Whether a folder says how the inputs of its model are prepared."""
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def image_preparation(
    folder: Path,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
) -> ImagePreparation:
    """The folder's image processor: of an RGB image of Pillow, the inputs of its model by name.

    What is given takes the place of the processor's own; all else stays as the folder says.

    Args:
        folder: Holds the processor's files.
        mean: Subtracted, per channel.
        std: Divided by, per channel.
        size: Side of the square that the model is given, pixels.

    Raises:
        InputError: It can't be opened, or has no part in which what is given could stand.
    """
    processor = _opened("AutoImageProcessor", folder, REPAIR)
    changed: dict[str, Any] = _normalised(processor, folder, mean, std)
    if size is not None:
        changed |= _of_size(processor, folder, size)

    def prepare(image: Any, what: str) -> dict[str, Tensor]:
        return _inputs(
            folder, what, lambda: processor(images=image, return_tensors="pt", **changed)
        )

    if size is not None:
        _check_size(folder, size, prepare)
    return prepare


def _normalised(
    processor: Any, folder: Path, mean: Sequence[float] | None, std: Sequence[float] | None
) -> dict[str, Any]:
    """The processor's arguments for a mean and a std; the other one stays as it is used."""
    given = {"mean": channel_values("mean", mean, 3), "std": channel_values("std", std, 3)}
    asked = [name for name, values in given.items() if values is not None]
    if not asked:
        return {}
    own = {
        "mean": getattr(processor, "image_mean", None),
        "std": getattr(processor, "image_std", None),
    }
    if not hasattr(processor, "image_mean") or not hasattr(processor, "image_std"):
        raise _no_part(processor, folder, f"{asked[0]}=")
    if not getattr(processor, "do_normalize", None):
        own = {"mean": [0.0] * 3, "std": [1.0] * 3}
    found = {f"image_{name}": values or own[name] for name, values in given.items()}
    return {"do_normalize": True, **found}


def _of_size(processor: Any, folder: Path, side: int) -> dict[str, Any]:
    """The processor's arguments for images of ``side`` x ``side`` pixels.

    Where it cuts out the middle, what it resizes to before keeps its proportion to that.
    """
    if side < 1:
        raise InputError(f"image_size= is {side}; expected 1 pixel or more.")
    edges, cut = _edges(getattr(processor, "size", None)), None
    if getattr(processor, "do_center_crop", None):
        cut = _edges(getattr(processor, "crop_size", None))
    known = edges.keys() in ({"height", "width"}, {"shortest_edge"})
    square = cut is None or (cut.keys() == {"height", "width"} and len({*cut.values()}) == 1)
    if not known or not square:
        raise _no_part(processor, folder, "image_size=")
    if cut is None:
        return {"do_resize": True, "size": dict.fromkeys(edges, side)}
    scale = side / cut["height"]
    sizes = {name: max(side, round(edge * scale)) for name, edge in edges.items()}
    return {"do_resize": True, "size": sizes, "crop_size": {"height": side, "width": side}}


def _edges(size: Any) -> dict[str, int]:
    """What a processor's size says, by name, in pixels."""
    found = size if isinstance(size, dict) else getattr(size, "__dict__", {})
    return {name: edge for name, edge in found.items() if isinstance(edge, int)}


def _check_size(folder: Path, size: int, prepare: ImagePreparation) -> None:
    """Refuse a processor that makes something else than squares of a size of an image."""
    image: Any = require("PIL.Image", "images").new("RGB", (2 * size + 20, size + 10))
    shapes = {name: tuple(one.shape) for name, one in prepare(image, "an image").items()}
    if not any(shape[-2:] == (size, size) for shape in shapes.values()):
        made = ", ".join(f"{name} of shape {shape}" for name, shape in shapes.items())
        raise InputError(
            f"image_size= is {size}, and the processor of {folder} makes {made} of an image then. "
            f"Leave image_size= out, or change the size in {' or '.join(PROCESSOR_FILES)}."
        )


def _no_part(processor: Any, folder: Path, option: str) -> InputError:
    return InputError(
        f"{option} has no part in {type(processor).__name__}, which prepares images as {folder} "
        f"says. Leave {option} out, or change {' or '.join(PROCESSOR_FILES)}."
    )


def sound_preparation(folder: Path) -> SoundPreparation:
    """The folder's feature extractor: of ``(channels, samples)``, the inputs of its model by name.

    Raises:
        InputError: It can't be opened.
    """
    extractor = _opened("AutoFeatureExtractor", folder, "Give the data as file.py:function")

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
            f"and that can't be opened: {type(error).__name__}: {error}. {instead}."
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
