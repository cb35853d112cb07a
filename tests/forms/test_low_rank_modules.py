import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from rankfold.forms.factors import balanced_pair, pivoted
from rankfold.forms.low_rank.fit import low_rank_module
from rankfold.forms.low_rank.modules import LowRankConv2d, LowRankLinear
from rankfold.forms.storage import STORAGES, factor_parameters, features_in_order, left_rows
from rankfold.model.layer_matrix import matrix_shape
from tests.cases import (
    SEEDS,
    SIDES,
    each_conv,
    each_layer,
    each_linear,
    ignore_even_same,
    leave_identity_out,
    normal,
)

property_test = settings(max_examples=25, deadline=None)
close = torch.testing.assert_close
each_form = pytest.mark.parametrize("form", STORAGES)


def low_rank(layer, form, rank=2, seed=5):
    """A random low-rank module in the layer's place, and its matrix (out, in) in float64."""
    out, in_ = matrix_shape(layer)
    left, right = normal(seed, out, rank), normal(seed + 1, rank, in_)
    factors = balanced_pair(left, right) if form == "pair" else pivoted(left, right)
    return low_rank_module(layer, factors), left @ right


def dense_conv(layer, weight, images):
    """What a conv with this weight does, through torch.nn.functional alone."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        images = functional.pad(images, layer._reversed_padding_repeated_twice, layer.padding_mode)
        padding = 0
    return functional.conv2d(images, weight, layer.bias, layer.stride, padding, layer.dilation)


@each_linear()
@each_form
def test_linear_forward_is_that_of_its_dense_weight(case, form):
    layer = case.layer()
    module, matrix = low_rank(layer, form)
    expected = functional.linear(case.values(), matrix, layer.bias)
    close(module(case.values()), expected)
    close(module.to_dense()(case.values()), expected)
    stock = module.to_stock()
    assert [type(part) for part in stock] == [type(layer)] * 2
    close(stock(case.values()), expected)
    assert expected.shape == layer(case.values()).shape


@each_conv()
@each_form
@ignore_even_same
def test_conv_forward_is_that_of_its_dense_weight(case, form):
    layer = case.layer()
    module, matrix = low_rank(layer, form)
    expected = dense_conv(layer, matrix.view_as(layer.weight), case.values())
    close(module(case.values()), expected)
    close(module.to_dense()(case.values()), expected)
    stock = module.to_stock()
    assert [type(part) for part in stock] == [type(layer)] * 2
    close(stock(case.values()), expected)
    assert expected.shape == layer(case.values()).shape


@each_layer()
@each_form
def test_to_dense_is_the_layer_with_another_weight(case, form):
    layer = case.layer(dtype=torch.float32)
    module, matrix = low_rank(layer, form)
    dense = module.to_dense()
    assert type(dense) is type(layer)
    assert repr(dense) == repr(layer)  # every option
    assert dense.weight.dtype == torch.float32
    close(dense.weight.flatten(1), module.dense_matrix(), rtol=0, atol=0)
    close(dense.weight.flatten(1), matrix.float(), rtol=1e-4, atol=1e-4)
    assert (dense.bias is None) == (layer.bias is None)
    if layer.bias is not None:
        assert torch.equal(dense.bias, layer.bias)
    dense.weight.data.zero_()  # nothing is shared with the low-rank module
    close(module.dense_matrix(), matrix.float(), rtol=1e-4, atol=1e-4)


@each_layer()
@each_form
@ignore_even_same
def test_deepcopy_and_state_dict_round_trip(case, form):
    module, _ = low_rank(case.layer(), form)
    expected = module(case.values())
    twin = copy.deepcopy(module)
    assert torch.equal(twin(case.values()), expected)

    other, _ = low_rank(case.layer(seed=50), form, seed=60)
    assert not torch.equal(other(case.values()), expected)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(case.values()), expected)

    with torch.no_grad():
        module.left.zero_()
        module.right.zero_()
    assert torch.equal(twin(case.values()), expected)
    assert torch.equal(other(case.values()), expected)


@each_form
@pytest.mark.parametrize("bias", [False, True])
def test_state_holds_factors_bias_and_order(form, bias):
    module, _ = low_rank(nn.Linear(6, 4, bias=bias), form)
    expected = {"left", "right"} | ({"bias"} if bias else set())
    assert {name for name, _ in module.named_parameters()} == expected
    assert set(module.state_dict()) == expected | ({"order"} if form == "pivoted" else set())
    if form == "pivoted":
        assert module.order.dtype == torch.int32


@each_form
def test_moving_a_module_to_another_dtype_keeps_the_order(form):
    module, matrix = low_rank(nn.Linear(6, 4), form)
    module.half().float()
    close(module.dense_matrix(), matrix.float(), rtol=0, atol=0.05)


@property_test
@given(SEEDS, SIDES, SIDES, st.sampled_from(STORAGES), st.data())
def test_gradients_are_those_of_the_product(seed, out, in_, form, data):
    rank = data.draw(st.integers(1, min(out, in_)))
    module, _ = low_rank(nn.Linear(in_, out, dtype=torch.float64), form, rank, seed)
    values = normal(seed + 2, 3, in_)
    functional.linear(values, module.dense_matrix(), module.bias).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    module(values).square().sum().backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        close(parameter.grad, gradient)


@property_test
@given(SIDES, SIDES, st.sampled_from(STORAGES), st.data())
def test_factor_parameters_count_what_a_module_holds(out, in_, form, data):
    rank = data.draw(st.integers(1, min(out, in_)))
    module, _ = low_rank(nn.Linear(in_, out, bias=False), form, rank)
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count == factor_parameters(out, in_, rank, form)
    assert module.left.shape[0] == left_rows(out, rank, form)
    formulas = {"pair": rank * (out + in_), "pivoted": rank * (out + in_ - rank)}
    assert count == formulas[form]


@property_test
@given(SIDES, SIDES)
def test_every_rank_below_the_full_one_saves_in_the_pivoted_form(out, in_):
    full = min(out, in_)
    costs = [factor_parameters(out, in_, rank, "pivoted") for rank in range(1, full + 1)]
    assert costs == sorted(set(costs))
    assert costs[-1] == out * in_


def test_repr_shows_rank_and_form():
    linear, _ = low_rank(nn.Linear(6, 4), "pivoted")
    assert "in_features=6, out_features=4, rank=2, form=pivoted, bias=True" in repr(linear)
    conv, _ = low_rank(nn.Conv2d(3, 5, 3, stride=2, bias=False), "pair")
    assert "3, 5, kernel_size=(3, 3), stride=(2, 2)" in repr(conv)
    assert "rank=2, form=pair, bias=False" in repr(conv)


def test_factors_given_by_hand():
    left, right = torch.tensor([[2.0, 3]]), torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    order = torch.tensor([2, 0, 1])
    linear = LowRankLinear(left, right, torch.tensor([10.0, 20, 30]), order)
    assert (linear.in_features, linear.out_features) == (3, 3)
    assert linear(torch.tensor([1.0, 5, 9])).tolist() == [27, 21, 35]
    conv = LowRankConv2d(left, right[:, :, None, None], nn.Conv2d(3, 3, 1), None, order)
    assert conv(torch.tensor([1.0, 5, 9])[:, None, None]).flatten().tolist() == [17, 1, 5]


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6), (2, 0, 6)])
def test_features_in_order_are_those_of_indexing(shape):
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    features = normal(0, *shape)
    assert torch.equal(features_in_order(features, order.int()), features[..., order])
    across = features.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(features_in_order(across, order), features[..., order])


@each_conv()
@ignore_even_same
def test_convs_are_the_same_with_identity_rows_multiplied_or_left_out(case, monkeypatch):
    conv, _ = low_rank(case.layer(), "pivoted")
    multiplied = conv(case.values())
    leave_identity_out(monkeypatch)
    close(conv(case.values()), multiplied)


def test_a_conv_of_low_rank_multiplies_its_identity_rows_beside_what_it_stores(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    def multiplied(layer):
        with FlopCounterMode(display=False) as counter:
            layer(normal(0, 2, 3, 7, 7))
        return counter.get_total_flops()

    conv, _ = low_rank(nn.Conv2d(3, 5, 3, dtype=torch.float64), "pivoted", rank=2)
    positions, stored = 2 * 5 * 5, factor_parameters(5, 27, 2, "pivoted")
    assert multiplied(conv) == 2 * positions * (stored + 2**2)
    leave_identity_out(monkeypatch)
    assert multiplied(conv) == 2 * positions * stored
