"""Images and sounds as the folder of a transformers model says that they are prepared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from scipy.io import wavfile
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import OpenedModel, open_examples, open_model
from rankfold.errors import InputError
from tests.command_line import rankfold

NAMES = ("cat", "dog", "owl")
NUMBERS = {"owl": 0, "dog": 1, "cat": 2}  # not in the order of the names


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, label2id=NUMBERS, id2label={i: n for n, i in NUMBERS.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    )
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def listener(tmp_path: Path) -> Path:
    config = Wav2Vec2Config(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, conv_dim=[8, 8], conv_kernel=[10, 3], conv_stride=[5, 2],
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        classifier_proj_size=8, label2id=NUMBERS, id2label={i: n for n, i in NUMBERS.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(tmp_path / "listener")
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path / "listener")
    return tmp_path / "listener"


def _images(folder: Path, names: tuple[str, ...] = NAMES, count: int = 16) -> Path:
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for place in range(count):
            pixels = generator.integers(0, 256, (20, 30, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{place:02}.png")
    return folder


def _sounds(folder: Path, count: int = 16, channels: int = 1, rate: int = 8000) -> Path:
    generator = np.random.default_rng(0)
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        for place in range(count):
            sound = generator.normal(size=(300 + 10 * (place % 2), channels))
            file = folder / name / f"{place:02}.wav"
            wavfile.write(file, rate, (sound * 3000).astype(np.int16))
    return folder


def test_images_are_prepared_as_the_models_folder_says(vit: Path, tmp_path: Path) -> None:
    images, opened = _images(tmp_path / "images"), open_model(str(vit))
    found = open_examples(str(images), opened, DataOptions())
    processor = AutoImageProcessor.from_pretrained(str(vit))
    for place, name in ((0, "cat"), (16, "dog"), (47, "owl")):
        with Image.open(images / name / f"{place % 16:02}.png") as image:
            expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
        assert found[place].keys() == {"pixel_values", "labels"}
        assert torch.equal(found[place]["pixel_values"], expected)
        assert int(found[place]["labels"]) == NUMBERS[name]


# Of 20 x 30 pixels what each processor makes with another mean, std or size; its other settings.
PROCESSORS = {
    "ViTImageProcessor": {"size": {"height": 16, "width": 16}},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 16}, "crop_pct": 0.8},
    "CLIPImageProcessor": {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
    "DeiTImageProcessor": {
        "size": {"height": 20, "width": 20}, "crop_size": {"height": 16, "width": 16}
    },
    "MobileNetV2ImageProcessor": {
        "size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}
    },
    "SiglipImageProcessor": {"size": {"height": 16, "width": 16}, "do_normalize": False},
}  # fmt: skip
GIVEN = {"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7], "image_size": 8}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("asked", [("mean",), ("std",), ("image_size",), (*GIVEN,)])
def test_what_is_not_given_stays_the_processors(
    name: str, asked: tuple[str, ...], vit: Path, tmp_path: Path
) -> None:
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 0}
    settings = {**own, **PROCESSORS[name]}
    getattr(tf, name)(**settings).save_pretrained(vit)
    normalised = settings.get("do_normalize", True)
    expected = {**settings, "do_normalize": True}
    if not normalised:
        expected |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    if normalised is False and asked == ("image_size",):
        expected["do_normalize"] = False
    expected |= {f"image_{one}": GIVEN[one] for one in asked if one != "image_size"}
    if "image_size" in asked:  # half of 16: so is what is resized to before
        for edges in ("size", "crop_size"):
            halves = {edge: side // 2 for edge, side in settings.get(edges, {}).items()}
            expected |= {edges: halves} if halves else {}
    images = _images(tmp_path / "images", count=2)
    options = DataOptions(**{one: GIVEN[one] for one in asked})  # type: ignore[arg-type]
    found = open_examples(str(images), open_model(str(vit)), options)
    with Image.open(images / "cat" / "00.png") as image:
        wanted = getattr(tf, name)(**expected)(images=image, return_tensors="pt")
    assert torch.equal(found[0]["pixel_values"], wanted["pixel_values"][0])
    recorded = found.account.inputs.as_dict()  # type: ignore[attr-defined]
    assert recorded == {"prepared_by": "processor"} | {one: GIVEN[one] for one in asked}
    notes = found.account.notes  # type: ignore[attr-defined]
    assert notes[-1].endswith(f"as the model's folder says, but for {', '.join(asked)}")


def test_what_a_processor_can_not_do_otherwise_is_refused(vit: Path, tmp_path: Path) -> None:
    images = _images(tmp_path / "images", count=2)
    tf.DetrImageProcessor().save_pretrained(vit)
    with pytest.raises(InputError, match=r"image_size= has no part in DetrImageProcessor"):
        open_examples(str(images), open_model(str(vit)), DataOptions(image_size=8))
    tf.BitImageProcessor(size={"shortest_edge": 16}, do_center_crop=False).save_pretrained(vit)
    with pytest.raises(InputError, match=r"image_size= is 8, .* of shape \(3, 8, 16\)"):
        open_examples(str(images), open_model(str(vit)), DataOptions(image_size=8))


def test_a_saved_model_is_read_with_what_was_given(vit: Path, tmp_path: Path) -> None:
    images = _images(tmp_path / "images")
    made = (
        "lossless", vit, "--data", images, "--size", 0.9, "--mean", "0.2,0.3,0.4", "--effort",
        "fast", "--out", "out", "--largest-change", 0.01,
    )  # fmt: skip
    assert "but for mean" in rankfold(*made, cwd=tmp_path).stderr
    done = rankfold("verify", "out", "--data", images, "--model", vit, cwd=tmp_path)
    assert "agrees with all that was checked" in done.stdout
    for options, message in (
        (("--mean", "0.5"), "--mean is 0.5"),
        (("--std", "0.5"), "--std is 0.5"),
    ):
        done = rankfold("evaluate", "out", "--data", images, *options, cwd=tmp_path, expect=2)
        assert message in done.stderr


def test_images_of_an_array_are_prepared_too(vit: Path, tmp_path: Path) -> None:
    opened = open_model(str(vit))
    processor = AutoImageProcessor.from_pretrained(str(vit))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3)).astype(np.uint8)
    for x in (pixels, pixels[..., :1], pixels[..., 0]):
        file = tmp_path / "data.npz"
        np.savez(file, x=x, y=np.array([2, 0, 1]))
        found = open_examples(str(file), opened, DataOptions())
        colours = x if x.shape[-1] == 3 else np.repeat(pixels[..., :1], 3, -1)
        expected = processor(images=Image.fromarray(colours[1]), return_tensors="pt")
        assert len(found) == 3
        assert torch.equal(found[1]["pixel_values"], expected["pixel_values"][0])
        assert int(found[0]["labels"]) == 2
    floats = np.ones((3, 3, 16, 16), np.float32)
    np.savez(tmp_path / "floats.npz", x=floats, y=np.array([2, 0, 1]))
    inputs, _ = open_examples(str(tmp_path / "floats.npz"), opened, DataOptions())[0]
    assert torch.equal(inputs, torch.ones(3, 16, 16))
    told = open_examples(str(tmp_path / "data.npz"), opened, DataOptions(mean=[0.5]))
    expected = processor(
        images=Image.fromarray(colours[0]), image_mean=[0.5] * 3, return_tensors="pt"
    )
    assert torch.equal(told[0]["pixel_values"], expected["pixel_values"][0])


def test_images_are_prepared_as_timm_keeps_it_with_its_models(tmp_path: Path) -> None:
    model = torch.nn.Flatten()
    model.pretrained_cfg = {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.1, 0.2),
        "input_size": (3, 8, 8),
    }  # type: ignore[assignment]
    images = _images(tmp_path / "images", count=2)
    for options in (
        DataOptions(),
        DataOptions(mean=[0.5, 0.4, 0.3], std=[0.2, 0.1, 0.2], image_size=8),
        DataOptions(image_size=8),
        DataOptions(std=[0.2, 0.1, 0.2]),
    ):
        image, label = open_examples(str(images), OpenedModel(model, None, None), options)[5]
        with Image.open(images / "owl" / "01.png") as opened:
            pixels = opened.resize((12, 8), Image.Resampling.BILINEAR).crop((2, 0, 10, 8))
        expected = (np.asarray(pixels) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.1, 0.2]
        torch.testing.assert_close(
            image, torch.from_numpy(expected).permute(2, 0, 1).float(), rtol=0, atol=1e-4
        )
        assert label == 2


def test_folders_whose_names_are_no_labels_count_from_0(vit: Path, tmp_path: Path) -> None:
    opened = open_model(str(vit))
    others = _images(tmp_path / "others", ("ant", "bee", "fly"))
    found = open_examples(str(others), opened, DataOptions())
    assert [int(found[place]["labels"]) for place in (0, 16, 47)] == [0, 1, 2]
    mixed = _images(tmp_path / "mixed", ("bee", "dog", "owl"))
    with pytest.raises(InputError, match=r"bee in .*mixed are no labels.*owl, dog, cat"):
        open_examples(str(mixed), opened, DataOptions())


def test_images_without_labels_are_read_for_tasks_that_need_none(vit: Path, tmp_path: Path) -> None:
    images, opened = _images(tmp_path / "images", ("all",)), open_model(str(vit))
    found = open_examples(str(images), opened, DataOptions(task="teacher"))
    assert len(found) == 16
    assert found[0].keys() == {"pixel_values"}
    with pytest.raises(InputError, match="two or more folders"):
        open_examples(str(images), opened, DataOptions())


def test_sounds_are_prepared_as_the_models_folder_says(listener: Path, tmp_path: Path) -> None:
    sounds, opened = _sounds(tmp_path / "sounds"), open_model(str(listener))
    found = open_examples(str(sounds), opened, DataOptions())
    extractor = AutoFeatureExtractor.from_pretrained(str(listener))
    _, samples = wavfile.read(sounds / "cat" / "01.wav")
    expected = extractor(
        samples.astype(np.float32) / 2**15, sampling_rate=8000, return_tensors="pt"
    )
    assert found[1].keys() == {"input_values", "labels"}
    torch.testing.assert_close(found[1]["input_values"], expected["input_values"][0])
    assert int(found[1]["labels"]) == NUMBERS["cat"]


def test_sounds_that_the_model_does_not_hear_are_refused(listener: Path, tmp_path: Path) -> None:
    opened = open_model(str(listener))
    for options, message in (
        ({"channels": 2}, r"cat/00\.wav has 2 channels.*Mix them down"),
        ({"rate": 4000}, r"cat/00\.wav can't be prepared.*sampling rate"),
    ):
        sounds = _sounds(tmp_path / next(iter(options)), 2, **options)
        with pytest.raises(InputError, match=f"(?s){message}"):
            open_examples(str(sounds), opened, DataOptions())[0]


def test_a_processor_that_can_not_be_opened_is_named(vit: Path, tmp_path: Path) -> None:
    images, opened = _images(tmp_path / "images", count=2), open_model(str(vit))
    (vit / "preprocessor_config.json").write_text('{"image_processor_type": "No')
    with pytest.raises(InputError, match=f"{re.escape(str(vit))} says how.*Repair the file"):
        open_examples(str(images), opened, DataOptions())
    (vit / "preprocessor_config.json").unlink()
    image, _ = open_examples(str(images), opened, DataOptions(image_size=16))[0]
    assert image.shape == (3, 16, 16)


def test_code_of_the_folder_is_not_run(vit: Path, tmp_path: Path) -> None:
    images, opened = _images(tmp_path / "images", count=2), open_model(str(vit))
    (vit / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    about = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}
    (vit / "preprocessor_config.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="can't be opened"):
        open_examples(str(images), opened, DataOptions())
    assert not (tmp_path / "ran").exists()


def test_the_command_compresses_and_verifies_with_the_folders_processor(
    vit: Path, listener: Path, tmp_path: Path
) -> None:
    for model, data in ((vit, _images(tmp_path / "i")), (listener, _sounds(tmp_path / "s"))):
        out = tmp_path / f"{model.name}-out"
        rankfold(
            "lossless", model, "--data", data, "--size", 0.9, "--largest-change", 0.01,
            "--out", out, cwd=tmp_path,
        )  # fmt: skip
        assert (out / "preprocessor_config.json").is_file()
        done = rankfold("verify", out, "--data", data, "--model", model, cwd=tmp_path)
        assert "agrees with all that was checked" in done.stdout
