from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankfold.forms.blocks.fit import (
    block_changes,
    block_factors,
    block_form,
    block_spectra,
    importance_order,
    ranks_worth_having,
)
from rankfold.forms.blocks.modules import BLOCK_FORMS, block_parameters, block_sizes
from rankfold.maths.linalg import damped
from rankfold.maths.spectrum import quadratic_change, whitened_spectrum
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


def truncated(blocks, ranks):
    """The weight of both spectra cut at these ranks, neither half knowing of the other."""
    rows = torch.cat([half.truncated(k) for half, k in zip(blocks.halves, ranks, strict=True)])
    rows = rows[torch.argsort(blocks.order)]
    return rows if blocks.form == "row-blocks" else rows.T


def cut_of(form, weight, a, b):
    return block_spectra(weight, a, b, form).cut(a, b)


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
            truth = quadratic_change(truncated(found, (k1, k2)) - weight, a, b)
            assert float(changes[k1, k2]) == pytest.approx(truth, abs=1e-9 * scale)
    close(truncated(found, most), weight)


@each_form
@given(seed=SEEDS, long_side=st.integers(2, 11), short_side=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_every_turn_lowers_the_change_and_whole_ranks_give_the_weight_back(
    form, seed, long_side, short_side
):
    weight, a, b = problem(form, seed, long_side, short_side)
    a, b = damped(a, 0.1), damped(b, 0.1)
    cut = cut_of(form, weight, a, b)
    most = [min(size, short_side) for size in block_sizes(long_side)]
    close(block_factors(weight, a, b, cut, most).weight(), weight)
    ranks = [max(1, rank - 1) for rank in most]
    alone = quadratic_change(truncated(block_spectra(weight, a, b, form), ranks) - weight, a, b)
    changes = [alone]
    for turns in range(2, 7):
        factors = block_factors(weight, a, b, cut, ranks, turns=turns, ridge=0)
        assert [right.shape[0] for _, right in factors.halves] == ranks
        changes.append(quadratic_change(factors.weight() - weight, a, b))
    for before, after in pairwise(changes):
        assert after <= before + 1e-9 * (abs(alone) + 1)


@each_form
def test_a_ridge_holds_back_how_much_one_half_makes_up_for_the_other(form):
    weight, a, b = problem(form, long_side=30)
    a, b = damped(a, 0.1), damped(b, 0.1)
    blocks = block_spectra(weight, a, b, form)
    cut = blocks.cut(a, b)

    def change(ridge):
        factors = block_factors(weight, a, b, cut, (2, 1), ridge=ridge)
        return quadratic_change(factors.weight() - weight, a, b)

    alone = quadratic_change(truncated(blocks, (2, 1)) - weight, a, b)
    assert change(0) < change(0.3) < change(10) < alone
    assert change(1e9) == pytest.approx(alone)


@each_form
def test_turns_end_where_no_half_can_do_better(form):
    weight, a, b = problem(form)
    a, b = damped(a, 0.3), damped(b, 0.3)
    cut = cut_of(form, weight, a, b)
    found = block_factors(weight, a, b, cut, (2, 3), turns=400, ridge=0)
    w, a, b = (weight, a, b) if form == "row-blocks" else (weight.T, b, a)
    got = found.weight() if form == "row-blocks" else found.weight().T
    first, second = cut.order[:5], cut.order[5:]
    for rows, others, rank in ((first, second, 2), (second, first, 3)):
        answer = torch.linalg.solve(b[rows][:, rows], b[rows][:, others] @ (got - w)[others])
        best = whitened_spectrum(w[rows] - answer, a, b[rows][:, rows]).truncated(rank)
        close(got[rows], best, rtol=1e-6, atol=1e-6)


@each_form
def test_halves_that_say_nothing_of_each_other_are_the_truncated_spectra(form):
    weight, a, b = problem(form)
    if form == "row-blocks":
        b = torch.diag(b.diagonal())
    else:
        a = torch.diag(a.diagonal())
    blocks = block_spectra(weight, a, b, form)
    factors = block_factors(weight, a, b, blocks.cut(a, b), (3, 2))
    close(factors.weight(), truncated(blocks, (3, 2)))


@each_form
def test_singular_grams_lose_nothing_where_nothing_was_seen(form):
    weight, a, b = problem(form)
    a = normal(7, 2, len(a))
    a = a.T @ a  # of rank 2
    factors = block_factors(weight, a, b, cut_of(form, weight, a, b), (3, 2))
    assert bool(torch.isfinite(factors.weight()).all())
    alone = quadratic_change(truncated(block_spectra(weight, a, b, form), (3, 2)) - weight, a, b)
    assert quadratic_change(factors.weight() - weight, a, b) <= alone + 1e-9


@each_form
@pytest.mark.parametrize("ranks", [(0, 2), (2, 0), (5, 1), (1, 5)])
def test_ranks_that_a_half_has_not_are_refused(form, ranks):
    weight, a, b = problem(form)
    with pytest.raises(ValueError, match=rf"{form} of ranks \({ranks[0]}, {ranks[1]}\)"):
        block_factors(weight, a, b, cut_of(form, weight, a, b), ranks)


@each_form
@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_the_module_is_the_weight_of_the_factors(form, seed):
    weight, a, b = problem(form, seed)
    a, b = damped(a, 0.1), damped(b, 0.1)
    found = block_factors(weight, a, b, cut_of(form, weight, a, b), (3, 2))
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    layer.requires_grad_(False).eval()
    module = found.module(layer)
    close(module.dense_matrix(), found.weight())
    close(module.bias, layer.bias)
    assert module.ranks == (3, 2)
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    assert float(module.first.abs().max()) <= 2 + 1e-9
    assert float(module.second.abs().max()) <= 2 + 1e-9


@each_form
def test_each_half_of_the_spectra_is_the_best_of_its_rank(form):
    weight, a, b = problem(form)
    found = block_spectra(weight, a, b, form)
    w, a, b = (weight, a, b) if form == "row-blocks" else (weight.T, b, a)
    rows = found.order[:5]
    best = whitened_spectrum(w[rows], a, b[rows][:, rows]).truncated(2)
    got = truncated(found, (2, 4))
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
def test_the_module_of_a_pointwise_conv_has_the_weight_of_the_factors(form):
    weight, a, b = problem(form)
    found = block_factors(weight, a, b, cut_of(form, weight, a, b), (3, 2))
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, stride=2).double()
    module = found.module(conv)
    close(module.weight + 0, found.weight()[:, :, None, None])
    assert module.stride == (2, 2)
    close(module.bias, conv.bias)
