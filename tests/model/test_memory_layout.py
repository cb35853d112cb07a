"""A reloaded model has the strides of the saved one, not only its numbers."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

import rankfold
from rankfold.errors import InputError
from rankfold.model.memory_layout import (
    ALIGNMENT,
    axes_by_stride,
    laid_out,
    lay_out,
    unusual_orders,
)

pytestmark = pytest.mark.processors


def _lies_well(tensor: Tensor) -> bool:
    dense = tensor.permute(axes_by_stride(tensor)).is_contiguous()
    return tensor.data_ptr() % ALIGNMENT == 0 and dense


@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=4),
    which=st.integers(0, 23),
)
def test_only_the_order_of_the_axes_decides_how_a_tensor_lies(shape: list[int], which: int) -> None:
    orders = list(permutations(range(len(shape))))
    axes = orders[which % len(orders)]
    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
    there = laid_out(tensor, axes)
    assert torch.equal(there, tensor)
    assert _lies_well(there)
    # Laid out by its own order, it stays: what is read of a tensor is what makes it again.
    again = laid_out(tensor, axes_by_stride(there))
    if all(size > 1 for size in shape):
        assert axes_by_stride(there) == axes
    if all(size > 1 for size in shape) or len(shape) > 3:
        assert again.stride() == there.stride()
    assert laid_out(tensor, axes_by_stride(again)).stride() == again.stride()


def test_two_ways_to_be_contiguous_become_one() -> None:
    """The cause of other last digits after loading, on processors without AVX-512."""
    column = torch.arange(7.0).view(7, 1)
    module = nn.Linear(7, 1, bias=False)
    module.weight.data = column.t()
    assert module.weight.is_contiguous()
    assert module.weight.stride() == (1, 1)
    lay_out(module)
    assert module.weight.stride() == (7, 1)
    assert torch.equal(module.weight.data, column.t())


def test_tensors_without_strides_of_their_own_are_left() -> None:
    module = nn.Module()
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    module.register_buffer("spread", torch.ones(1).expand(3))
    module.register_buffer("unaligned", torch.arange(9.0)[1:])
    lay_out(module)
    assert module.sparse.is_sparse
    assert _lies_well(module.spread)
    assert _lies_well(module.unaligned)
    assert torch.equal(module.unaligned, torch.arange(1.0, 9.0))


class Net(nn.Module):
    """A stem that stays dense, a conv that is factorized, a head stored sideways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.body = nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Linear(24, 5)
        self.head.weight = nn.Parameter(torch.randn(24, 5).t())

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.body(torch.relu(self.stem(images))))
        return self.head(hidden.mean((-2, -1)))


def _saved(folder: Path) -> nn.Module:
    model = Net().to(memory_format=torch.channels_last).eval()
    model.head.weight = nn.Parameter(torch.randn(24, 5).t())
    data = [(x, int(i % 5)) for i, x in enumerate(torch.randn(60, 3, 8, 8))]
    result = rankfold.lossless(
        model, data, size=0.7, size_of="factorizable", include=["body"], gradient_step=False
    )
    result.save(folder)
    return result.model


def test_orders_of_axes_come_back(tmp_path: Path) -> None:
    model = _saved(tmp_path / "out")
    assert unusual_orders(dict(model.named_parameters())).keys() >= {"stem.weight", "head.weight"}
    again = rankfold.load(tmp_path / "out", model=Net())
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert theirs[name].stride() == tensor.stride(), name
        assert _lies_well(theirs[name]), name
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(images), again(images))


@pytest.mark.parametrize(
    ("orders", "match"),
    [
        ([], "an object of orders of axes"),
        ({"stem.weight": [0, 2, 1]}, "names 3 axes of stem.weight, which has 4"),
        ({"stem.weight": [0, 0, 1, 2]}, "an object of orders of axes"),
        ({"stem.weight": [0, 1, 2, True]}, "an object of orders of axes"),
        ({"stem.weight": "0123"}, "an object of orders of axes"),
        ({"nowhere": [0, 1]}, "nowhere, which is not there"),
    ],
)
def test_damaged_orders_are_refused(tmp_path: Path, orders: object, match: str) -> None:
    _saved(tmp_path / "out")
    file = tmp_path / "out" / "rankfold.json"
    manifest = json.loads(file.read_text())
    manifest["model"]["axes_in_memory"] = orders
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=match):
        rankfold.load(tmp_path / "out", model=Net())


def test_a_folder_without_orders_opens_in_the_plain_one(tmp_path: Path) -> None:
    """As version 0.1.0 wrote it."""
    model = _saved(tmp_path / "out")
    file = tmp_path / "out" / "rankfold.json"
    manifest = json.loads(file.read_text())
    del manifest["model"]["axes_in_memory"]
    file.write_text(json.dumps(manifest))
    again = rankfold.load(tmp_path / "out", model=Net(), as_saved=False)
    for name, tensor in again.named_parameters():
        assert tensor.is_contiguous(), name
        assert torch.equal(tensor, model.get_parameter(name)), name
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(again(images), model(images))


def test_from_pretrained_gives_the_strides_back(tmp_path: Path) -> None:
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=5
    )
    model = ResNetForImageClassification(config).to(memory_format=torch.channels_last).eval()
    data = [(x, int(i % 5)) for i, x in enumerate(torch.randn(60, 3, 16, 16))]
    result = rankfold.lossless(
        model, data, size=0.7, size_of="factorizable", gradient_step=False, exclude=["*.embedder*"]
    )
    result.save(tmp_path / "out")
    ours = result.model.state_dict()
    images = torch.randn(2, 3, 16, 16)
    assert "resnet.embedder.embedder.convolution.weight" in unusual_orders(ours)
    for again in (
        AutoModelForImageClassification.from_pretrained(tmp_path / "out"),
        rankfold.load(tmp_path / "out"),
    ):
        theirs = again.state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert theirs[name].stride() == tensor.stride(), name
        with torch.no_grad():
            assert torch.equal(result.model(images).logits, again(images).logits)
