import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.maths.gradient import (
    gradient_step,
    harmless_range,
    shrink_singular_values,
    step_length,
)
from rankfold.maths.spectrum import (
    lossless_rank,
    quadratic_change,
    tail_energies,
    whitened_spectrum,
)
from tests.cases import SEEDS, SIDES, gram, normal

property_test = settings(max_examples=25, deadline=None)
close = torch.testing.assert_close
SHAPES = [(3, 6), (6, 3), (5, 5)]
NON_NEGATIVE = st.lists(st.floats(0, 100), min_size=1, max_size=8)


def dense_root(g):
    """Symmetric square root, independent of rankfold.maths.linalg."""
    u, s, _ = torch.linalg.svd(g)
    return (u * s.sqrt()) @ u.T


def whitened(weight, a, b):
    return dense_root(b) @ weight @ dense_root(a)  # T = B^1/2 W A^1/2


def best_of_alternating_least_squares(weight, a, b, rank, starts=4, rounds=60):
    """Minimise 1/2 tr(B (LR - W) A (LR - W)^T) over L (out, k), R (k, in); no roots, no SVD."""
    best = float("inf")
    for seed in range(starts):
        right = normal(seed, rank, weight.shape[1])
        for _ in range(rounds):
            left = weight @ a @ right.T @ torch.linalg.pinv(right @ a @ right.T, hermitian=True)
            right = torch.linalg.pinv(left.T @ b @ left, hermitian=True) @ left.T @ b @ weight
        best = min(best, quadratic_change(left @ right - weight, a, b))
    return best


@property_test
@given(SEEDS, SIDES, SIDES, SIDES, SIDES)
def test_singular_values_are_those_of_the_dense_whitened_weight(seed, out, in_, rank_a, rank_b):
    w = normal(seed, out, in_)
    a, b = gram(seed + 1, in_, rank_a), gram(seed + 2, out, rank_b)  # often singular
    spectrum = whitened_spectrum(w, a, b)
    expected = torch.linalg.svdvals(whitened(w, a, b))
    r = min(out, in_)
    assert spectrum.singular_values.dtype == torch.float64
    assert (spectrum.left.shape, spectrum.right.shape) == ((out, r), (r, in_))
    close(spectrum.singular_values, expected, rtol=1e-6, atol=1e-6 * float(expected[0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given_a", [False, True])
@pytest.mark.parametrize("given_b", [False, True])
def test_a_missing_gram_is_the_identity(shape, given_a, given_b):
    out, in_ = shape
    w = normal(0, out, in_).float()
    a = gram(1, in_) if given_a else None
    b = gram(2, out) if given_b else None
    spectrum = whitened_spectrum(w, a, b)
    full_a = torch.eye(in_, dtype=torch.float64) if a is None else a
    full_b = torch.eye(out, dtype=torch.float64) if b is None else b
    close(spectrum.singular_values, torch.linalg.svdvals(whitened(w.double(), full_a, full_b)))
    close(spectrum.left @ spectrum.right, w.double())


@property_test
@given(SEEDS, SIDES, SIDES, st.data())
def test_the_rank_k_product_is_the_truncated_svd_mapped_back(seed, out, in_, data):
    k = data.draw(st.integers(1, min(out, in_)))
    w, a, b = normal(seed, out, in_), gram(seed + 1, in_), gram(seed + 2, out)
    spectrum = whitened_spectrum(w, a, b)
    product = spectrum.left[:, :k] @ spectrum.right[:k]
    u, s, vt = torch.linalg.svd(whitened(w, a, b), full_matrices=False)
    root_a, root_b = dense_root(a), dense_root(b)
    expected = root_b.inverse() @ (u[:, :k] * s[:k]) @ vt[:k] @ root_a.inverse()
    cost, best = (quadratic_change(p - w, a, b) for p in (product, expected))
    assert cost == pytest.approx(best, rel=1e-6, abs=1e-9 * float(s[0]) ** 2)
    if k == len(s) or s[k - 1] - s[k] > 1e-2 * s[0]:  # else the best weight isn't unique
        close(product, expected, rtol=1e-4, atol=1e-4)


@property_test
@given(SEEDS, SIDES, SIDES, SIDES, SIDES)
def test_truncation_changes_are_the_quadratic_changes_of_the_truncations(
    seed, out, in_, rank_a, rank_b
):
    w = normal(seed, out, in_)
    a, b = gram(seed + 1, in_, rank_a), gram(seed + 2, out, rank_b)  # often singular
    spectrum = whitened_spectrum(w, a, b)
    actual = [
        quadratic_change(spectrum.left[:, :k] @ spectrum.right[:k] - w, a, b)
        for k in range(min(out, in_) + 1)
    ]
    scale = quadratic_change(w, a, b)
    predicted = spectrum.truncation_changes()
    close(predicted, torch.tensor(actual).double(), rtol=1e-6, atol=1e-9 * scale)
    assert predicted[-1] == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("rank", [1, 2])
def test_no_factors_found_by_optimisation_beat_the_closed_form(shape, singular, rank):
    out, in_ = shape
    w = normal(0, out, in_)
    a = gram(1, in_, in_ - 1 if singular else None)
    b = gram(2, out, out - 1 if singular else None)
    spectrum = whitened_spectrum(w, a, b)
    product = spectrum.left[:, :rank] @ spectrum.right[:rank]
    closed = quadratic_change(product - w, a, b)
    searched = best_of_alternating_least_squares(w, a, b, rank)
    scale = quadratic_change(w, a, b)
    assert closed <= searched + 1e-9 * scale
    assert searched == pytest.approx(closed, rel=1e-2, abs=1e-6 * scale)  # the search is no straw


@property_test
@given(SEEDS, SIDES, SIDES, st.floats(1e-4, 1), st.data())
def test_moving_the_best_factors_never_helps(seed, out, in_, step, data):
    k = data.draw(st.integers(1, min(out, in_)))
    w, a, b = normal(seed, out, in_), gram(seed + 1, in_), gram(seed + 2, out)
    spectrum = whitened_spectrum(w, a, b)
    left, right = spectrum.left[:, :k], spectrum.right[:k]
    best = quadratic_change(left @ right - w, a, b)
    left, right = left + step * normal(seed + 3, out, k), right + step * normal(seed + 4, k, in_)
    assert best <= quadratic_change(left @ right - w, a, b) + 1e-9 * quadratic_change(w, a, b)


def test_dead_inputs_and_outputs_cost_nothing():
    w = normal(0, 4, 6)
    a, b = torch.eye(6, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    a[5, 5] = b[3, 3] = 0
    spectrum = whitened_spectrum(w, a, b)
    close(spectrum.singular_values[:3], torch.linalg.svdvals(w[:3, :5]))
    assert float(spectrum.singular_values[3]) == pytest.approx(0, abs=1e-6)
    product = spectrum.left[:, :3] @ spectrum.right[:3]
    close(product[:3, :5], w[:3, :5])
    assert bool(torch.isfinite(product).all())


def test_spectrum_of_the_transpose_is_the_transpose():
    w, a, b = normal(0, 3, 7), gram(1, 7), gram(2, 3)
    one, other = whitened_spectrum(w, a, b), whitened_spectrum(w.T, b, a)
    close(one.singular_values, other.singular_values)
    close(one.left[:, :2] @ one.right[:2], (other.left[:, :2] @ other.right[:2]).T)


@property_test
@given(NON_NEGATIVE)
def test_tail_energies_are_the_sums_of_what_is_cut(values):
    sigma = sorted(values, reverse=True)
    expected = [sum(s**2 for s in sigma[k:]) for k in range(len(sigma) + 1)]
    found = tail_energies(torch.tensor(sigma, dtype=torch.float64))
    close(found, torch.tensor(expected, dtype=torch.float64))


@property_test
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 60))
def test_lossless_rank_is_its_definition(values, tolerance):
    sigma = sorted(values, reverse=True)  # integers: energies are exact
    harmless = [k for k in range(len(sigma) + 1) if sum(s**2 for s in sigma[k:]) <= tolerance**2]
    assert lossless_rank(torch.tensor(sigma).double(), float(tolerance)) == min(harmless)


@pytest.mark.parametrize(
    ("sigma", "tolerance", "rank"),
    [([3, 2, 1], 0, 3), ([3, 2, 0], 0, 2), ([3, 2, 1], 1, 2), ([3, 4, 0], 5, 0), ([0, 0], 0, 0)],
)
def test_lossless_rank_at_its_edges(sigma, tolerance, rank):
    assert lossless_rank(torch.tensor(sigma).double(), tolerance) == rank


@property_test
@given(SEEDS, SIDES, SIDES)
def test_quadratic_change_is_gradient_and_curvature(seed, out, in_):
    d, g = normal(seed, out, in_), normal(seed + 1, out, in_)
    a, b = gram(seed + 2, in_), gram(seed + 3, out)
    hessian = torch.kron(b, a)  # of row-major vec(D)
    quadratic = float(d.flatten() @ hessian @ d.flatten()) / 2
    assert quadratic_change(d, a, b) == pytest.approx(quadratic)
    assert quadratic_change(d, a, b, g) == pytest.approx(quadratic + float((g * d).sum()))


def half_gradients(seed, out, in_, noise):
    """Two mean gradients (out, in): one signal, independent noise."""
    signal = normal(seed, out, in_)
    return tuple(signal + noise * normal(seed + half, out, in_) for half in (1, 2))


@property_test
@given(SEEDS, SIDES, SIDES)
def test_equal_halves_give_the_newton_step(seed, out, in_):
    g, a, b = normal(seed, out, in_), gram(seed + 1, in_), gram(seed + 2, out)
    step = gradient_step((g, g), a, b)
    newton = torch.linalg.solve(b, g) @ a.inverse()
    close(step.direction, newton, rtol=1e-5, atol=1e-5 * float(newton.abs().max()))
    assert step.signal == pytest.approx(float((g * newton).sum()), rel=1e-6)
    assert step.noise == 0
    assert quadratic_change(-step.direction, a, b, g) == pytest.approx(-step.signal / 2, rel=1e-5)


@property_test
@given(SEEDS, SIDES, SIDES, st.floats(0.1, 10))
def test_the_direction_descends_the_quadratic_of_the_mean_gradient(seed, out, in_, noise):
    halves = half_gradients(seed, out, in_, noise)
    a, b = gram(seed + 3, in_), gram(seed + 4, out)
    direction = gradient_step(halves, a, b).direction
    mean = (halves[0] + halves[1]) / 2
    slope = float((mean * direction).sum())
    assert slope >= 0
    if float(direction.norm()) > 0:
        eta = slope / (2 * quadratic_change(direction, a, b))  # the minimum along the direction
        assert quadratic_change(-eta * direction, a, b, mean) < 0


@property_test
@given(SEEDS, SIDES, SIDES, st.floats(0.1, 10))
def test_step_against_dense_singular_value_decompositions(seed, out, in_, noise):
    halves = half_gradients(seed, out, in_, noise)
    a, b = gram(seed + 3, in_), gram(seed + 4, out)
    root_a, root_b = dense_root(a).inverse(), dense_root(b).inverse()
    first, second = (root_b @ half @ root_a for half in halves)

    def confirmed(half, other):
        u, _, vt = torch.linalg.svd(half, full_matrices=False)
        coefficients = (u.T @ other @ vt.T).diagonal()
        return (u * coefficients.clamp(min=0)) @ vt

    agreed = (confirmed(first, second) + confirmed(second, first)) / 2
    step = gradient_step(halves, a, b)
    expected = root_b @ agreed @ root_a
    close(step.direction, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert step.signal == pytest.approx(
        float((first * second).sum()), abs=1e-6 * float(first.norm() * second.norm())
    )
    assert step.noise == pytest.approx(float((first - second).square().sum()) / 4, rel=1e-6)


def test_opposite_halves_cancel():
    g = normal(0, 4, 6)
    step = gradient_step((g, -g), gram(1, 6), gram(2, 4))
    assert float(step.direction.abs().max()) == 0
    assert step.signal < 0


def test_noise_is_not_taken_for_signal():
    out, in_ = 60, 80
    a, b = gram(1, in_), gram(2, out)
    root_a, root_b = dense_root(a), dense_root(b)
    halves = tuple(root_b @ normal(seed, out, in_) @ root_a for seed in (3, 4))  # white noise
    step = gradient_step(halves, a, b)
    assert step.noise == pytest.approx(out * in_ / 2, rel=0.1)
    assert abs(step.signal) < 5 * (out * in_) ** 0.5  # five standard errors of <S1, S2>


def test_signal_is_unbiased_where_the_plain_energy_is_not():
    identity = torch.eye(10, dtype=torch.float64)
    truth = normal(0, 10, 10)
    truth *= 3 / truth.norm()  # |S|^2 = 9, under noise of energy 100 a half
    signals, energies = [], []
    for seed in range(1, 61):
        halves = tuple(truth + normal(1000 * half + seed, 10, 10) for half in (1, 2))
        signals.append(gradient_step(halves, identity, identity).signal)
        energies.append(float(((halves[0] + halves[1]) / 2).square().sum()))
    signal = torch.tensor(signals)
    assert float(signal.mean()) == pytest.approx(9, abs=4 * float(signal.std()) / 60**0.5)
    assert sum(energies) / 60 > 50


def test_directions_on_which_the_halves_disagree_in_sign_count_for_nothing():
    halves = [torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([3, 1, 2], [2, -1, 4])]
    identity = torch.eye(3, dtype=torch.float64)
    step = gradient_step(tuple(halves), identity, identity)
    close(step.direction, torch.diag(torch.tensor([2.5, 0, 3], dtype=torch.float64)))
    assert step.signal == pytest.approx(3 * 2 - 1 * 1 + 2 * 4)
    assert step.noise == pytest.approx((1 + 4 + 4) / 4)


def test_singular_grams_give_a_finite_direction():
    g = normal(0, 4, 6)
    a, b = gram(1, 6, 3), gram(2, 4, 2)
    step = gradient_step((g, g), a, b)
    newton = torch.linalg.pinv(b, rtol=1e-10) @ g @ torch.linalg.pinv(a, rtol=1e-10)
    close(step.direction, newton, rtol=1e-6, atol=1e-6)


def test_raw_step_is_the_mean_of_both_halves():
    halves = half_gradients(0, 5, 7, 2.0)
    a, b = gram(3, 7), gram(4, 5)
    step = gradient_step(halves, a, b, "raw")
    mean = (halves[0] + halves[1]) / 2
    close(step.direction, torch.linalg.solve(b, mean) @ a.inverse(), rtol=1e-6, atol=1e-8)
    assert step.norm**2 == pytest.approx(float((mean * step.direction).sum()), rel=1e-6)


def test_the_denoised_step_drops_white_noise_and_keeps_a_spike():
    out, in_ = 40, 60
    identity_a, identity_b = (torch.eye(n, dtype=torch.float64) for n in (in_, out))
    noise = [normal(seed, out, in_) for seed in (1, 2)]
    quiet = gradient_step(tuple(noise), identity_a, identity_b, "denoised")
    raw = gradient_step(tuple(noise), identity_a, identity_b, "raw")
    assert quiet.norm < 0.25 * raw.norm
    spike = torch.outer(normal(3, out), normal(4, in_)) * 2
    step = gradient_step(tuple(half + spike for half in noise), identity_a, identity_b, "denoised")
    assert float((step.direction - spike).norm()) < 0.2 * float(spike.norm())


def test_optimal_shrinkage_is_zero_below_the_edge_and_never_grows_a_value():
    values = torch.tensor([5.0, 2.5, 1.9, 1.0, 0.1], dtype=torch.float64)
    shrunk = shrink_singular_values(values, 0.64)
    expected = ((5.0**2 - 1.64) ** 2 - 4 * 0.64) ** 0.5 / 5.0
    assert float(shrunk[0]) == pytest.approx(expected)
    assert bool((shrunk <= values).all())
    assert shrunk[3:].tolist() == [0, 0]  # the edge is 1 + sqrt(.64) = 1.8
    assert float(shrunk[2]) > 0


@property_test
@given(SEEDS, SIDES, SIDES)
def test_changes_under_other_grams_are_those_of_each_truncation(seed, out, in_):
    w, a, b = normal(seed, out, in_), gram(seed + 1, in_), gram(seed + 2, out)
    other_a, other_b = gram(seed + 3, in_), gram(seed + 4, out)
    spectrum = whitened_spectrum(w, a, b)
    changes = spectrum.changes_under(other_a, other_b)
    for rank in range(min(out, in_) + 1):
        delta = spectrum.left[:, :rank] @ spectrum.right[:rank] - w
        expected = quadratic_change(delta, other_a, other_b)
        assert float(changes[rank]) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    close(spectrum.changes_under(a, b), spectrum.truncation_changes(), rtol=1e-6, atol=1e-8)


@property_test
@given(SEEDS, SIDES, SIDES, st.sampled_from([0.0, 0.2]), st.sampled_from([0.0, 3.0]), SIDES)
def test_changes_with_less_damping_are_those_under_the_grams_without_it(
    seed, out, in_, of_input, of_output, rank
):
    w = normal(seed, out, in_)
    # Grams of fewer rows than columns among them: undamped they have no inverse.
    a, b = gram(seed + 1, in_, rank=rank), gram(seed + 2, out, rank=rank)
    more = [of * torch.eye(len(g)).double() for of, g in ((of_input, a), (of_output, b))]
    spectrum = whitened_spectrum(w, a + more[0], b + more[1])
    changes = spectrum.changes_with_less(of_input, of_output)
    scale = float(spectrum.truncation_changes()[0])
    close(changes, spectrum.changes_under(a, b), rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize("signal", [0.0, 0.5, 1000.0])
def test_the_harmless_radius_is_where_the_quadratic_model_with_its_global_term_is_back_at_zero(
    signal,
):
    found = harmless_range(torch.tensor([3.0, 0.5, 0.1], dtype=torch.float64), 2.0, signal, 1.0)
    eta = step_length(signal)
    lowest = -signal * eta + 0.5 * (signal + signal**2) * eta**2
    assert lowest + 0.5 * found.radius**2 == pytest.approx(0, abs=1e-12)
    assert found.centre == pytest.approx(2 * eta)
    assert found.lossless_rank == lossless_rank(
        torch.tensor([3.0, 0.5, 0.1], dtype=torch.float64), found.radius
    )


def test_a_gradient_that_is_all_noise_leaves_no_harmless_range():
    found = harmless_range(torch.ones(4, dtype=torch.float64), 2.0, -3.0, 5.0)
    assert (found.radius, found.lossless_rank) == (0, 4)


def test_a_spectrum_kept_in_float32_gives_the_same_weights_to_float32() -> None:
    weight, a, b = normal(0, 9, 6), gram(1, 6), gram(2, 9)
    exact = whitened_spectrum(weight, a, b)
    kept = exact.kept(lambda factor: factor.float())
    assert kept.left.dtype == kept.right.dtype == torch.float32
    assert kept.truncated(3).dtype == torch.float64
    torch.testing.assert_close(kept.truncated(3), exact.truncated(3), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        kept.changes_under(a, b), exact.changes_under(a, b), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(kept.singular_values, exact.singular_values)
