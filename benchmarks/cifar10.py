"""Images of CIFAR-10 and their labels, from the files of the shared data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks import shared_data

PerChannel: TypeAlias = tuple[float, float, float]
TEST_FILE = "cifar10_test1000.npz"
TRAINING_FILES = 5
IMAGES_PER_FILE = 10_000


def cifar10_test(mean: PerChannel, std: PerChannel) -> tuple[Tensor, Tensor]:
    """The first 1,000 test images, (1000, 3, 32, 32) float32, and their labels."""
    images, labels = _read(TEST_FILE)
    return normalised(images, mean, std), labels


def cifar10_train(
    count: int, seed: int, mean: PerChannel, std: PerChannel
) -> tuple[Tensor, Tensor]:
    """Training images drawn without replacement, (count, 3, 32, 32) float32, and their labels.

    Raises:
        ValueError: There are not as many images.
    """
    total = TRAINING_FILES * IMAGES_PER_FILE
    if not 0 < count <= total:
        raise ValueError(f"count must be in 1..{total}, not {count}")
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    images = torch.empty(count, 3, 32, 32, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.long)
    for number in range(TRAINING_FILES):
        here = drawn // IMAGES_PER_FILE == number
        if here.any():
            rows = drawn[here] % IMAGES_PER_FILE
            images[here], labels[here] = (part[rows] for part in training_files([number]))
    return normalised(images, mean, std), labels


def training_files(numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
    """All images of some of the five training files, (n, 3, 32, 32) uint8, and their labels."""
    images, labels = zip(*(_read(f"cifar10_train_{number}.npz") for number in numbers), strict=True)
    return torch.cat(images), torch.cat(labels)


def normalised(images: Tensor, mean: PerChannel, std: PerChannel) -> Tensor:
    """uint8 (n, 3, h, w) to the float32 images that a net was trained on."""
    centre, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images.float() / 255 - centre) / scale


def _read(name: str) -> tuple[Tensor, Tensor]:
    with np.load(shared_data() / "cifar10" / name) as archive:
        images, labels = (torch.from_numpy(archive[key]) for key in ("x", "y"))
    return images.permute(0, 3, 1, 2).contiguous(), labels.long()
