"""From factors to the low-rank module that stands for a layer."""

from __future__ import annotations

from torch import nn

from rankfold.forms.factors import Factors
from rankfold.forms.layer import take_flags
from rankfold.forms.low_rank.modules import LowRankConv2d, LowRankLinear
from rankfold.model.layer_matrix import MatrixLayer


def low_rank_module(layer: MatrixLayer, factors: Factors) -> LowRankLinear | LowRankConv2d:
    """The module that replaces ``layer``: its dtype, device, bias, stride and padding kept."""
    weight = layer.weight
    left = factors.left.to(weight.device, weight.dtype)
    right = factors.right.to(weight.device, weight.dtype)
    module: LowRankLinear | LowRankConv2d
    if isinstance(layer, nn.Linear):
        module = LowRankLinear(left, right, layer.bias, factors.order)
    else:
        right = right.view(-1, *weight.shape[1:])
        module = LowRankConv2d(left, right, layer, layer.bias, factors.order)
    take_flags(module, layer)
    return module
