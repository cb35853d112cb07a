"""Folders of class folders: what is read, skipped and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from rankfold.errors import InputError
from rankfold.sources import read_image_folder


def _images(folder: Path) -> Path:
    for label in ("cat", "dog"):
        (folder / label).mkdir()
        for place in range(2):
            Image.new("RGB", (6, 4), (place, 0, 0)).save(folder / label / f"{place}.png")
    return folder


def test_a_broken_image_is_refused_or_named_and_skipped(tmp_path: Path) -> None:
    folder = _images(tmp_path)
    whole = (folder / "cat" / "0.png").read_bytes()
    (folder / "cat" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cat/0\.png can't be read.*--skip-broken"):
        read_image_folder(folder, size=4)[0]
    found = read_image_folder(folder, size=4, skip_broken=True)
    assert [(file.name, label) for file, label in found.files] == [
        ("1.png", 0),
        ("0.png", 1),
        ("1.png", 1),
    ]
    (message,) = found.skipped
    assert str(folder / "cat" / "0.png") in message and "--skip-broken" not in message
    assert found[0][0].shape == (3, 4, 4)


def test_a_class_of_broken_images_only_is_refused(tmp_path: Path) -> None:
    folder = _images(tmp_path)
    for file in (folder / "dog").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"no file of class 1 can be read.*dog/0\.png"):
        read_image_folder(folder, skip_broken=True)
