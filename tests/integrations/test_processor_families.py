"""Images and sounds are what the processors of transformers' families make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image, ImageOps
from scipy.io import wavfile
from transformers.image_transforms import convert_to_rgb

from rankfold.data.sources import read_image_folder, read_wav_folder
from rankfold.errors import InputError
from rankfold.integrations.processors import image_preparation, sound_preparation

SIZE = {"height": 16, "width": 16}
IMAGES: dict[str, Callable[[], Any]] = {
    "vit": lambda: tf.ViTImageProcessor(size=SIZE),
    "deit": lambda: tf.DeiTImageProcessor(size=SIZE, crop_size=SIZE),
    "beit": lambda: tf.BeitImageProcessor(size=SIZE, crop_size=SIZE),
    "bit": lambda: tf.BitImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE),
    "clip": lambda: tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE),
    "siglip": lambda: tf.SiglipImageProcessor(size=SIZE),
    "convnext": lambda: tf.ConvNextImageProcessor(size={"shortest_edge": 16}),
    "efficientnet": lambda: tf.EfficientNetImageProcessor(size=SIZE),
    "levit": lambda: tf.LevitImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE),
    "mobilenet": lambda: tf.MobileNetV2ImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE),
    "mobilevit": lambda: tf.MobileViTImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE),
    "poolformer": lambda: tf.PoolFormerImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE),
    "perceiver": lambda: tf.PerceiverImageProcessor(size=SIZE, crop_size=SIZE),
    "dpt": lambda: tf.DPTImageProcessor(size=SIZE),
    "donut": lambda: tf.DonutImageProcessor(size=SIZE),
}
SOUNDS: dict[str, Callable[[], Any]] = {
    "wav2vec2": lambda: tf.Wav2Vec2FeatureExtractor(sampling_rate=16000),
    "wav2vec2, with a mask": lambda: tf.Wav2Vec2FeatureExtractor(
        sampling_rate=16000, return_attention_mask=True
    ),
    "whisper": lambda: tf.WhisperFeatureExtractor(chunk_length=1),
}


def _images(folder: Path) -> list[Path]:
    """Of modes, orientations and sizes that cameras and tools write."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
    image.save(folder / "cat" / "plain.png")
    image.save(folder / "cat" / "turned.jpg", exif=exif)
    image.convert("CMYK").save(folder / "cat" / "print.tif")
    image.quantize(8).save(folder / "dog" / "palette.png", transparency=0)
    image.convert("L").save(folder / "dog" / "grey.bmp")
    image.convert("RGBA").save(folder / "dog" / "clear.webp", lossless=True)
    return sorted(folder.glob("*/*"))


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_what_the_library_makes_of_them(name: str, tmp_path: Path) -> None:
    IMAGES[name]().save_pretrained(tmp_path / "model")
    files = _images(tmp_path / "images")
    found = read_image_folder(tmp_path / "images", prepare=image_preparation(tmp_path / "model"))
    processor = tf.AutoImageProcessor.from_pretrained(str(tmp_path / "model"))
    assert [file for file, _ in found.files] == files
    for place, file in enumerate(files):
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            # Some processors do this themselves, the others take no other images.
            pixels = convert_to_rgb(upright, return_numpy=True)
            given = (upright, pixels) if processor.do_convert_rgb else (pixels,)
            expected, *same = (processor(images=one, return_tensors="pt") for one in given)
        assert all(torch.equal(s["pixel_values"], expected["pixel_values"]) for s in same)
        assert found[place].keys() == {*expected.keys(), "labels"}
        for key, value in expected.items():
            assert torch.equal(found[place][key], value[0]), (key, file.name)


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds_are_what_the_library_makes_of_them(name: str, tmp_path: Path) -> None:
    SOUNDS[name]().save_pretrained(tmp_path / "model")
    samples = {}
    for place, label in enumerate(("high", "low")):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        samples[label] = np.random.default_rng(place).normal(size=900 + 50 * place) * 3000
        wavfile.write(tmp_path / "sounds" / label / "0.wav", 16000, samples[label].astype(np.int16))
    found = read_wav_folder(tmp_path / "sounds", prepare=sound_preparation(tmp_path / "model"))
    extractor = tf.AutoFeatureExtractor.from_pretrained(str(tmp_path / "model"))
    for place, values in enumerate(samples.values()):
        sound = values.astype(np.int16).astype(np.float32) / 2**15
        expected = extractor(sound, sampling_rate=16000, return_tensors="pt")
        assert found[place].keys() == {*expected.keys(), "labels"}
        for key, value in expected.items():
            assert torch.equal(found[place][key], torch.as_tensor(value)[0]), key


def test_a_processor_that_makes_patches_of_all_images_is_refused(tmp_path: Path) -> None:
    """Their first patch was taken for the image."""
    tf.Qwen2VLImageProcessor(
        min_pixels=28 * 28, max_pixels=56 * 56, patch_size=14, merge_size=2
    ).save_pretrained(tmp_path / "model")
    _images(tmp_path / "images")
    found = read_image_folder(tmp_path / "images", prepare=image_preparation(tmp_path / "model"))
    with pytest.raises(InputError, match=r"makes pixel_values of shape .* of one input"):
        found[0]
