import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rankfold.maths import linalg
from rankfold.maths.linalg import (
    LARGEST_COEFFICIENT,
    add_gram,
    condition_number,
    damped,
    descending_eigh,
    inner,
    inverse_factor,
    keep_below,
    kept_below,
    mirrored,
    pivot_rows,
    rows_of_same_gram,
    singular_directions,
    symmetric_eigh,
    symmetric_roots,
    thin_svd,
    whitening,
)
from tests.cases import SEEDS, SIDES, gram, normal

property_test = settings(max_examples=25, deadline=None)
close = torch.testing.assert_close


def assert_pseudo_inverse(found, matrix):
    close(found, torch.linalg.pinv(matrix, rtol=1e-10, hermitian=True), rtol=1e-6, atol=1e-8)


@contextmanager
def cut_at(side):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linalg, "GRAM_SIDE", side)
        yield


@property_test
@given(seed=SEEDS, side=st.integers(1, 70), rows=st.integers(0, 30))
def test_added_grams_are_the_products_wherever_they_are_cut(seed, side, rows):
    first, second = normal(seed, rows, side), normal(seed + 1, 5, side)
    upper = torch.zeros(side, side, dtype=torch.float64)
    with cut_at(8):
        add_gram(upper, first)
        add_gram(upper, second)
        add_gram(upper, second, sign=-1)
    torch.testing.assert_close(mirrored(upper), first.T @ first)
    assert torch.equal(mirrored(upper), mirrored(upper).T)


def test_a_gram_leaves_out_what_lies_below_its_diagonal():
    rows = normal(0, 40, 600)
    upper = torch.zeros(600, 600, dtype=torch.float64)
    add_gram(upper, rows)
    assert not upper.tril(-1).any()
    torch.testing.assert_close(mirrored(upper), rows.T @ rows)


@property_test
@given(seed=SEEDS, side=st.integers(0, 40), rows=st.integers(0, 60))
def test_what_a_running_gram_was_is_kept_below_its_diagonal(seed, side, rows):
    first, second = normal(seed, rows, side), normal(seed + 1, 7, side)
    running = torch.zeros(side, side, dtype=torch.float64)
    with cut_at(8):
        add_gram(running, first)
        diagonal = keep_below(running)
        add_gram(running, second)
    torch.testing.assert_close(kept_below(running, diagonal), first.T @ first)
    torch.testing.assert_close(mirrored(running), first.T @ first + second.T @ second)


@property_test
@given(seed=SEEDS, side=st.integers(1, 12), rows=st.integers(0, 60))
def test_many_rows_become_few_of_the_same_gram(seed, side, rows):
    many = normal(seed, rows, side)
    few = rows_of_same_gram(many)
    assert len(few) == (rows if rows <= 2 * side else side)
    torch.testing.assert_close(few.T @ few, many.T @ many)


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
@given(SEEDS, SIDES, SIDES, st.sampled_from([torch.float32, torch.float64]))
@example(seed=12212083, side=8, rank=7, dtype=torch.float64)
def test_whitening_is_an_inverse_factor_also_of_singular_grams(seed, side, rank, dtype):
    g, matrix = gram(seed, side, rank), normal(seed + 1, side, 3)
    found = whitening(g, dtype)
    assert found.down(matrix.to(dtype)).dtype == found.up(matrix.to(dtype)).dtype == dtype
    scale = float(torch.linalg.pinv(g, hermitian=True, rtol=1e-10).norm())
    both = found.up(found.down(matrix.to(dtype))).double()  # Q Q^T
    exact = torch.linalg.pinv(g, hermitian=True, rtol=1e-10) @ matrix
    error = 1e-2 if dtype == torch.float32 else 1e-6
    close(both, exact, rtol=0, atol=error * scale * float(matrix.norm()))


@pytest.mark.parametrize("condition", [10.0, 1e4, 1e6, 1e9])
def test_float32_solves_with_a_triangle_only_where_the_condition_allows_it(condition):
    basis = torch.linalg.qr(normal(0, 40, 40)).Q
    g = (basis * torch.logspace(0, -math.log10(condition), 40, dtype=torch.float64)) @ basis.T
    estimated = condition_number(g, torch.linalg.cholesky(g))
    assert 0.2 * condition < estimated < 1.01 * condition
    assert (whitening(g, torch.float32).triangle is not None) == (condition < 1e5)
    assert whitening(g, torch.float64).triangle is not None


@property_test
@given(SEEDS, SIDES, SIDES, st.integers(0, 5))
def test_singular_directions_are_those_of_the_matrix(seed, out, in_, rank):
    matrix = normal(seed, out, rank) @ normal(seed + 1, rank, in_)
    u, v = singular_directions(matrix)
    r = min(out, in_)
    assert (u.shape, v.shape) == ((out, r), (in_, r))
    longer = u if out >= in_ else v
    norms = longer.norm(dim=0)
    assert bool(((norms - 1).abs().lt(1e-6) | norms.eq(0)).all())
    values = (u * (matrix @ v)).sum(0)
    scale = 1 + float(matrix.norm())
    close(values, torch.linalg.svdvals(matrix), rtol=0, atol=1e-6 * scale)
    close((u * values) @ v.T, matrix, rtol=0, atol=1e-6 * scale)


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


def kahan(side, rank):
    """The first ``rank`` rows of Kahan's matrix as columns: plain pivoting takes them in order."""
    c = 0.285
    scale = (1 - c**2) ** (0.5 * torch.arange(side, dtype=torch.float64))
    ones = torch.ones(side, side, dtype=torch.float64)
    matrix = scale[:, None] * (torch.eye(side) - c * torch.triu(ones, 1))
    shrink = 1 - 1e-13 * torch.arange(side, dtype=torch.float64)  # ties broken in that order
    return (matrix * shrink)[:rank].T.contiguous()


def assert_row_basis(basis, matrix, growth=LARGEST_COEFFICIENT):
    """A permutation whose first rows write the others with coefficients up to ``growth``."""
    rows, k = matrix.shape
    assert basis.order.dtype == torch.int64
    assert sorted(basis.order.tolist()) == list(range(rows))
    assert basis.coefficients.shape == (rows - k, k)
    assert basis.coefficients.dtype == torch.float64
    assert bool((basis.coefficients.abs() <= growth * (1 + 1e-9)).all())
    pivots, others = matrix[basis.order[:k]], matrix[basis.order[k:]]
    scale = float(matrix.abs().max())
    close(basis.coefficients @ pivots, others, rtol=0, atol=1e-11 * scale)


@property_test
@given(SEEDS, st.integers(1, 20), st.floats(1, 5), st.floats(0, 8), st.data())
def test_pivot_rows_write_the_others_with_small_coefficients(seed, rows, growth, decades, data):
    k = data.draw(st.integers(1, rows))
    graded = normal(seed, rows, k) * torch.logspace(0, -decades, k, dtype=torch.float64)
    matrix = graded @ torch.linalg.qr(normal(seed + 1, k, k))[0]
    before = matrix.clone()
    assert_row_basis(pivot_rows(matrix, growth), matrix, growth)
    assert torch.equal(matrix, before)


@property_test
@given(SEEDS, st.integers(1, 20), st.integers(0, 12), st.data())
def test_pivot_rows_of_any_rank_and_with_equal_rows(seed, rows, rank, data):
    k = data.draw(st.integers(1, rows))
    matrix = normal(seed, rows, min(rank, k)) @ normal(seed + 1, min(rank, k), k)
    repeats = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
    matrix = matrix[torch.tensor(repeats)]
    assert_row_basis(pivot_rows(matrix), matrix)


@pytest.mark.parametrize(("side", "rank"), [(30, 20), (90, 60), (90, 89), (200, 100)])
def test_pivot_rows_where_plain_pivoting_fails(side, rank):
    matrix = kahan(side, rank)
    plain = pivot_rows(matrix, most_swaps=0)
    assert float(plain.coefficients.abs().max()) > 30
    assert_row_basis(pivot_rows(matrix), matrix)


def test_pivot_rows_make_as_many_swaps_as_are_needed_and_allowed():
    # Six blocks on which plain pivoting fails, each with rows that need swaps of their own.
    square, row = kahan(40, 30)[:30], kahan(40, 30)[30]
    blocks = [torch.cat([square, row * normal(seed, 20, 30).clamp(0.2, 0.9)]) for seed in range(6)]
    matrix = torch.block_diag(*blocks)
    largest = [
        float(pivot_rows(matrix, most_swaps=swaps).coefficients.abs().max()) for swaps in (0, 3)
    ]
    assert min(largest) > 100  # three swaps are not enough
    assert_row_basis(pivot_rows(matrix), matrix)


def test_pivot_rows_pass_over_dependent_rows():
    matrix = torch.tensor([[9, 0], [8, 0], [7, 0], [0, 1], [0, 0]], dtype=torch.float64)
    assert pivot_rows(matrix).order[:2].tolist() == [0, 3]


def test_pivot_rows_of_nothing_but_zeros():
    basis = pivot_rows(torch.zeros(4, 2, dtype=torch.float64))
    assert sorted(basis.order.tolist()) == [0, 1, 2, 3]
    assert torch.equal(basis.coefficients, torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("growth", [0.5, -1, float("nan")])
def test_pivot_rows_refuse_a_bound_below_one(growth):
    with pytest.raises(ValueError, match="growth must be 1 or more"):
        pivot_rows(normal(0, 3, 2), growth)


def test_few_swaps_for_ordinary_matrices(monkeypatch):
    """What keeps it fast: QR alone finds pivots within the bound."""

    def refuse(*_):
        raise AssertionError("swaps of a random matrix")

    monkeypatch.setattr(linalg, "_swap_rows", refuse)
    for seed, (rows, k) in enumerate([(64, 32), (200, 50), (150, 149)]):
        assert_row_basis(pivot_rows(normal(seed, rows, k)), normal(seed, rows, k))


def hardly_differing(seed: int, side: int, dead: int) -> torch.Tensor:
    """The Gram of rows that are nearly one another, most of their columns 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(side, generator=generator) + 1e-6 * torch.randn(60, side, generator=generator)
    rows[:, torch.randperm(side, generator=generator)[:dead]] = 0
    return mirrored(rows.T @ rows)


def assert_decomposed(matrix):
    eigenvalues, vectors = symmetric_eigh(matrix)
    assert eigenvalues.dtype == vectors.dtype == matrix.dtype
    assert bool((eigenvalues.diff() >= 0).all())
    size, rounding = float(eigenvalues.max()), 100 * torch.finfo(matrix.dtype).eps
    close((vectors * eigenvalues[..., None, :]) @ vectors.mT, matrix, rtol=0, atol=rounding * size)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype).expand_as(matrix)
    close(vectors.mT @ vectors, identity, rtol=0, atol=rounding)


@pytest.mark.parametrize("seed", range(3))
def test_eigenvalues_where_divide_and_conquer_does_not_converge(seed):
    matrix = hardly_differing(seed, 960, 605)  # LAPACK's ssyevd gives up on it
    assert_decomposed(matrix)
    assert_decomposed(matrix.double())


def test_eigenvalues_without_divide_and_conquer(monkeypatch):
    def give_up(_):
        raise torch.linalg.LinAlgError("no convergence")

    matrices = torch.stack([gram(seed, 7) for seed in range(3)])
    expected = torch.linalg.eigh(matrices)[0]
    monkeypatch.setattr(torch.linalg, "eigh", give_up)
    assert_decomposed(matrices)
    assert_decomposed(matrices[0].float())
    close(symmetric_eigh(matrices)[0], expected)


def test_a_matrix_that_is_not_finite_has_no_eigenvalues():
    with pytest.raises(ValueError, match="NaN or infinite"):
        symmetric_eigh(torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]))


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_inner_is_the_same_in_pieces(rows, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    first, second, less = torch.randn(3, 7, 5, 2, generator=generator).double()
    monkeypatch.setattr("rankfold.maths.linalg.LARGEST_PRODUCT", 10 * rows)
    assert inner(first, second) == pytest.approx(float((first * second).sum()), rel=1e-12)
    expected = float((first * (second - less)).sum())
    assert inner(first, second, less) == pytest.approx(expected, rel=1e-12)
