"""An ``.npz`` is taken as it is meant, or refused by name: nothing in it is dropped or turned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rankfold.data.sources import read_npz
from rankfold.errors import InputError

COUNT = 6
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 5, 7, 3), dtype=np.uint8)
VALUES = np.random.default_rng(1).normal(size=(COUNT, 4))
LABELS = np.arange(COUNT) % 3


def saved(folder: Path, **arrays: object) -> Path:
    file = folder / "data.npz"
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_bytes_are_images_whose_channels_stand_last(tmp_path: Path, channels: int | None) -> None:
    shape = (COUNT, 5, 7) if channels is None else (COUNT, 5, 7, channels)
    pixels = np.resize(PIXELS, shape)
    found = read_npz(saved(tmp_path, x=pixels, y=LABELS))
    wanted = torch.from_numpy(pixels.reshape(COUNT, 5, 7, -1)).permute(0, 3, 1, 2).float() / 255
    assert all(torch.equal(found[place][0], wanted[place]) for place in range(COUNT))


@pytest.mark.parametrize("kind", ["<f8", ">f8", "<f4", ">f4", "<f2"])
def test_values_are_those_of_the_file_whatever_their_bytes(tmp_path: Path, kind: str) -> None:
    values = VALUES.astype(kind)
    found = read_npz(saved(tmp_path, x=values, y=LABELS.astype(">i2")))
    for place in range(COUNT):
        inputs, label = found[place]
        assert inputs.tolist() == values[place].astype(np.float32).tolist()
        assert int(label) == LABELS[place]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": PIXELS.transpose(0, 3, 1, 2), "y": LABELS}, r"channels, which stand last"),
        ({"x": VALUES, "y": LABELS, "names": np.array(["a"])}, "holds names beside x and y"),
        ({"x": np.full((COUNT, 2), 1e300), "y": LABELS}, "too large for float32 .* example 0"),
        ({"x": VALUES, "y": LABELS[:3]}, "6 inputs in x but 3 labels in y"),
        ({"x": VALUES, "y": LABELS / 2}, "expected one whole number per example"),
        ({"x": VALUES}, "expected the arrays x and y"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_dropped_or_turned_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        read_npz(saved(tmp_path, **arrays))
