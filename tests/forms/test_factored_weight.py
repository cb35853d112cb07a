from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from rankfold.forms.conv.modules import empty_conv
from rankfold.forms.factored_weight import FactoredWeight
from rankfold.forms.low_rank.modules import LowRankConv2d, LowRankLinear
from tests.cases import filled, normal


def _linear() -> LowRankLinear:
    return LowRankLinear(normal(1, 3, 2), normal(2, 2, 4), order=torch.tensor([4, 0, 2, 1, 3]))


def test_it_knows_its_shape_and_type_without_multiplying(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _linear()
    monkeypatch.setattr(layer, "dense_matrix", lambda: pytest.fail("multiplied"))
    weight = layer.weight
    assert isinstance(weight, torch.Tensor) and isinstance(weight, FactoredWeight)
    assert weight.dtype == torch.float64 and weight.device == torch.device("cpu")
    assert weight.shape == (5, 4) and weight.size(0) == 5 and weight.dim() == weight.ndim == 2
    assert weight.numel() == 20 and weight.is_floating_point()
    assert normal(1, 2).to(weight.dtype).dtype == torch.float64


def test_every_computation_uses_the_product_differentiably() -> None:
    layer, inputs = _linear(), normal(3, 6, 4)
    for found in (
        functional.linear(inputs, layer.weight),
        inputs @ layer.weight.T,
        torch.einsum("ni,oi->no", inputs, layer.weight),
    ):
        torch.testing.assert_close(found, layer(inputs))
    functional.linear(inputs, layer.weight).square().sum().backward()
    direct = copy.deepcopy(layer)
    direct.zero_grad()
    direct(inputs).square().sum().backward()
    torch.testing.assert_close(layer.left.grad, direct.left.grad)
    torch.testing.assert_close(layer.right.grad, direct.right.grad)
    assert type(layer.weight + 0) is torch.Tensor


def test_convs_have_one_too() -> None:
    conv = filled(nn.Conv2d(4, 6, 3, padding=1).double(), 0)
    images = normal(5, 2, 4, 7, 7)
    factored = LowRankConv2d(normal(1, 6, 2), normal(2, 2, 4, 3, 3), conv)
    for module in (factored, filled(empty_conv(conv, "tucker", (2, 3)), 3)):
        assert module.weight.shape == conv.weight.shape
        found = functional.conv2d(images, module.weight, module.bias, padding=1)
        torch.testing.assert_close(found, module(images))
        torch.testing.assert_close(found, module.to_dense()(images))
