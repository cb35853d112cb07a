import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankfold.block_forms import (
    block_changes,
    block_form,
    block_spectra,
    importance_order,
    ranks_worth_having,
)
from rankfold.block_modules import BLOCK_FORMS, block_parameters, block_sizes
from rankfold.linalg import damped
from rankfold.spectrum import quadratic_change, whitened_spectrum
from tests.cases import SEEDS, normal

close = torch.testing.assert_close
each_form = pytest.mark.parametrize("form", BLOCK_FORMS)


def problem(form, seed=3, long_side=10, short_side=4):
    """A weight and two Grams that are not diagonal."""
    out, in_ = (long_side, short_side) if form == "row-blocks" else (short_side, long_side)
    inputs, gradients = normal(seed, 50, in_) @ normal(seed + 1, in_, in_), normal(seed, 50, out)
    gradients = gradients @ normal(seed + 2, out, out)
    weight = normal(seed + 3, out, in_)
    return weight, inputs.T @ inputs / 50, gradients.T @ gradients / 50


@each_form
@given(seed=SEEDS, long_side=st.integers(2, 11), short_side=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_changes_are_those_of_the_weights_at_every_pair_of_ranks(form, seed, long_side, short_side):
    weight, a, b = problem(form, seed, long_side, short_side)
    found = block_spectra(weight, damped(a, 0.1), damped(b, 0.1), form)
    changes = block_changes(found, a, b)
    most = [min(size, short_side) for size in block_sizes(long_side)]
    assert changes.shape == (most[0] + 1, most[1] + 1)
    scale = float(changes.max())
    for k1 in range(1, most[0] + 1):
        for k2 in range(1, most[1] + 1):
            truth = quadratic_change(found.truncated((k1, k2)) - weight, a, b)
            assert float(changes[k1, k2]) == pytest.approx(truth, abs=1e-9 * scale)
    close(found.truncated(most), weight)


@each_form
@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_the_module_is_the_truncated_weight(form, seed):
    weight, a, b = problem(form, seed)
    found = block_spectra(weight, damped(a, 0.1), damped(b, 0.1), form)
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    layer.requires_grad_(False).eval()
    module = found.module(layer, (3, 2))
    close(module.dense_matrix(), found.truncated((3, 2)))
    close(module.bias, layer.bias)
    assert module.ranks == (3, 2)
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    assert float(module.first.abs().max()) <= 2 + 1e-9
    assert float(module.second.abs().max()) <= 2 + 1e-9


@each_form
def test_each_half_is_the_best_of_its_rank(form):
    weight, a, b = problem(form)
    found = block_spectra(weight, a, b, form)
    w, a, b = (weight, a, b) if form == "row-blocks" else (weight.T, b, a)
    rows = found.order[:5]
    best = whitened_spectrum(w[rows], a, b[rows][:, rows]).truncated(2)
    got = found.truncated((2, 4))
    close((got if form == "row-blocks" else got.T)[rows], best)


@each_form
def test_the_rows_that_matter_most_come_first_and_a_given_order_is_kept(form):
    weight, a, b = problem(form)
    found = block_spectra(weight, a, b, form)
    lost = []
    for line in range(10):
        delta = torch.zeros_like(weight)
        place = (line, slice(None)) if form == "row-blocks" else (slice(None), line)
        delta[place] = -weight[place]
        lost.append(quadratic_change(delta, a, b))
    assert found.order.tolist() == sorted(range(10), key=lambda line: -lost[line])
    given_order = torch.arange(10).flip(0)
    assert block_spectra(weight, a, b, form, given_order).order.tolist() == list(range(9, -1, -1))


def test_of_equal_rows_the_first_comes_first():
    order = importance_order(torch.ones(4, 2), torch.eye(2).double(), torch.eye(4).double())
    assert order.tolist() == [0, 1, 2, 3]


@each_form
def test_the_pairs_worth_having_are_no_worse_than_any_other_mixture(form):
    weight, a, _ = problem(form)
    # Without what both halves do to each other the way is the exact lower hull of all pairs.
    b = torch.diag(torch.arange(1.0, len(weight) + 1).double())
    if form == "column-blocks":
        a, b = torch.diag(a.diagonal()), problem(form)[2]
    found = block_spectra(weight, a, b, form)
    changes = block_changes(found, a, b)
    pairs = ranks_worth_having(changes, form, tuple(weight.shape))
    assert pairs[0].tolist() == [1, 1]
    assert pairs[-1].tolist() == [4, 4]

    def priced(k1, k2, price):
        cost = block_parameters(*weight.shape, form, (k1, k2))
        return float(changes[k1, k2]) + price * cost

    for price in torch.logspace(-6, 6, 60).tolist():
        best = min(priced(k1, k2, price) for k1 in range(1, 5) for k2 in range(1, 5))
        kept = min(priced(k1, k2, price) for k1, k2 in pairs.tolist())
        assert kept == pytest.approx(best)


def test_only_long_matrices_have_block_forms():
    assert block_form(nn.Linear(4, 10)) == "row-blocks"
    assert block_form(nn.Linear(10, 4)) == "column-blocks"
    assert block_form(nn.Linear(4, 9)) is None  # its halves have 5 and 4 outputs
    assert block_form(nn.Conv2d(4, 16, 1, stride=2)) == "row-blocks"
    assert block_form(nn.Conv2d(16, 4, 1)) == "column-blocks"
    assert block_form(nn.Conv2d(4, 8, 1)) is None
    assert block_form(nn.Conv2d(4, 16, 1, padding=1)) is None
    assert block_form(nn.Conv2d(2, 4, 3)) is None
    assert block_form(nn.Embedding(30, 4)) is None


@each_form
def test_the_module_of_a_pointwise_conv_has_the_truncated_weight(form):
    weight, a, b = problem(form)
    found = block_spectra(weight, a, b, form)
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, stride=2).double()
    module = found.module(conv, (3, 2))
    close(module.weight + 0, found.truncated((3, 2))[:, :, None, None])
    assert module.stride == (2, 2)
    close(module.bias, conv.bias)
