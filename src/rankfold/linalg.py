"""Dense linear algebra in float64: roots of Grams, orthonormal bases, pivoted rows.

Everything here is a pure function of tensors; nothing knows about layers or models.
"""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

# Eigenvalues below this share of the largest one are numerical noise of a float64 Gram whose
# blocks were formed in float32: their directions count as never seen.
RELATIVE_CUTOFF = 1e-12


def damped(gram: Tensor, damping: float) -> Tensor:
    """Add ``damping`` times the mean eigenvalue to the diagonal of a Gram.

    Args:
        gram: ``(n, n)`` symmetric positive semi-definite.
        damping: Share of the mean eigenvalue, 0 or more.

    Returns:
        ``(n, n)`` float64.
    """
    gram = gram.to(torch.float64)
    mean_eigenvalue = gram.diagonal().mean()
    return gram + damping * mean_eigenvalue * torch.eye(
        len(gram), dtype=torch.float64, device=gram.device
    )


def symmetric_roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a Gram, and its pseudo-inverse.

    Directions below the relative cut-off get 0 in both, so a singular Gram (dead channels, fewer
    samples than dimensions) is a normal input.

    Args:
        gram: ``(n, n)`` float64, symmetric positive semi-definite.

    Returns:
        ``(root, inverse_root)``, both ``(n, n)`` float64, with ``root @ root == gram``.
    """
    eigenvalues, vectors = torch.linalg.eigh(gram)
    kept = eigenvalues > RELATIVE_CUTOFF * eigenvalues[-1].clamp(min=0)
    roots = torch.where(kept, eigenvalues, 0).sqrt()
    inverse = torch.where(kept, 1 / torch.where(kept, roots, 1), 0)
    return (vectors * roots) @ vectors.T, (vectors * inverse) @ vectors.T


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


def descending_eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, clamped at 0, and eigenvectors of a Gram, the largest first.

    Args:
        gram: ``(n, n)`` float64, symmetric up to rounding.

    Returns:
        ``(eigenvalues (n,), vectors (n, n))``.
    """
    eigenvalues, vectors = torch.linalg.eigh((gram + gram.T) / 2)
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


def pivot_rows(matrix: Tensor) -> Tensor:
    """Order the rows of a matrix so that the first ones span the rest with small coefficients.

    QR with column pivoting of the transpose (Businger and Golub 1965).

    Args:
        matrix: ``(m, k)`` float64 with k <= m.

    Returns:
        ``(m,)`` int64 permutation; its first k entries are the pivot rows.
    """
    transposed = matrix.T.cpu().numpy()
    _, order = scipy.linalg.qr(transposed, mode="r", pivoting=True, check_finite=False)
    return torch.from_numpy(order.astype("int64")).to(matrix.device)
