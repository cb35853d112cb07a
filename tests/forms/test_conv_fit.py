import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankfold.forms.conv.curve import conv_candidates
from rankfold.forms.conv.fit import (
    RIDGE,
    conv_factors,
    grouped,
    improved_directions,
    shared_basis,
    shared_directions,
)
from rankfold.forms.conv.modules import CONV_FORMS, conv_factor_parameters
from rankfold.maths.linalg import LARGEST_COEFFICIENT, damped
from rankfold.maths.spectrum import quadratic_change, whitened_spectrum
from tests.cases import SEEDS, filled, gram, normal

property_test = settings(max_examples=15, deadline=None)
close = torch.testing.assert_close
each_form = pytest.mark.parametrize("form", CONV_FORMS)
each_pivoting = pytest.mark.parametrize("pivot", [False, True], ids=["plain", "pivoted"])
SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(2, 3), st.integers(1, 3))


def problem(seed, shape, rank=None):
    """A weight, its input Gram (of a lower rank if asked for) and its output Gram."""
    side = shape[1] * shape[2] * shape[3]
    return normal(seed, *shape), gram(seed + 1, side, rank), gram(seed + 2, shape[0])


def full_ranks(shape, form):
    out, in_, height, width = shape
    if form == "tucker":
        first = min(in_, out * height * width)
        return first, min(out, first * height * width)
    along, across = (height, width) if form == "vertical" else (width, height)
    return (min(in_ * along, out * across),)


def dense(factors, shape):
    """The weight that the factors make, float64."""
    layer = nn.Conv2d(shape[1], shape[0], shape[2:], bias=False, dtype=torch.float64)
    return factors.module(layer).dense_weight().detach()


def change_of(found, weight, a, b):
    delta = (found - weight).flatten(1)
    return 0.5 * float(torch.trace(b @ delta @ a @ delta.T))


@each_form
def test_grouping_follows_the_kernels_axes(form):
    weight, a, _ = problem(0, (5, 3, 2, 4))
    w, g = grouped(weight, a, form)
    six = a.view(3, 2, 4, 3, 2, 4)
    for i, p, q in [(0, 0, 0), (2, 1, 3), (1, 0, 2)]:
        s, t = {"vertical": (2 * i + p, q), "horizontal": (4 * i + q, p), "tucker": (i, 4 * p + q)}[
            form
        ]
        assert torch.equal(w[:, s, t], weight[:, i, p, q])
        s0, t0 = {"vertical": (3, 2), "horizontal": (6, 1), "tucker": (1, 6)}[form]  # (1, 1, 2)
        assert g[s, t, s0, t0] == six[i, p, q, 1, 1, 2]
    delta = normal(5, *w.shape)
    plain = (w.flatten(1) @ g.reshape(24, 24) * delta.flatten(1)).sum()
    back = delta if form != "horizontal" else delta.view(5, 3, 4, 2).transpose(2, 3)
    close(plain, (weight.flatten(1) @ a * back.reshape(5, 24)).sum())


@property_test
@given(SEEDS, SHAPES, st.sampled_from(CONV_FORMS), st.booleans())
def test_full_rank_reproduces_the_weight(seed, shape, form, pivot):
    weight, a, b = problem(seed, shape)
    factors = conv_factors(weight, a, b, form, full_ranks(shape, form), pivot=pivot)
    close(dense(factors, shape), weight, rtol=1e-5, atol=1e-5)
    assert factors.change == pytest.approx(0, abs=1e-8 * change_of(0 * weight, weight, a, b))


@settings(max_examples=60, deadline=None)
@given(SEEDS, SHAPES, st.sampled_from(CONV_FORMS), st.booleans(), st.integers(0, 2), st.data())
def test_the_stated_change_is_that_of_the_weight(seed, shape, form, pivot, sweeps, data):
    weight, a, b = problem(seed, shape, data.draw(st.sampled_from([None, 3])))
    before = weight.clone(), a.clone(), b.clone()
    candidates = conv_candidates(weight, a, b, [form], pivot=pivot)
    for candidate in candidates[:: max(1, len(candidates) // 3)]:
        factors = conv_factors(weight, a, b, form, candidate.ranks, pivot=pivot, sweeps=sweeps)
        found = dense(factors, shape)
        whole = change_of(0 * weight, weight, a, b)
        expected = change_of(found, weight, a, b)
        assert factors.change == pytest.approx(expected, rel=1e-6, abs=1e-8 * whole)
        assert factors.change <= candidate.change + 1e-6 * whole
        if sweeps == 0:
            # A candidate's change is that under the Gram with its ridge, which counts where the
            # Gram is singular.
            ridged = change_of(found, weight, damped(a, RIDGE), b)
            assert candidate.change == pytest.approx(ridged, rel=1e-6, abs=1e-8 * whole)
    for value, kept in zip((weight, a, b), before, strict=True):
        assert torch.equal(value, kept)


@property_test
@given(SEEDS, SHAPES, st.sampled_from(CONV_FORMS), st.booleans())
def test_candidates_are_undominated_and_cheaper_than_the_layer(seed, shape, form, pivot):
    weight, a, b = problem(seed, shape)
    candidates = conv_candidates(weight, a, b, [form], pivot=pivot)
    counts = [candidate.parameters for candidate in candidates]
    changes = [candidate.change for candidate in candidates]
    assert counts == sorted(set(counts))
    assert changes == sorted(set(changes), reverse=True)
    assert all(count < weight.numel() for count in counts)
    for candidate in candidates:
        count = conv_factor_parameters(shape, form, candidate.ranks, pivot)
        assert candidate.parameters == count
        layer = nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
        module = conv_factors(weight, a, b, form, candidate.ranks, pivot=pivot).module(layer)
        assert sum(p.numel() for p in module.parameters()) == count


def test_candidates_of_all_forms_are_the_best_of_each():
    weight, a, b = problem(0, (6, 5, 3, 3))
    together = conv_candidates(weight, a, b)
    apart = [c for form in CONV_FORMS for c in conv_candidates(weight, a, b, [form])]
    for candidate in apart:
        assert any(
            c.parameters <= candidate.parameters and c.change <= candidate.change for c in together
        )
    assert set(together) <= set(apart)


@pytest.mark.parametrize(
    ("kernel", "forms"), [((1, 1), set()), ((1, 3), {"tucker"}), ((3, 1), {"tucker"})]
)
def test_kernels_of_one_pixel_row_or_column_have_no_spatial_candidates(kernel, forms):
    weight, a, b = problem(0, (8, 8, *kernel))
    assert {candidate.form for candidate in conv_candidates(weight, a, b)} == forms


@each_form
def test_with_a_kronecker_input_gram_the_surrogate_is_exact(form):
    shape = (5, 4, 3, 2)
    weight, _, b = problem(0, shape)
    w, _ = grouped(weight, gram(0, 24), form)
    _, s, t = w.shape
    gs, gt = gram(5, s), gram(6, t)
    a4 = torch.einsum("ab,tu->atbu", gs, gt)
    # Eckart and Young in coordinates that whiten exactly.
    matrix = w.transpose(1, 2).reshape(5 * t, s)
    exact = whitened_spectrum(matrix, gs, torch.kron(b, gt)).truncation_changes()
    basis = shared_basis(w, a4, b)
    close(basis.changes, exact, rtol=1e-6, atol=1e-8 * float(exact[0]))


@property_test
@given(SEEDS, st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.data())
def test_the_mix_is_the_best_one_for_its_directions(seed, out, s, t, data):
    w, b = normal(seed, out, s, t), gram(seed + 1, out)
    a = gram(seed + 2, s * t)
    rank = data.draw(st.integers(1, min(s, out * t)))
    basis = shared_basis(w, a.view(s, t, s, t), b)
    mix, directions = basis.mix(rank), basis.directions[:rank]
    delta = torch.einsum("ort,rs->ost", mix, directions) - w
    change = quadratic_change(delta.flatten(1), a, b)
    whole = float(basis.changes[0])
    assert change == pytest.approx(float(basis.changes[rank]), rel=1e-6, abs=1e-9 * whole)
    # The gradient of the change with respect to the mix is zero.
    slope = torch.einsum("ost,rs->ort", (b @ delta.flatten(1) @ a).view_as(w), directions)
    assert float(slope.abs().max()) < 1e-6 * float((b @ w.flatten(1) @ a).abs().max())


@property_test
@given(SEEDS, st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.data())
def test_improved_directions_lower_the_change(seed, out, s, t, data):
    w, b = normal(seed, out, s, t), gram(seed + 1, out)
    a = gram(seed + 2, s * t, data.draw(st.sampled_from([None, 2])))
    rank = data.draw(st.integers(1, min(s, out * t)))
    basis = shared_basis(w, a.view(s, t, s, t), b)
    mix, directions = basis.mix(rank), basis.directions[:rank]
    better = improved_directions(w, a.view(s, t, s, t), b, directions, mix)

    def change(found):
        delta = torch.einsum("ort,rs->ost", mix, found) - w
        return quadratic_change(delta.flatten(1), a, b)

    assert change(better) <= change(directions) + 1e-9 * float(basis.changes[0])


def test_sweeps_reach_the_optimum_of_their_alternation():
    """Many sweeps end where neither factor can be improved: the gradient is zero."""
    weight, a, b = problem(0, (5, 3, 3, 3))
    changes = [
        conv_factors(weight, a, b, "vertical", (4,), sweeps=sweeps).change for sweeps in (0, 2, 300)
    ]
    assert changes[2] < changes[1] < changes[0]
    module = conv_factors(weight, a, b, "vertical", (4,), sweeps=300).module(
        nn.Conv2d(3, 5, 3, bias=False, dtype=torch.float64)
    )
    delta = (module.dense_weight() - weight).flatten(1)
    change = 0.5 * torch.trace(b @ delta @ a @ delta.T)
    change.backward()
    assert change.item() == pytest.approx(changes[2])
    for parameter in module.parameters():
        slope = (parameter.grad * parameter.detach()).abs()
        assert float(slope.max()) < 1e-2 * changes[2]


@each_form
def test_a_dead_input_and_a_dead_output_are_normal(form):
    weight, a, b = problem(0, (5, 4, 3, 3))
    dead = torch.arange(9, 18)
    a[dead] = a[:, dead] = 0
    b[2] = b[:, 2] = 0
    weight[4] = 0
    ranks = (3, 3) if form == "tucker" else (5,)
    factors = conv_factors(weight, a, b, form, ranks)
    found = dense(factors, (5, 4, 3, 3))
    assert bool(torch.isfinite(found).all())
    assert factors.change == pytest.approx(change_of(found, weight, a, b), rel=1e-6)
    for candidate in conv_candidates(weight, a, b, [form]):
        assert candidate.change >= 0


def test_directions_of_a_zero_weight_are_finite():
    _, a, b = problem(0, (3, 2, 2, 2))
    zero = torch.zeros(3, 2, 2, 2)
    for form in CONV_FORMS:
        factors = conv_factors(zero, a, b, form, (1, 1) if form == "tucker" else (1,))
        assert factors.change == 0
        assert float(dense(factors, zero.shape).abs().max()) == 0


@each_form
def test_pivoted_factors_are_small_and_make_the_same_weight(form):
    shape = (8, 6, 3, 3)
    weight, a, b = problem(3, shape)
    ranks = (4, 5) if form == "tucker" else (7,)
    plain, pivoted = (conv_factors(weight, a, b, form, ranks, pivot=p) for p in (False, True))
    close(dense(pivoted, shape), dense(plain, shape), rtol=1e-8, atol=1e-8)
    assert pivoted.change == pytest.approx(plain.change)
    stored = [pivoted.first, pivoted.last] if form == "tucker" else [pivoted.second]
    for factor in stored:
        assert float(factor.abs().max()) <= LARGEST_COEFFICIENT * (1 + 1e-9)


@each_form
@each_pivoting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("on", [False, True])
def test_modules_keep_what_the_layer_was(form, pivot, dtype, on):
    layer = filled(nn.Conv2d(4, 6, 3, stride=(1, 2), padding=1, dtype=dtype), 0)
    layer.train(on).requires_grad_(on)
    before = layer.weight.detach().clone()
    _, a, b = problem(0, (6, 4, 3, 3))
    ranks = (3, 4) if form == "tucker" else (6,)
    factors = conv_factors(layer.weight, a, b, form, ranks, pivot=pivot)
    module = factors.module(layer)
    assert (module.form, module.ranks) == (form, ranks)
    assert all(part.training == on for part in module.modules())
    for parameter in module.parameters():
        assert (parameter.dtype, parameter.requires_grad) == (dtype, on)
    kept = ("stride", "padding", "dilation", "padding_mode", "kernel_size", "in_channels")
    assert [getattr(module, k) for k in kept] == [getattr(layer, k) for k in kept]
    assert torch.equal(module.bias, layer.bias)
    assert torch.equal(layer.weight, before)
    expected = dense(factors, (6, 4, 3, 3))
    rounded = module.dense_weight().detach().double()
    assert float((rounded - expected).norm()) < 20 * torch.finfo(dtype).eps * float(expected.norm())


@each_form
def test_the_same_call_gives_the_same_bits(form):
    weight, a, b = problem(0, (6, 4, 3, 3))
    ranks = (3, 4) if form == "tucker" else (6,)
    layer = nn.Conv2d(4, 6, 3)
    first, second = (
        conv_factors(weight, a, b, form, ranks).module(layer).state_dict() for _ in range(2)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("form", "ranks"), [("vertical", (13,)), ("tucker", (0, 2))])
def test_ranks_that_a_weight_does_not_have_are_refused(form, ranks):
    with pytest.raises(ValueError, match="a \\(6, 4, 3, 2\\) weight has no"):
        conv_factors(*problem(0, (6, 4, 3, 2)), form, ranks)


def test_directions_without_an_output_gram_are_those_of_the_identity():
    w, a = normal(0, 4, 3, 2), gram(1, 6).view(3, 2, 3, 2)
    identity = torch.eye(4, dtype=torch.float64)
    assert torch.equal(shared_directions(w, a, None), shared_directions(w, a, identity))


def test_forms_that_are_not_allowed_leave_room_for_others():
    weight, a, b = normal(0, 6, 4, 3, 3), gram(1, 36), gram(2, 6)
    found = conv_candidates(weight, a, b)
    vertical = conv_candidates(weight, a, b, allowed=lambda form, ranks: form == "vertical")
    assert {c.form for c in vertical} == {"vertical"}
    # Some of them are beaten by what is not allowed here.
    assert not {(c.form, c.ranks) for c in vertical} <= {(c.form, c.ranks) for c in found}
    assert conv_candidates(weight, a, b, allowed=lambda form, ranks: False) == []
