import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rankfold.linalg import (
    damped,
    descending_eigh,
    inverse_factor,
    pivot_rows,
    symmetric_roots,
    thin_svd,
)
from tests.cases import SEEDS, SIDES, gram, normal

property_test = settings(max_examples=25, deadline=None)
close = torch.testing.assert_close


def assert_pseudo_inverse(found, matrix):
    close(found, torch.linalg.pinv(matrix, rtol=1e-10, hermitian=True), rtol=1e-6, atol=1e-8)


def test_damped_adds_a_share_of_the_mean_eigenvalue():
    g = torch.diag(torch.tensor([1.0, 2.0, 6.0]))  # mean eigenvalue 3
    result = damped(g, 0.1)
    assert result.dtype == torch.float64
    close(result, torch.diag(torch.tensor([1.3, 2.3, 6.3], dtype=torch.float64)), rtol=1e-7, atol=0)


def test_damped_by_zero_is_the_gram_itself():
    g = gram(0, 4)
    assert torch.equal(damped(g, 0.0), g)


@property_test
@given(SEEDS, SIDES, st.floats(0, 10))
def test_damped_shifts_the_eigenvalues_and_leaves_its_input_alone(seed, side, damping):
    g = gram(seed, side)
    before = g.clone()
    expected = torch.linalg.eigvalsh(g)
    expected = expected + damping * expected.mean()
    close(torch.linalg.eigvalsh(damped(g, damping)), expected)
    assert torch.equal(g, before)


@property_test
@given(SEEDS, SIDES, SIDES)
def test_symmetric_roots_also_of_singular_grams(seed, side, rank):
    g = gram(seed, side, rank)  # singular where rank < side
    root, inverse_root = symmetric_roots(g)
    close(root, root.T)
    close(inverse_root, inverse_root.T)
    close(root @ root, g)
    assert_pseudo_inverse(inverse_root @ inverse_root, g)
    projector = torch.linalg.pinv(g, rtol=1e-10, hermitian=True) @ g
    close(root @ inverse_root, projector, rtol=1e-6, atol=1e-6)


def test_symmetric_roots_count_noise_below_the_cutoff_as_zero():
    g = torch.diag(torch.tensor([4.0, 4e-11, 4e-13, -4e-13], dtype=torch.float64))
    root, inverse_root = symmetric_roots(g)
    zero_noise = torch.tensor([4.0, 4e-11, 0.0, 0.0], dtype=torch.float64)
    close(root.diagonal(), zero_noise.sqrt())
    close(inverse_root.diagonal()[:2], zero_noise[:2].rsqrt())
    assert inverse_root.diagonal()[2:].tolist() == [0, 0]


@pytest.mark.parametrize("function", [symmetric_roots, lambda g: (inverse_factor(g),)])
def test_a_zero_gram_has_zero_roots(function):
    for matrix in function(torch.zeros(3, 3, dtype=torch.float64)):
        assert torch.equal(matrix, torch.zeros(3, 3, dtype=torch.float64))


@property_test
@given(SEEDS, SIDES, SIDES)
@example(seed=12212083, side=8, rank=7)  # Cholesky succeeds; its last pivot is rounding, 3e-11
def test_inverse_factor_whitens_also_singular_grams(seed, side, rank):
    g = gram(seed, side, rank)
    q = inverse_factor(g)
    assert_pseudo_inverse(q @ q.T, g)
    whitened = torch.linalg.eigvalsh(q.T @ g @ q)  # 0 for null directions, then 1
    null = side - min(rank, side)
    expected = torch.cat([torch.zeros(null), torch.ones(side - null)]).double()
    close(whitened, expected, rtol=0, atol=1e-6)


def test_inverse_factor_of_a_gram_with_a_dead_channel():
    g = gram(0, 4)
    g[2] = g[:, 2] = 0
    q = inverse_factor(g)
    alive = [0, 1, 3]
    expected = torch.zeros_like(g)
    expected[torch.tensor(alive)[:, None], alive] = g[alive][:, alive].inverse()
    close(q @ q.T, expected, rtol=1e-9, atol=1e-9)


@property_test
@given(SEEDS, SIDES, SIDES)
def test_descending_eigh_rebuilds_the_gram(seed, side, rank):
    g = gram(seed, side, rank)
    skew = 1e-13 * normal(seed + 1, side, side)  # symmetric up to rounding only
    eigenvalues, vectors = descending_eigh(g + (skew - skew.T))
    assert bool((eigenvalues >= 0).all())
    assert bool((eigenvalues.diff() <= 0).all())
    close(vectors.T @ vectors, torch.eye(side, dtype=torch.float64))
    close((vectors * eigenvalues) @ vectors.T, g)


@property_test
@given(SEEDS, SIDES, SIDES)
def test_thin_svd_of_full_rank_matrices(seed, out, in_):
    matrix = normal(seed, out, in_)
    u, sigma, v = thin_svd(matrix)
    r = min(out, in_)
    assert (u.shape, sigma.shape, v.shape) == ((out, r), (r,), (in_, r))
    close(sigma, torch.linalg.svdvals(matrix), rtol=1e-6, atol=1e-6)
    close((u * sigma) @ v.T, matrix)
    close(u.T @ u, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-5)
    close(v.T @ v, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-5)


@property_test
@given(SEEDS, SIDES, SIDES, st.integers(0, 3))
def test_thin_svd_of_rank_deficient_matrices(seed, out, in_, rank):
    matrix = normal(seed, out, rank) @ normal(seed + 1, rank, in_)
    u, sigma, v = thin_svd(matrix)
    assert bool(torch.isfinite(torch.cat([u, v])).all())
    scale = 1 + float(matrix.norm())
    close((u * sigma) @ v.T, matrix, rtol=0, atol=1e-6 * scale)
    close(sigma, torch.linalg.svdvals(matrix), rtol=0, atol=1e-6 * scale)


@property_test
@given(SEEDS, SIDES, st.data())
def test_pivot_rows_are_a_permutation_with_a_basis_first(seed, rows, data):
    k = data.draw(st.integers(1, rows))
    matrix = normal(seed, rows, k)
    order = pivot_rows(matrix)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(rows))
    assert int(order[0]) == int(matrix.norm(dim=1).argmax())
    coefficients = matrix @ matrix[order[:k]].inverse()
    assert float(coefficients.abs().max()) <= 2**k  # the bound of pivoted QR, with room


def test_pivot_rows_pass_over_dependent_rows():
    matrix = torch.tensor([[9, 0], [8, 0], [7, 0], [0, 1], [0, 0]], dtype=torch.float64)
    assert pivot_rows(matrix)[:2].tolist() == [0, 3]
