"""Folders of class folders: what is read, skipped and refused."""

from __future__ import annotations

import json
import re
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from rankfold.data.sources import read_image_folder, read_wav_folder, source_kind
from rankfold.errors import InputError
from tests.command_line import rankfold


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
    with pytest.raises(InputError, match=r"cat/0\.png can't be read.*skip_broken=True"):
        read_image_folder(folder, size=4)[0]
    found = read_image_folder(folder, size=4, skip_broken=True)
    assert [(file.name, label) for file, label in found.files] == [
        ("1.png", 0),
        ("0.png", 1),
        ("1.png", 1),
    ]
    (message,) = found.skipped
    assert str(folder / "cat" / "0.png") in message and "skip_broken" not in message
    assert found[0][0].shape == (3, 4, 4)


def test_a_class_of_broken_images_only_is_refused(tmp_path: Path) -> None:
    folder = _images(tmp_path)
    for file in (folder / "dog").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"no file of class 1 can be read.*dog/0\.png"):
        read_image_folder(folder, skip_broken=True)


@pytest.mark.parametrize("inside", [".", "all", "some/where"])
def test_images_without_labels_may_stand_anywhere(tmp_path: Path, inside: str) -> None:
    place = tmp_path / inside
    place.mkdir(parents=True, exist_ok=True)
    (tmp_path / ".hidden").mkdir()
    for file in (*(place / f"{number}.png" for number in range(3)), tmp_path / ".hidden/4.png"):
        Image.new("RGB", (6, 4), (9, 0, 0)).save(file)
    assert source_kind(str(tmp_path)) == "images"
    with pytest.raises(InputError, match=r'two or more folders.*task="teacher"'):
        read_image_folder(tmp_path, size=4)
    found = read_image_folder(tmp_path, size=4, labels_wanted=False)
    assert [file.name for file, _ in found.files] == ["0.png", "1.png", "2.png"]
    assert found[0].shape == (3, 4, 4)
    for number in range(3):
        (place / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"none of the files can be read.*0\.png"):
        read_image_folder(tmp_path, size=4, labels_wanted=False, skip_broken=True)


def test_class_folders_keep_their_classes_where_no_labels_are_wanted(tmp_path: Path) -> None:
    folder = _images(tmp_path)
    assert read_image_folder(folder, size=4, labels_wanted=False)[3][1] == 1
    Image.new("RGB", (6, 4), (9, 0, 0)).save(folder / "loose.png")
    found = read_image_folder(folder, size=4, labels_wanted=False)
    assert [label for _, label in found.files] == [None] * 5


def test_a_folder_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no image; expected \.jpg"):
        read_image_folder(tmp_path, labels_wanted=False)


def _sounds(folder: Path, count: int = 2, rate: int = 8000) -> Path:
    generator = np.random.default_rng(0)
    for label, pitch in (("high", 0.9), ("low", 0.2)):
        (folder / label).mkdir(parents=True)
        for place in range(count):
            sound = np.sin(pitch * np.arange(200)) + generator.normal(size=200)
            wavfile.write(folder / label / f"{place}.wav", rate, (sound * 5000).astype(np.int16))
    return folder


def test_samples_of_every_width_mean_the_same(tmp_path: Path) -> None:
    wanted = torch.tensor([[0.0, 0.5, -1.0], [0.25, -0.5, 0.75]])
    columns = wanted.T.double().numpy()
    for label, kind in (("a", np.int16), ("b", np.int32), ("c", np.float32)):
        (tmp_path / label).mkdir()
        scale = 1 if kind is np.float32 else -float(np.iinfo(kind).min)
        wavfile.write(tmp_path / label / "x.wav", 8000, (columns * scale).astype(kind))
    (tmp_path / "d").mkdir()
    wavfile.write(tmp_path / "d" / "x.wav", 8000, (columns * 128 + 128).astype(np.uint8))
    (tmp_path / "e").mkdir()
    with wave.open(str(tmp_path / "e" / "x.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(3)
        file.setframerate(8000)
        whole = (columns * 2**23).astype("<i4")
        file.writeframes(whole.reshape(-1, 1).view(np.uint8)[:, :3].tobytes())
    found = read_wav_folder(tmp_path)
    assert found.account.notes == ["sounds of 0.00 to 0.00 s, 8000 samples a second, 2 channels"]
    assert [label for _, label in found] == [0, 1, 2, 3, 4]
    for sound, _ in found:
        assert sound.dtype == torch.float32
        torch.testing.assert_close(sound, wanted, rtol=0, atol=0)


def test_sounds_of_another_rate_or_channels_are_refused_by_name(tmp_path: Path) -> None:
    folder = _sounds(tmp_path)
    wavfile.write(folder / "low" / "1.wav", 16000, np.ones(9, np.int16))
    for skip in (False, True):
        with pytest.raises(InputError, match=r"low/1\.wav has 16000 .*high/0\.wav has 8000 and 1"):
            read_wav_folder(folder, skip_broken=skip)
    wavfile.write(folder / "low" / "1.wav", 8000, np.ones((9, 2), np.int16))
    with pytest.raises(InputError, match=r"low/1\.wav has 8000 samples a second and 2 channels"):
        read_wav_folder(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda whole: whole[: len(whole) // 2], "Reached EOF"),
        (lambda whole: whole[:20], "header is damaged"),
        (lambda _: b"no sound at all", "not understood"),
        (lambda whole: b"RIFF\x24\0\0\0" + whole[8:40] + b"\0\0\0\0", "holds no sample"),
    ],
)
def test_a_broken_sound_is_refused_or_named_and_skipped(
    content: object, reason: str, tmp_path: Path
) -> None:
    folder = _sounds(tmp_path)
    file = folder / "high" / "1.wav"
    file.write_bytes(content(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(InputError, match=rf"high/1\.wav.*{reason}.*skip_broken=True"):
        read_wav_folder(folder)
    found = read_wav_folder(folder, skip_broken=True)
    assert len(found) == 3 and len(found.skipped) == 1 and "high/1.wav" in found.skipped[0]


def test_a_sound_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    folder = _sounds(tmp_path)
    wavfile.write(folder / "low" / "0.wav", 8000, np.array([0, np.nan], np.float32))
    with pytest.raises(InputError, match=r"low/0\.wav holds NaN or infinite samples"):
        read_wav_folder(folder)


def test_images_beside_sounds_are_refused(tmp_path: Path) -> None:
    folder = _sounds(tmp_path / "both")
    assert source_kind(str(folder)) == "sounds"
    Image.new("RGB", (6, 4)).save(folder / "low" / "spectrum.png")
    with pytest.raises(InputError, match="holds both images and wav files"):
        source_kind(str(folder))


def test_the_command_on_a_wav_folder(tmp_path: Path) -> None:
    _sounds(tmp_path / "sounds", count=30)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef net():\n"
        "    return nn.Sequential(nn.Conv1d(1, 8, 8, 4), nn.ReLU(), nn.Conv1d(8, 8, 8, 4),\n"
        "                         nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 2))\n"
    )
    command = ("lossless", "net.py:net", "--data", "sounds", "--size", "0.8", "--out", "out")
    done = rankfold(*command, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["task"] == "classification"
    (tmp_path / "sounds" / "low" / "cut.wav").write_bytes(b"RIFF")
    refused = rankfold(*command[:-1], "other", cwd=tmp_path, expect=2)
    assert "sounds/low/cut.wav can't be read" in refused.stderr
    skipping = rankfold(*command[:-1], "other", "--skip-broken", cwd=tmp_path)
    assert "skipped 1 of 61 files of sounds" in skipping.stderr


def test_a_folder_of_other_files_is_named(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.jsonl", "c.txt"):
        (tmp_path / name).write_text("x")
        with pytest.raises(InputError, match=rf"holds files of records or text: .*{name}"):
            source_kind(str(tmp_path))


def test_classes_of_the_model_without_a_folder_are_told(tmp_path: Path) -> None:
    for name in ("cat", "owl"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    labels = {"ant": 0, "cat": 1, "dog": 2, "owl": 3}
    notes = read_image_folder(tmp_path, label_ids=labels).account.notes
    assert "no example of the model's class 0 'ant', 2 'dog'" in notes
    whole = read_image_folder(tmp_path, label_ids={"cat": 0, "owl": 1}).account.notes
    assert not [note for note in whole if "no example" in note]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.xlsx", "a spreadsheet (.xlsx). Save it as .csv"),
        ("a.ods", "a spreadsheet"),
        ("a.PDF", "a document (.PDF)"),
        ("a.docx", "a document"),
        ("a.jsonl.gz", "an archive (.gz). Unpack it"),
        ("a.zip", "an archive"),
        ("a.h5", "a file of tables or arrays"),
        ("a.feather", "Save it as .parquet"),
        ("a.png", "one image (.png). Give the folder"),
        ("a.wav", "one sound"),
    ],
)
def test_files_that_are_no_data_say_what_they_are(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK of some kind")
    with pytest.raises(InputError, match=re.escape(f"{name} is ") + ".*" + re.escape(said)):
        source_kind(str(tmp_path / name))
