import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankfold.forms import factors as factorize  # CHECK
from rankfold.forms.factors import Factors, balanced_pair, pivoted, truncate
from rankfold.forms.low_rank.fit import low_rank_module
from rankfold.forms.storage import STORAGES, factor_parameters
from rankfold.maths import linalg
from rankfold.maths.linalg import LARGEST_COEFFICIENT
from rankfold.maths.spectrum import whitened_spectrum
from rankfold.model.layer_matrix import matrix_shape, weight_matrix
from tests.cases import CONV_CASES, SEEDS, SIDES, each_layer, filled, gram, normal
from tests.maths.test_linalg import kahan

property_test = settings(max_examples=25, deadline=None)
close = torch.testing.assert_close


def parameters(factors):
    return factors.left.numel() + factors.right.numel()


def assert_pivoted(factors, matrix, rank):
    """Exact, and ``rank`` rows are the matrix's own."""
    out = len(matrix)
    scale = 1 + float(matrix.norm())
    assert factors.left.shape == (out - rank, rank)
    assert sorted(factors.order.tolist()) == list(range(out))
    close(factors.product(), matrix, rtol=0, atol=1e-9 * scale)
    own = torch.stack([(factors.right - row).norm(dim=1).min() for row in matrix])
    assert int((own < 1e-9 * scale).sum()) >= min(rank, out)
    assert bool((factors.left.abs() <= LARGEST_COEFFICIENT * (1 + 1e-9)).all())


@property_test
@given(SEEDS, SIDES, SIDES, st.sampled_from(STORAGES), st.data())
def test_both_forms_hold_the_truncated_matrix_at_the_stated_cost(seed, out, in_, form, data):
    k = data.draw(st.integers(1, min(out, in_)))  # up to full rank
    w, a, b = normal(seed, out, in_), gram(seed + 1, in_), gram(seed + 2, out)
    spectrum = whitened_spectrum(w, a, b)
    expected = spectrum.left[:, :k] @ spectrum.right[:k]
    factors = truncate(spectrum, k, form)
    assert (factors.order is None) == (form == "pair")
    assert factors.product().dtype == torch.float64
    close(factors.product(), expected, rtol=1e-7, atol=1e-9 * (1 + float(w.norm())))
    assert parameters(factors) == factor_parameters(out, in_, k, form)
    if k == min(out, in_):
        close(factors.product(), w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", STORAGES)
@pytest.mark.parametrize("rank", [-1, 0, 4])
def test_truncate_refuses_ranks_outside_the_matrix(form, rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is not in 1\.\.3"):
        truncate(whitened_spectrum(normal(0, 3, 5)), rank, form)


@property_test
@given(SEEDS, SIDES, SIDES, SIDES, st.floats(-6, 6))
def test_balanced_pairs_give_both_factors_the_same_norms(seed, out, in_, rank, exponent):
    left, right = normal(seed, out, rank) * 10**exponent, normal(seed + 1, rank, in_)
    factors = balanced_pair(left, right)
    close(factors.product(), left @ right)
    close(factors.left.norm(dim=0), factors.right.norm(dim=1))


def test_balanced_pairs_with_dead_components_stay_finite():
    left, right = normal(0, 4, 3), normal(1, 3, 5)
    left[:, 0] = right[1] = 0
    factors = balanced_pair(left, right)
    assert bool(torch.isfinite(factors.left).all() and torch.isfinite(factors.right).all())
    close(factors.product(), left @ right)


@property_test
@given(SEEDS, SIDES, SIDES, st.data())
def test_pivoted_is_the_product_itself(seed, out, in_, data):
    k = data.draw(st.integers(1, min(out, in_)))
    left, right = normal(seed, out, k), normal(seed + 1, k, in_)
    assert_pivoted(pivoted(left, right), left @ right, k)


@property_test
@given(SEEDS, st.integers(2, 8), st.integers(2, 8), st.data())
def test_pivoted_of_a_product_of_lower_rank_than_k(seed, out, in_, data):
    k = data.draw(st.integers(2, min(out, in_)))
    true_rank = data.draw(st.integers(0, k - 1))
    mix = normal(seed, k, true_rank) @ normal(seed + 1, true_rank, k)
    left, right = normal(seed + 2, out, k) @ mix, normal(seed + 3, k, in_)
    assert_pivoted(pivoted(left, right), left @ right, k)


@property_test
@given(SEEDS, st.integers(3, 8), st.data())
def test_pivoted_with_equal_and_zero_rows(seed, out, data):
    k = data.draw(st.integers(1, out))
    left, right = normal(seed, out, k), normal(seed + 1, k, 8)
    left[1] = left[0]
    left[2] = 0
    assert_pivoted(pivoted(left, right), left @ right, k)


@pytest.mark.parametrize("small", [1e-3, 1e-6, 1e-9, 1e-12, 1e-15, 1e-300, 0.0])
def test_pivoted_of_nearly_dependent_rows(small):
    left, right = normal(0, 6, 3), normal(1, 3, 7)
    left[:, 2] *= small
    assert_pivoted(pivoted(left, right), left @ right, 3)


def test_pivoted_of_a_singular_product_keeps_its_small_components():
    left, right = normal(0, 6, 3), normal(1, 3, 7)
    left[:, 1] *= 1e-4
    left[:, 2] = 0
    assert_pivoted(pivoted(left, right), left @ right, 3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_pivoted_at_any_scale(scale):
    left, right = normal(0, 6, 3) * scale, normal(1, 3, 7)
    close(pivoted(left, right).product(), left @ right, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("form", STORAGES)
def test_a_layer_of_zeros_stays_zero(form):
    factors = truncate(whitened_spectrum(torch.zeros(4, 6)), 2, form)
    assert torch.equal(factors.product(), torch.zeros(4, 6, dtype=torch.float64))


def test_product_puts_rows_in_order():
    right = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    left = torch.tensor([[2.0, 3]])
    factors = Factors(left, right, torch.tensor([2, 0, 1]))
    assert factors.product().tolist() == [[2, 3, 0], [1, 0, 0], [0, 1, 0]]


@each_layer()
@pytest.mark.parametrize("form", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_rank_module_keeps_what_the_layer_was(case, form, dtype):
    layer = case.layer(dtype=dtype)
    before = layer.weight.detach().clone()
    factors = truncate(whitened_spectrum(weight_matrix(layer)), 2, form)
    module = low_rank_module(layer, factors)
    for parameter in module.parameters():
        assert (parameter.dtype, parameter.device) == (dtype, layer.weight.device)
        assert parameter.requires_grad
    assert (module.rank, module.form) == (2, form)
    count = factor_parameters(*matrix_shape(layer), 2, form)
    assert module.left.numel() + module.right.numel() == count
    epsilon = torch.finfo(dtype).eps
    close(module.dense_matrix().double(), factors.product(), rtol=0, atol=50 * epsilon)
    if layer.bias is None:
        assert module.bias is None
    else:
        assert torch.equal(module.bias, layer.bias)
        assert module.bias.data_ptr() != layer.bias.data_ptr()
    if isinstance(layer, nn.Conv2d):
        kept = ("stride", "padding", "dilation", "padding_mode", "kernel_size", "in_channels")
        assert [getattr(module, k) for k in kept] == [getattr(layer, k) for k in kept]
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("form", STORAGES)
@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(3, 5, 2)], ids=["linear", "conv"])
@pytest.mark.parametrize("on", [False, True])
def test_low_rank_module_keeps_the_flags(layer, form, on):
    layer.train(on).requires_grad_(on)
    module = low_rank_module(layer, truncate(whitened_spectrum(weight_matrix(layer)), 2, form))
    assert all(part.training == on for part in module.modules())
    assert all(parameter.requires_grad == on for parameter in module.parameters())


@pytest.mark.parametrize("form", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_survives_unbalanced_whitening(form, dtype):
    layer = filled(nn.Linear(8, 6, bias=False), 0).to(dtype)
    a = torch.diag(torch.logspace(-6, 6, 8, dtype=torch.float64))
    factors = truncate(whitened_spectrum(weight_matrix(layer), a, 1e12 * gram(1, 6)), 4, form)
    dense = low_rank_module(layer, factors).dense_matrix().detach().double()
    expected = factors.product()
    assert float((dense - expected).norm()) < 0.05 * float(expected.norm())


def rounded_error(factors, dtype):
    """Relative error of the product that the factors make after rounding, computed in float64."""
    left, right = (factor.to(dtype).double() for factor in (factors.left, factors.right))
    expected = factors.product()
    found = Factors(left, right, factors.order).product()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "graded", "kahan"])
def test_rounding_hurts_pivoted_factors_little_more_than_a_pair(dtype, kind):
    if kind == "kahan":
        matrix = kahan(60, 40) @ normal(1, 40, 50)
    else:
        scale = torch.logspace(0, -3 if kind == "graded" else 0, 40, dtype=torch.float64)
        matrix = (normal(0, 60, 40) * scale) @ normal(1, 40, 50)
    spectrum = whitened_spectrum(matrix)
    pair, pivots = (truncate(spectrum, 40, form) for form in STORAGES)
    close(pivots.product(), pair.product(), rtol=1e-9, atol=1e-9)
    assert rounded_error(pivots, dtype) < 3 * rounded_error(pair, dtype)


def test_plain_pivoting_would_not_survive_rounding(monkeypatch):
    """The case that swaps are for: without them, all digits are lost."""
    left, right = kahan(90, 60), torch.eye(60, dtype=torch.float64)
    good = rounded_error(pivoted(left, right), torch.bfloat16)
    plain = functools.partial(linalg.pivot_rows, most_swaps=0)
    monkeypatch.setattr(factorize, "pivot_rows", plain)
    assert rounded_error(pivoted(left, right), torch.bfloat16) > 100 * good


@property_test
@given(SEEDS, st.sampled_from(CONV_CASES), st.sampled_from(STORAGES))
def test_full_rank_modules_hold_the_layers_weight(seed, case, form):
    layer = case.layer(seed)
    rank = min(matrix_shape(layer))
    module = low_rank_module(layer, truncate(whitened_spectrum(weight_matrix(layer)), rank, form))
    close(module.to_dense().weight, layer.weight, rtol=1e-6, atol=1e-6)
