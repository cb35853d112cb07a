"""A trained vision model on real images, from ../shared; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

import rankfold
from benchmarks import shared_data
from benchmarks.cifar_nets import akamaster_resnet20, cifar10_test, cifar10_train, load_cifar_net
from rankfold.data import Data
from rankfold.sizes import model_parameters


def has_shared_data() -> bool:
    try:
        return (shared_data() / "cifar10").is_dir()
    except FileNotFoundError:
        return False


@pytest.mark.shared
@pytest.mark.skipif(not has_shared_data(), reason="no shared data")
def test_resnet20_at_80_percent(tmp_path: Path) -> None:
    model, mean, std = load_cifar_net("akamaster_resnet20")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = cifar10_test(mean, std)
    data = Data(
        calibration=TensorDataset(*cifar10_train(1000, 0, mean, std)),
        selection=TensorDataset(images[:300], labels[:300]),
        held_out=TensorDataset(images[300:], labels[300:]),
    )
    result = rankfold.lossless(model, data, size=0.8, size_of="factorizable")
    assert result.report["curvature"] == "sampled"  # it has nearly memorised its training images
    assert result.certificate.change < 0.03
    assert result.report["accuracy"]["factorized"] > 0.88
    layers = result.report["layers"]
    kept = sum(layer["factorized_parameters"] for layer in layers)
    assert 0.79 < kept / sum(layer["parameters"] for layer in layers) <= 0.8
    assert model_parameters(result.model) == result.report["factorized"]["parameters"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    again = rankfold.load(result.save(tmp_path / "out"), model=akamaster_resnet20())
    assert torch.equal(again(images[:50]), result.model(images[:50]))
