import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional

from rankfold.maths.linalg import mirrored
from rankfold.model import layer_matrix
from rankfold.model.layer_matrix import (
    add_input_gram,
    input_rows,
    matrix_shape,
    output_rows,
    patches,
    weight_matrix,
)
from tests.cases import LINEAR_CASES, SEEDS, SIDES, each_conv, each_layer, ignore_even_same, normal

property_test = settings(max_examples=25, deadline=None)
close = torch.testing.assert_close


def without_bias(layer, values):
    bias, layer.bias = layer.bias, None
    outputs = layer(values)
    layer.bias = bias
    return outputs


@each_layer()
@ignore_even_same
def test_matrix_times_input_rows_is_the_output_rows(case):
    layer = case.layer()
    rows = torch.cat(list(input_rows(layer, case.values())))
    expected = output_rows(layer, without_bias(layer, case.values()))
    assert weight_matrix(layer).shape == matrix_shape(layer) == (expected.shape[1], rows.shape[1])
    close(rows @ weight_matrix(layer).T, expected)


@each_layer()
@ignore_even_same
def test_row_gradients_give_the_weight_gradient(case):
    layer, values = case.layer(), case.values()
    outputs = layer(values)
    gradient = normal(7, *outputs.shape)
    outputs.backward(gradient)
    rows = torch.cat(list(input_rows(layer, values)))
    close(output_rows(layer, gradient).T @ rows, layer.weight.grad.flatten(1))


@each_layer()
@pytest.mark.parametrize("larger", [1, 3])
@ignore_even_same
def test_the_input_gram_is_that_of_the_input_rows(case, larger):
    layer, values = case.layer().double(), case.values().double()
    if isinstance(layer, nn.Conv2d):
        values = values.repeat(*[1] * (values.dim() - 2), larger, larger)
    rows = torch.cat(list(input_rows(layer, values)))
    upper = torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype)
    add_input_gram(upper, layer, values)
    close(mirrored(upper), rows.T @ rows, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block_values", [1, 20000])
def test_blocks_do_not_change_the_input_gram(block_values, monkeypatch):
    layer, values = nn.Conv2d(3, 4, 3, padding=1).double(), normal(1, 5, 3, 30, 20).double()
    grams = [torch.zeros(27, 27, dtype=torch.float64) for _ in range(2)]
    add_input_gram(grams[0], layer, values)
    monkeypatch.setattr(layer_matrix, "BLOCK_VALUES", block_values)
    add_input_gram(grams[1], layer, values)
    close(*grams)


@each_conv()
@pytest.mark.parametrize("block_values", [1, 1000, 3000])
def test_blocks_do_not_change_the_rows(case, block_values, monkeypatch):
    layer = case.layer()
    values = normal(1, 5, *case.images[-3:])
    (whole,) = input_rows(layer, values)
    monkeypatch.setattr(layer_matrix, "BLOCK_VALUES", block_values)
    blocks = list(input_rows(layer, values))
    assert block_values > 1 or len(blocks) == 5  # never less than one image
    assert torch.equal(torch.cat(blocks), whole)


def test_blocks_stay_below_the_limit(monkeypatch):
    monkeypatch.setattr(layer_matrix, "BLOCK_VALUES", 2000)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    blocks = list(input_rows(layer, normal(0, 7, 3, 8, 8)))  # an image unfolds to 1728 values
    assert [block.numel() for block in blocks] == [1728] * 7


def test_linear_rows_come_in_blocks():
    values = normal(0, 40_000, 2)
    blocks = list(input_rows(nn.Linear(2, 3), values))
    assert len(blocks) > 1
    assert torch.equal(torch.cat(blocks), values)


@each_conv()
def test_patches_of_a_delta_at_each_kernel_place(case):
    layer = case.layer(dtype=torch.float64)
    values = normal(1, 2, *case.images[-3:])
    unfolded = patches(layer, values)
    layer.bias = None
    for place in (0, unfolded.shape[1] // 2, unfolded.shape[1] - 1):  # column of the matrix
        with torch.no_grad():
            layer.weight.zero_().view(len(layer.weight), -1)[:, place] = 1
        assert torch.equal(unfolded[:, place], output_rows(layer, layer(values))[:, 0])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv2d(3, 4, 2)], ids=["linear", "conv"])
def test_rows_are_float32_or_float64_and_detached(layer, dtype, expected):
    shape = (3, 5) if isinstance(layer, nn.Linear) else (2, 3, 5, 5)
    values = normal(0, *shape).to(dtype).requires_grad_()
    (rows,) = input_rows(layer, values)
    outputs = output_rows(layer, normal(0, 2, 4, 4, 4).to(dtype).requires_grad_())
    for found in (rows, outputs, weight_matrix(layer)):
        assert not found.requires_grad
    assert rows.dtype == outputs.dtype == expected


@property_test
@given(SEEDS, SIDES, SIDES)
def test_rows_of_any_linear(seed, out, in_):
    layer = nn.Linear(in_, out, dtype=torch.float64)
    values = normal(seed, 2, 1, 3, in_)
    (rows,) = input_rows(layer, values)
    assert rows.shape == (6, in_)
    close(functional.linear(rows, weight_matrix(layer), layer.bias), layer(values).view(6, out))


def test_empty_linear_input_gives_no_rows():
    layer = LINEAR_CASES[0].layer()
    assert sum(len(block) for block in input_rows(layer, torch.zeros(0, 7))) == 0
