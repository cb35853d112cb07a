"""Dense linear algebra: roots of Grams, orthonormal bases, pivoted rows; in float64 as a rule.

Everything here is a pure function of tensors; nothing knows about layers or models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from torch import Tensor

# Eigenvalues below this share of the largest one are numerical noise of a float64 Gram whose
# blocks were formed in float32: their directions count as never seen.
RELATIVE_CUTOFF = 1e-12

# Bound of the coefficients with which pivot rows write the other rows. Below 2 it takes many more
# swaps; above it, coefficients gain nothing in any floating-point format but lose its precision.
LARGEST_COEFFICIENT = 2.0

# A row whose distance from the span of the pivots is below this share of the largest row is
# rounding, and needs no pivot of its own.
NEGLIGIBLE_ROW = 1e-13

# Condition number of a Gram up to which solving with its Cholesky factor is exact enough: errors
# in float32 are then below a hundredth even in the direction of the smallest eigenvalue.
LARGEST_CONDITION = {torch.float32: 1e5, torch.float64: 1 / RELATIVE_CUTOFF}
# How many vectors it is estimated with, and how often they are multiplied.
CONDITION_PROBES = 4
CONDITION_POWERS = 4

# Side of a Gram up to which it is multiplied whole: smaller products are no faster.
GRAM_SIDE = 256

# Numbers of two matrices that are multiplied at once where only their sum is wanted.
LARGEST_PRODUCT = 1 << 22

_Array: TypeAlias = npt.NDArray[np.float64]


class Damping(NamedTuple):
    """What is added to the two Grams of a layer, as shares of their mean eigenvalues.

    Attributes:
        input: For A, the Gram of inputs.
        output: For B, the Gram of output gradients.
    """

    input: float
    output: float

    def at_least(self, other: Damping) -> Damping:
        """The larger one of two, for each Gram."""
        return Damping(max(self.input, other.input), max(self.output, other.output))


UNDAMPED = Damping(0.0, 0.0)


def add_gram(upper: Tensor, rows: Tensor, sign: int = 1) -> None:
    """Add ``rows^T rows`` to a running Gram, as far as on and above its diagonal.

    A Gram is symmetric, and Grams are many of the multiplications of a pass over the calibration
    data: what is left out below the diagonal, nearly half, ``mirrored`` puts back once at the end.

    Args:
        upper: ``(n, n)``, changed in place but for what lies below its diagonal.
        rows: ``(rows, n)``, of the same dtype.
        sign: -1 to subtract.
    """
    side = len(upper)
    if side <= GRAM_SIDE:
        upper.add_((rows.T @ rows).triu_(), alpha=sign)
        return
    middle = side // 2
    first, second = rows[:, :middle], rows[:, middle:]
    add_gram(upper[:middle, :middle], first, sign)
    add_gram(upper[middle:, middle:], second, sign)
    upper[:middle, middle:].addmm_(first.T, second, alpha=sign)


def mirrored(upper: Tensor) -> Tensor:
    """The symmetric ``(n, n)`` matrix of what ``add_gram`` added up."""
    return upper.triu() + upper.triu(1).T


def keep_below(upper: Tensor) -> Tensor:
    """Keep what a running Gram is now where nothing is added, below its diagonal.

    Args:
        upper: ``(n, n)``, changed in place below its diagonal.

    Returns:
        ``(n,)``, the diagonal as it is now.
    """
    upper.copy_(mirrored(upper))
    return upper.diagonal().clone()


def kept_below(running: Tensor, diagonal: Tensor) -> Tensor:
    """The symmetric ``(n, n)`` matrix that a running Gram was at ``keep_below``.

    Args:
        running: ``(n, n)``, added to since then.
        diagonal: ``(n,)``, what ``keep_below`` returned.
    """
    below = running.tril(-1)
    return below + below.T + diagonal.diag()


def rows_of_same_gram(rows: Tensor) -> Tensor:
    """The rows themselves, or where there are twice as many as columns one for each column.

    Args:
        rows: ``(m, n)``.

    Returns:
        ``(2 n, n)`` at most, with the same ``rows^T rows``.
    """
    if len(rows) <= 2 * rows.shape[1]:
        return rows
    triangle: Tensor = torch.linalg.qr(rows, mode="r").R
    return triangle


def damped(gram: Tensor, damping: float) -> Tensor:
    """Add ``damping`` times the mean eigenvalue to the diagonal of a Gram.

    Args:
        gram: ``(n, n)`` symmetric positive semi-definite; or ``(n,)``, the diagonal of one that has
            nothing beside it.
        damping: Share of the mean eigenvalue, 0 or more.

    Returns:
        Of the same shape, float64.
    """
    found = gram.to(torch.float64, copy=True)
    diagonal = found if found.dim() == 1 else found.diagonal()
    diagonal.add_(damping * diagonal.mean())
    return found


def symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the smallest first, and eigenvectors, also where ``torch.linalg.eigh`` fails.

    In float32 LAPACK's divide and conquer does not converge for some Grams with many rows of zeros
    beside few directions (channels that never fire, inputs that hardly differ); in float64 it was
    not seen to fail. QR iteration in float64 takes its place: slower, and it converges.

    Args:
        matrix: ``(..., n, n)`` symmetric, finite.

    Returns:
        ``(eigenvalues (..., n), vectors (..., n, n))`` of its dtype.

    Raises:
        ValueError: Its values are not finite.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("a matrix with NaN or infinite values has no eigenvalues")
    try:
        eigenvalues, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        single = matrix.to("cpu", torch.float64).reshape(-1, *matrix.shape[-2:])
        found = [scipy.linalg.eigh(one.numpy(), driver="ev") for one in single]
        values, bases = (np.stack(parts) for parts in zip(*found, strict=True))
        eigenvalues = torch.from_numpy(values).to(matrix).reshape(matrix.shape[:-1])
        vectors = torch.from_numpy(bases).to(matrix).reshape(matrix.shape)
    return eigenvalues, vectors


def symmetric_roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a Gram, and its pseudo-inverse.

    Directions below the relative cut-off get 0 in both, so a singular Gram (dead channels, fewer
    samples than dimensions) is a normal input.

    Args:
        gram: ``(n, n)`` float64, symmetric positive semi-definite; or ``(n,)``, the diagonal of one
            that has nothing beside it.

    Returns:
        ``(root, inverse_root)``, both of the same shape, float64, with ``root @ root == gram``.
    """
    eigenvalues, vectors = (gram, None) if gram.dim() == 1 else symmetric_eigh(gram)
    kept = eigenvalues > RELATIVE_CUTOFF * eigenvalues.max().clamp(min=0)
    roots = torch.where(kept, eigenvalues, 0).sqrt()
    inverse = torch.where(kept, 1 / torch.where(kept, roots, 1), 0)
    if vectors is None:
        return roots, inverse
    return (vectors * roots) @ vectors.T, (vectors * inverse) @ vectors.T


def times(gram: Tensor, matrix: Tensor) -> Tensor:
    """``gram @ matrix`` for a Gram ``(n, n)``, or one given by its diagonal ``(n,)``."""
    return gram[:, None] * matrix if gram.dim() == 1 else gram @ matrix


def marginal_product(terms: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The Kronecker product ``D x M`` with the partial traces of a sum ``sum_i D_i x M_i``.

    It is the sum itself where there is one term, or where all terms share a factor.

    Args:
        terms: Pairs ``(D_i, M_i)`` float64 of positive semi-definite matrices, all D_i of one shape
            and all M_i of another; each may be given by its diagonal.

    Returns:
        ``(D, M)``, of these shapes; the trace of D is 1.
    """
    traces = [(trace(first), trace(second)) for first, second in terms]
    total = sum((a * b for a, b in traces), start=traces[0][0].new_zeros(()))
    total = total.clamp(min=torch.finfo(torch.float64).tiny)
    d, m = (torch.zeros_like(matrix) for matrix in terms[0])
    for (first, second), (of_first, of_second) in zip(terms, traces, strict=True):
        d.add_(first * (of_second / total))
        m.add_(second * of_first)
    return d, m


def inner(first: Tensor, second: Tensor, less: Tensor | None = None) -> float:
    """``<first, second - less>`` of arrays of one shape, summed in float64.

    Of large ones a few rows at a time: their differences and products are as large as they are.
    """
    rows = max(1, LARGEST_PRODUCT // max(1, first[:1].numel()))
    found = 0.0
    for start in range(0, len(first), rows):
        of = slice(start, start + rows)
        factor = second[of] if less is None else second[of] - less[of]
        found += float((first[of] * factor).sum(dtype=torch.float64))
    return found


def trace(gram: Tensor) -> Tensor:
    """The trace of a Gram ``(n, n)``, or of one given by its diagonal ``(n,)``; 0-dimensional."""
    return gram.sum() if gram.dim() == 1 else gram.trace()


def inverse_factor(gram: Tensor) -> Tensor:
    """A whitening matrix Q of a Gram: ``Q.T @ gram @ Q`` is the identity on the Gram's range.

    Cholesky where the Gram is numerically positive definite (ten times faster than an
    eigendecomposition), else the symmetric pseudo-inverse root.

    Args:
        gram: ``(n, n)`` float64, symmetric positive semi-definite.

    Returns:
        ``(n, n)`` float64 with ``Q @ Q.T`` the (pseudo-)inverse of ``gram``.
    """
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) == 0:
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
        # tr(gram) tr(gram^-1) bounds the condition number; a last pivot of pure rounding passes
        # any check of the pivots alone.
        if float(gram.trace() * inverse.square().sum()) * RELATIVE_CUTOFF < 1:
            return inverse.T
    return symmetric_roots(gram)[1]


@dataclass(frozen=True)
class Whitening:
    """A Q that makes a Gram the identity, ``Q.T @ gram @ Q``, on the Gram's range.

    A Gram with nothing beside its diagonal is given by that, and so is Q.

    Attributes:
        triangle: Lower triangle L of ``gram == L @ L.T``, whose inverse transposed is Q; solving
            with it takes half of what multiplying by Q does, and nothing to prepare. None where
            the Gram has none.
        inverse: Q itself where there is no triangle.
    """

    triangle: Tensor | None = None
    inverse: Tensor | None = None

    def down(self, matrix: Tensor) -> Tensor:
        """``Q.T @ matrix``, in the precision of both."""
        if self.triangle is None:
            assert self.inverse is not None  # one of both is there
            q = self.inverse.to(matrix)
            return times(q if q.dim() == 1 else q.T, matrix)
        found: Tensor = torch.linalg.solve_triangular(self.triangle, matrix, upper=False)
        return found

    def up(self, matrix: Tensor) -> Tensor:
        """``Q @ matrix``, likewise."""
        if self.triangle is None:
            assert self.inverse is not None  # one of both is there
            return times(self.inverse.to(matrix), matrix)
        found: Tensor = torch.linalg.solve_triangular(self.triangle.mT, matrix, upper=True)
        return found


def whitening(gram: Tensor, dtype: torch.dtype) -> Whitening:
    """What whitens matrices of a precision by a Gram.

    In float32 where the Gram's condition allows it (``LARGEST_CONDITION``), else in float64 and
    rounded.

    Args:
        gram: ``(n, n)`` float64, symmetric positive semi-definite; or its diagonal ``(n,)``.
        dtype: Of the matrices that are to be whitened.
    """
    if gram.dim() == 1:
        return Whitening(inverse=symmetric_roots(gram)[1])
    rounded = gram.to(dtype)
    triangle, info = torch.linalg.cholesky_ex(rounded)
    if int(info) == 0 and condition_number(rounded, triangle) < LARGEST_CONDITION[dtype]:
        return Whitening(triangle=triangle)
    return Whitening(inverse=inverse_factor(gram).to(dtype))


def condition_number(gram: Tensor, triangle: Tensor) -> float:
    """The condition number of a Gram, estimated from below to a small factor by block powers.

    Args:
        gram: ``(n, n)`` symmetric positive definite.
        triangle: Its lower Cholesky factor.
    """
    probes = random_signs(len(gram), CONDITION_PROBES).to(gram) / math.sqrt(len(gram))
    powers, inverse_powers = probes.T, probes
    largest = smallest = 0.0
    for _ in range(CONDITION_POWERS):
        powers = _of_norm_1(powers, 1) @ gram
        inverse_powers = torch.cholesky_solve(_of_norm_1(inverse_powers, 0), triangle)
        largest = float(powers.norm(dim=1).max())
        smallest = float(inverse_powers.norm(dim=0).max())
    return largest * smallest


def _of_norm_1(matrix: Tensor, dim: int) -> Tensor:
    return matrix / _norms(matrix, dim)


def _norms(matrix: Tensor, dim: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=dim, keepdim=True)
    return norms.clamp(min=torch.finfo(matrix.dtype).tiny)


def random_signs(rows: int, columns: int) -> Tensor:
    """``(rows, columns)`` of 1 and -1, the same every time: ``E z^T f z`` is the trace of f."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1


def descending_eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, clamped at 0, and eigenvectors of a Gram, the largest first.

    Args:
        gram: ``(n, n)``, symmetric up to rounding.

    Returns:
        ``(eigenvalues (n,), vectors (n, n))``.
    """
    eigenvalues, vectors = symmetric_eigh((gram + gram.T) / 2)
    return eigenvalues.flip(0).clamp(min=0), vectors.flip(1)


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition through the eigenvectors of the smaller Gram.

    Args:
        matrix: ``(m, n)`` float64.

    Returns:
        ``(U (m, r), sigma (r,), V (n, r))`` with r = min(m, n). Singular vectors of values below
        1e-7 of the largest are not orthonormal to full precision; their share of any sum of
        squares is below rounding.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, sigma, left = thin_svd(matrix.T)
        return left, sigma, right
    squared, v = descending_eigh(matrix.T @ matrix)
    sigma = squared.sqrt()
    safe = torch.where(sigma > 1e-7 * sigma[0], sigma, torch.inf)
    return (matrix @ v) / safe, sigma, v


def singular_directions(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors through the eigenvectors of the smaller Gram, in the matrix' precision.

    Args:
        matrix: ``(m, n)``.

    Returns:
        ``(U (m, r), V (n, r))`` with r = min(m, n), the largest values first; the columns of the
        longer one have norm 1, or are 0, and those of small values are not quite orthogonal.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, left = singular_directions(matrix.T)
        return left, right
    _, v = descending_eigh(matrix.T @ matrix)
    u = matrix @ v
    return torch.div(u, _norms(u, 0), out=u), v


@dataclass(frozen=True)
class RowBasis:
    """Rows of a matrix that span it, and how they write the others.

    Attributes:
        order: ``(m,)`` int64 permutation of the rows; the first k are the pivots.
        coefficients: ``(m - k, k)``; ``matrix[order[k:]] == coefficients @ matrix[order[:k]]``.
    """

    order: Tensor
    coefficients: Tensor


def pivot_rows(
    matrix: Tensor, growth: float = LARGEST_COEFFICIENT, most_swaps: int | None = None
) -> RowBasis:
    """Choose k rows that write all the others with small coefficients.

    QR with column pivoting of the transpose (Businger and Golub 1965) gives the first choice. It
    can fail: on Kahan's matrices coefficients grow like 2^k. So while a coefficient exceeds
    ``growth``, its row takes the place of its pivot (the strong rank-revealing QR of Gu and
    Eisenstat 1996 for a matrix of exact rank k; the maxvol algorithm of Goreinov et al. 2010).
    Each swap multiplies the volume of the pivots by that coefficient, so the swaps end: after at
    most ``log(k!) / log(growth)`` from the QR's pivots.

    Where the rank is below k, the pivots that no basis needs get coefficients of 0.

    Args:
        matrix: ``(m, k)`` float64 with k <= m.
        growth: Bound of the absolute coefficients, 1 or more.
        most_swaps: Give up after this many swaps, with larger coefficients; k + 100 where None.

    Raises:
        ValueError: ``growth`` is below 1: no choice of rows need have such coefficients.
    """
    if not growth >= 1:
        raise ValueError(f"growth must be 1 or more, not {growth}")
    rows, k = matrix.shape
    triangle, order = scipy.linalg.qr(
        matrix.T.cpu().numpy(), mode="r", pivoting=True, check_finite=False
    )  # (k, m)
    scales = np.abs(triangle.diagonal())
    rank = int((scales > NEGLIGIBLE_ROW * scales[:1]).sum())
    triangle = triangle[:rank]
    found: _Array = np.zeros((rows, 0))  # (m - rank, rank)
    if rank > 0:
        found = scipy.linalg.solve_triangular(
            triangle[:, :rank], triangle[:, rank:], check_finite=False
        ).T
    places = np.arange(rows)
    swaps_left = k + 100 if most_swaps is None else most_swaps
    while swaps_left > 0 and rank > 0:
        # Only rows with a large coefficient take part in a round of swaps; what the new pivots
        # do to the other rows is computed for the whole round at once.
        active = np.flatnonzero(np.abs(found).max(axis=1, initial=0) > growth)
        if not len(active):
            break
        swaps_left -= _swap_rows(found[active], places, rank + active, growth, swaps_left)
        found = np.linalg.solve(triangle[:, places[:rank]], triangle[:, places[rank:]]).T
    coefficients = torch.zeros(rows - k, k, dtype=matrix.dtype)
    coefficients[:, :rank] = torch.from_numpy(found[k - rank :].copy())
    return RowBasis(
        order=torch.from_numpy(order[places].astype("int64")).to(matrix.device),
        coefficients=coefficients.to(matrix.device),
    )


def _swap_rows(
    coefficients: _Array,
    places: npt.NDArray[Any],
    active: npt.NDArray[Any],
    growth: float,
    most: int,
) -> int:
    """Swap rows with pivots until no coefficient exceeds ``growth``; returns the number of swaps.

    Args:
        coefficients: ``(a, k)``, of the active rows; overwritten.
        places: ``(m,)``, which row stands where; the first k are the pivots. Changed in place.
        active: ``(a,)``, where in ``places`` the active rows stand.
        growth: The bound.
        most: The number of swaps after which to give up.
    """
    for swap in range(most):
        i, j = divmod(int(np.abs(coefficients).argmax()), coefficients.shape[1])
        pivot = coefficients[i, j]
        if abs(pivot) <= growth:
            return swap
        row, column = coefficients[i] / pivot, coefficients[:, j] / pivot
        coefficients -= np.outer(column, row * pivot)
        coefficients[:, j] = column
        coefficients[i] = -row
        coefficients[i, j] = 1 / pivot
        places[[j, active[i]]] = places[[active[i], j]]
    return most
