import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankfold.forms.blocks.modules import (
    BLOCK_FORMS,
    BlocksConv2d,
    RowBlocksLinear,
    block_parameters,
    block_sizes,
    empty_blocks,
)
from tests.cases import SEEDS, filled, normal

close = torch.testing.assert_close
each_form = pytest.mark.parametrize("form", BLOCK_FORMS)


def blocks(form, long_side=11, short_side=4, ranks=(3, 2), seed=7, bias=True):
    """A module with random factors and a random order."""
    in_, out = (short_side, long_side) if form == "row-blocks" else (long_side, short_side)
    module = filled(empty_blocks(nn.Linear(in_, out, bias=bias).double(), form, ranks), seed)
    order = torch.randperm(long_side, generator=torch.Generator().manual_seed(seed))
    module.order.copy_(order)
    return module


def weight_of(module):
    """The dense weight, row by row (column by column) from the definition."""
    rows = module.form == "row-blocks"
    shared = module.shared.detach() if rows else module.shared.detach().T
    k1, _ = module.ranks
    pivots = [shared[:k1], shared[k1:]]
    first, second = (
        factor.detach() if rows else factor.detach().T for factor in (module.first, module.second)
    )
    lines = [*shared, *(first @ pivots[0]), *(second @ pivots[1])]
    if rows:
        return torch.stack([lines[line] for line in module.order.tolist()])
    weight = torch.empty(len(lines), shared.shape[1]).double()
    for line, column in zip(lines, module.order.tolist(), strict=True):
        weight[column] = line
    return weight.T


@each_form
@pytest.mark.parametrize("bias", [True, False])
@given(
    long_side=st.integers(2, 12),
    short_side=st.integers(1, 6),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=SEEDS,
)
@settings(max_examples=25, deadline=None)
def test_every_way_of_computing_it_is_that_of_the_blocks(
    form, bias, long_side, short_side, shares, seed
):
    most = [min(size, short_side) for size in block_sizes(long_side)]
    ranks = tuple(1 + round(s * (m - 1)) for s, m in zip(shares, most, strict=True))
    module = blocks(form, long_side, short_side, ranks, seed, bias)
    weight = weight_of(module)
    inputs = normal(seed, 2, 3, module.in_features)
    expected = nn.functional.linear(inputs, weight, module.bias)
    assert module.ranks == ranks
    assert tuple(weight.shape) == (module.out_features, module.in_features)
    close(module(inputs), expected)
    close(module.dense_matrix(), weight)
    close(module.weight @ torch.eye(module.in_features).double(), weight)
    close(module.to_dense()(inputs), expected)
    close(module.to_stock()(inputs), expected)
    assert all(type(part) is nn.Linear for part in module.to_stock())
    count = sum(p.numel() for n, p in module.named_parameters() if n != "bias")
    assert count == block_parameters(*weight.shape, form, ranks)


@each_form
def test_all_parameters_get_the_gradients_of_the_dense_matrix(form):
    module = blocks(form)
    dense = copy.deepcopy(module)
    inputs = normal(1, 5, module.in_features)
    module(inputs).square().sum().backward()
    weight = dense.dense_matrix()
    nn.functional.linear(inputs, weight, dense.bias).square().sum().backward()
    for (name, mine), theirs in zip(module.named_parameters(), dense.parameters(), strict=True):
        close(mine.grad, theirs.grad, msg=name)


@each_form
def test_half_precision_stays_half_precision(form):
    module = blocks(form).to(torch.bfloat16)
    assert module(normal(1, 5, module.in_features).bfloat16()).dtype == torch.bfloat16


def test_blocks_of_full_rank_cost_what_the_dense_matrix_does():
    assert block_parameters(12, 4, "row-blocks", (4, 4)) == 48
    assert block_parameters(5, 12, "column-blocks", (5, 5)) == 60
    assert block_parameters(3, 4, "row-blocks", (2, 1)) == 12  # halves shorter than wide


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0), (5, 1), (1, 5)])
def test_ranks_that_a_layer_has_not_are_refused(ranks):
    with pytest.raises(ValueError, match=r"\(12, 4\) weight has no row-blocks of ranks"):
        empty_blocks(nn.Linear(4, 12), "row-blocks", ranks)


def test_what_is_printed_names_the_form_and_both_ranks():
    assert "form=row-blocks, ranks=(3, 2), bias=True" in repr(blocks("row-blocks"))
    assert isinstance(blocks("row-blocks"), RowBlocksLinear)


POINTWISE = {
    "plain": ({}, (2, 5, 6)),
    "strided": ({"stride": (2, 3)}, (2, 5, 6)),
    "no bias, one image": ({"bias": False}, (5, 6)),
}


@each_form
@pytest.mark.parametrize("case", POINTWISE)
def test_a_pointwise_conv_in_blocks_is_the_conv_of_its_matrix(form, case):
    options, size = POINTWISE[case]
    in_, out = (4, 11) if form == "row-blocks" else (11, 4)
    conv = nn.Conv2d(in_, out, 1, **options).double()
    module = filled(empty_blocks(conv, form, (3, 2)), 7)
    assert isinstance(module, BlocksConv2d)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(7))
    module.matrix.order.copy_(order)
    weight = weight_of(module.matrix)[:, :, None, None]
    images = normal(3, *size[:-2], in_, *size[-2:])
    expected = nn.functional.conv2d(images, weight, module.bias, module.stride)
    got = module(images)
    close(got, expected)
    assert got.is_contiguous()
    close(nn.functional.conv2d(images, module.weight, module.bias, module.stride), expected)
    close(module.to_dense()(images), expected)
    stock = module.to_stock()
    close(stock(images), expected)
    assert all(type(part) is nn.Conv2d for part in stock)
    assert (module.in_channels, module.out_channels) == (in_, out)
    assert f"stride={module.stride}" in repr(module)
    assert f"form={form}, ranks=(3, 2)" in repr(module)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 12, 3), nn.Conv2d(4, 12, 1, padding=1), nn.Conv2d(4, 12, 1, groups=2)],
)
def test_other_convs_have_no_blocks(layer):
    with pytest.raises(ValueError, match="a Conv2d of this geometry has no row-blocks"):
        empty_blocks(layer, "row-blocks", (1, 1))
