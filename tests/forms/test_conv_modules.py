import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from rankfold.forms.conv.modules import (
    CONV_FORMS,
    SpatialConv2d,
    TuckerConv2d,
    conv_factor_flops,
    conv_factor_parameters,
    conv_factor_shapes,
    empty_conv,
)
from rankfold.forms.storage import multiplies_identity
from tests.cases import (
    CONV_CASES,
    SEEDS,
    filled,
    ignore_even_same,
    leave_identity_out,
    normal,
)

property_test = settings(max_examples=25, deadline=None)
close = torch.testing.assert_close
each_form = pytest.mark.parametrize("form", CONV_FORMS)
each_conv_and_form = pytest.mark.parametrize(
    ("case", "form"),
    [
        pytest.param(case, form, id=f"{case.name}-{form}")
        for case in CONV_CASES
        for form in CONV_FORMS
        if form == "tucker" or case.kernel != 1
    ],
)
each_pivoting = pytest.mark.parametrize("pivoted", [False, True], ids=["plain", "pivoted"])


def ranks_of(layer, form, share=0.5):
    """Ranks at about this share of the highest ones."""
    out, in_, height, width = layer.weight.shape
    if form == "tucker":
        first, last = max(1, round(share * in_)), max(1, round(share * out))
        taps = height * width
        return min(first, last * taps), min(last, first * taps)
    along, across = (height, width) if form == "vertical" else (width, height)
    return (max(1, round(share * min(in_ * along, out * across))),)


def factorized(layer, form, pivoted=True, share=0.5, seed=7):
    """A module with random factors, and random orders where there are any."""
    module = filled(empty_conv(layer, form, ranks_of(layer, form, share), pivoted), seed)
    if layer.bias is not None:
        module.bias.data.copy_(layer.bias)
    generator = torch.Generator().manual_seed(seed)
    for buffer in module.buffers():
        buffer.copy_(torch.randperm(len(buffer), generator=generator))
    return module


def complete(factor, order):
    """A factor with its identity rows, one row at a time."""
    if order is None:
        return factor
    rows = [*torch.eye(factor.shape[1], dtype=factor.dtype), *factor]
    return torch.stack([rows[place] for place in order.tolist()])


def weight_of(module):
    """The dense weight, by loops over the factors' definition, float64."""
    if isinstance(module, TuckerConv2d):
        weight = module.core.detach()
        if module.first is not None:
            mix = complete(module.first.detach(), module.first_order)
            weight = torch.stack([(weight * m[:, None, None]).sum(1) for m in mix], dim=1)
        if module.last is not None:
            mix = complete(module.last.detach(), module.last_order)
            weight = torch.stack([(weight * m[:, None, None, None]).sum(0) for m in mix])
        return weight
    height, width = module.kernel_size
    weight = torch.zeros(module.out_channels, module.in_channels, height, width).double()
    rows = complete(module.second.detach(), module.order)
    first = module.first.detach()
    for o in range(module.out_channels):
        for a in range(height):
            for b in range(width):
                along, across = (a, b) if module.form == "vertical" else (b, a)
                mix = rows[o * module.taps + across]  # (rank,)
                weight[o, :, a, b] = mix @ first.flatten(2)[:, :, along]
    return weight


def dense_conv(layer, weight, images):
    """What a conv with this weight does, through torch.nn.functional alone."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        images = functional.pad(images, layer._reversed_padding_repeated_twice, layer.padding_mode)
        padding = 0
    return functional.conv2d(images, weight, layer.bias, layer.stride, padding, layer.dilation)


@each_conv_and_form
@each_pivoting
@ignore_even_same
def test_forward_and_dense_are_those_of_the_factors_product(case, form, pivoted):
    layer = case.layer()
    module = factorized(layer, form, pivoted)
    weight = weight_of(module)
    close(module.dense_weight().detach(), weight)
    expected = dense_conv(layer, weight, case.values())
    close(module(case.values()), expected)
    dense = module.to_dense()
    assert repr(dense) == repr(layer)  # every option
    close(dense(case.values()), expected)
    stock = module.to_stock()
    assert {type(part) for part in stock} == {nn.Conv2d}
    close(stock(case.values()), expected)
    assert expected.shape == layer(case.values()).shape


@each_form
@each_pivoting
def test_dense_layer_shares_nothing_with_the_module(form, pivoted):
    module = factorized(nn.Conv2d(4, 6, 3, padding=1), form, pivoted)
    dense = module.to_dense()
    assert dense.weight.dtype == torch.float32
    assert torch.equal(dense.bias, module.bias)
    before = module.dense_weight().detach().clone()
    dense.weight.data.zero_()
    dense.bias.data.zero_()
    assert torch.equal(module.dense_weight(), before)
    assert bool((module.bias != 0).any())


@each_form
@each_pivoting
@pytest.mark.parametrize("bias", [False, True])
def test_a_new_module_of_the_same_shapes_takes_the_state(form, pivoted, bias):
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=bias, dtype=torch.float64)
    module = factorized(layer, form, pivoted)
    images = normal(0, 2, 4, 9, 8)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(images), module(images))
    other = empty_conv(layer, form, module.ranks, pivoted)
    assert (other.form, other.ranks) == (form, module.ranks)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(images), module(images))
    factors = {"core", "first", "last"} if form == "tucker" else {"first", "second"}
    orders = {"first_order", "last_order"} if form == "tucker" else {"order"}
    named = factors | ({"bias"} if bias else set())
    assert {name for name, _ in module.named_parameters()} == named
    assert set(module.state_dict()) == named | (orders if pivoted else set())
    assert all(buffer.dtype == torch.int32 for buffer in module.buffers())


@property_test
@given(SEEDS, st.tuples(*[st.integers(1, 5)] * 2), st.tuples(*[st.integers(1, 3)] * 2), st.data())
def test_parameters_by_formula_are_those_counted(seed, channels, kernel, data):
    in_, out = channels
    forms = CONV_FORMS if kernel != (1, 1) else ("tucker",)
    form, pivoted = data.draw(st.sampled_from(forms)), data.draw(st.booleans())
    layer = nn.Conv2d(in_, out, kernel, bias=False, dtype=torch.float64)
    module = factorized(layer, form, pivoted, data.draw(st.floats(0, 1)), seed)
    height, width = kernel
    saved = 0
    if form == "tucker":
        first, last = module.ranks
        count = first * last * height * width
        for rank, side in ((first, in_), (last, out)):
            if rank < side:
                count += rank * side
                saved += rank**2
    else:
        (rank,) = module.ranks
        along, across = (height, width) if form == "vertical" else (width, height)
        count = rank * (in_ * along + out * across)
        saved = rank**2
    expected = count - saved * pivoted
    shape = tuple(layer.weight.shape)
    assert sum(p.numel() for p in module.parameters()) == expected
    assert conv_factor_parameters(shape, form, module.ranks, pivoted) == expected


@each_form
def test_pivoted_factors_of_full_rank_have_as_many_parameters_as_the_layer(form):
    shape = (6, 4, 3, 2)
    full = ranks_of(nn.Conv2d(4, 6, (3, 2)), form, 1.0)
    assert conv_factor_parameters(shape, form, full) == 6 * 4 * 3 * 2
    assert conv_factor_parameters(shape, form, full, pivoted=False) >= 6 * 4 * 3 * 2


@pytest.mark.parametrize(
    ("form", "ranks"),
    [
        ("vertical", (0,)),
        ("vertical", (13,)),
        ("horizontal", (9,)),
        ("tucker", (0, 1)),
        ("tucker", (5, 6)),
        ("tucker", (4, 7)),
    ],
)
def test_ranks_that_a_weight_does_not_have_are_refused(form, ranks):
    with pytest.raises(ValueError, match=r"a \(6, 4, 3, 2\) weight has no"):
        conv_factor_shapes((6, 4, 3, 2), form, ranks)


def test_one_pixel_has_no_spatial_form():
    with pytest.raises(ValueError, match="no vertical rank"):
        conv_factor_shapes((6, 4, 1, 1), "vertical", (1,))


def test_more_channels_than_the_core_can_fill_are_refused():
    with pytest.raises(ValueError, match="no Tucker ranks"):
        conv_factor_shapes((9, 9, 2, 2), "tucker", (1, 5))


def test_grouped_convs_and_wrong_kernels_are_refused():
    with pytest.raises(ValueError, match="2 groups"):
        empty_conv(nn.Conv2d(4, 4, 3, groups=2), "tucker", (1, 2))
    with pytest.raises(ValueError, match=r"a kernel of \(2, 1\)"):
        SpatialConv2d(torch.ones(1, 4, 2, 1), torch.ones(12, 1), nn.Conv2d(4, 4, 3))


@each_form
@each_pivoting
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_keeps_dtype_and_order(form, pivoted, dtype):
    layer = nn.Conv2d(4, 6, 3, padding=1)
    module = factorized(layer, form, pivoted)
    images = normal(0, 2, 4, 6, 6).float()
    expected = module(images).detach()
    low = copy.deepcopy(module).to(dtype)
    found = low(images.to(dtype)).detach()
    assert found.dtype == dtype
    assert float((found.float() - expected).norm()) < 0.05 * float(expected.norm())
    for buffer, kept in zip(low.buffers(), module.buffers(), strict=True):
        assert torch.equal(buffer, kept)


@each_form
@each_pivoting
def test_gradients_reach_every_factor(form, pivoted):
    layer = nn.Conv2d(3, 5, 3, padding=1, dtype=torch.float64)
    module = factorized(layer, form, pivoted)
    images = normal(1, 2, 3, 6, 5)
    module(images).square().sum().backward()
    found = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    weight = module.dense_weight()
    functional.conv2d(images, weight, module.bias, padding=1).square().sum().backward()
    for gradient, parameter in zip(found, module.parameters(), strict=True):
        close(gradient, parameter.grad)


@each_conv_and_form
@pytest.mark.parametrize("pivoted", [True, False])
@ignore_even_same
def test_flops_are_those_of_the_convs_that_run(case, form, pivoted, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    leave_identity_out(monkeypatch)
    layer = case.layer()
    module = factorized(layer, form, pivoted)
    images = case.values()
    images = images if images.dim() == 4 else images[None]
    with FlopCounterMode(display=False) as counter:
        module(images)
    height, width = images.shape[2:]
    found = conv_factor_flops(layer, form, module.ranks, height, width, pivoted)
    assert found * len(images) == counter.get_total_flops()


@each_conv_and_form
@ignore_even_same
def test_identity_rows_multiplied_or_left_out_give_the_same(case, form, monkeypatch):
    module = factorized(case.layer(), form, pivoted=True)
    multiplied = module(case.values())
    leave_identity_out(monkeypatch)
    close(module(case.values()), multiplied)


def test_identity_rows_of_low_ranks_are_multiplied_and_stored_in_no_program():
    layer = nn.Conv2d(6, 8, 3, padding=1, dtype=torch.float64)
    module = factorized(layer, "tucker", pivoted=True)
    images = normal(1, 2, 6, 5, 5)
    assert multiplies_identity(module.ranks[1], 8)
    assert not multiplies_identity(60, 64)
    program = torch.export.export(module, (images,))
    assert set(program.state_dict) == set(module.state_dict())
    assert not program.constants
    close(program.module()(images), module(images))


def test_a_pivoted_tucker_conv_multiplies_what_it_stores():
    layer = nn.Conv2d(6, 8, 3, padding=1)
    flops = conv_factor_flops(layer, "tucker", (4, 5), 7, 9)
    assert flops == 2 * 7 * 9 * conv_factor_parameters((8, 6, 3, 3), "tucker", (4, 5))


def test_repr_shows_form_and_ranks():
    layer = nn.Conv2d(4, 6, 3, stride=2)
    assert "4, 6, kernel_size=(3, 3), stride=(2, 2)" in repr(factorized(layer, "vertical"))
    assert "form=vertical, rank=6, pivoted=True, bias=True" in repr(factorized(layer, "vertical"))
    plain = repr(factorized(layer, "tucker", pivoted=False))
    assert "form=tucker, ranks=(2, 3), pivoted=False" in plain
