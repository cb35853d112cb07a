"""From a layer's weight and statistics to the spectrum that decides its rank.

The loss change of replacing W by W + Delta is modelled as
``<G, Delta> + 1/2 tr(B Delta A Delta^T)`` with A the input Gram, B the Gram of output gradients
and G the mean gradient (K-FAC; Martens and Grosse 2015). In whitened coordinates
``D = B^1/2 Delta A^1/2`` the second term is ``1/2 |D|^2``, so the best rank-k weight is a truncated
SVD (Eckart and Young 1936) of the whitened weight, and what it costs is the tail of the spectrum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.maths.linalg import descending_eigh, inverse_factor, symmetric_roots, times

ROWS_AT_ONCE = 8192  # of a vocabulary, in float64


@dataclass(frozen=True)
class Spectrum:
    """Singular values of ``T = B^1/2 W A^1/2`` and the factors of every rank at once.

    Attributes:
        singular_values: ``(r,)`` float64, descending, r = min(out, in).
        left: ``(out, r)`` float64, or as ``kept``.
        right: ``(r, in)`` likewise; the best rank-k weight is ``left[:, :k] @ right[:k]``.
    """

    singular_values: Tensor
    left: Tensor
    right: Tensor

    def kept(self, keep: Callable[[Tensor], Tensor]) -> Spectrum:
        """The same with what ``keep`` makes of factors, where those of all layers are kept."""
        return Spectrum(self.singular_values, keep(self.left), keep(self.right))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors of the best weight of a rank, ``(out, rank)`` and ``(rank, in)`` float64."""
        return self.left[:, :rank].to(torch.float64), self.right[:rank].to(torch.float64)

    def truncated(self, rank: int) -> Tensor:
        """The best weight of a rank, ``(out, in)`` float64."""
        left, right = self.factors(rank)
        return left @ right

    def truncation_changes(self) -> Tensor:
        """Predicted loss change of every rank 0..r, ``(r + 1,)``: half the tail's energy."""
        return 0.5 * tail_energies(self.singular_values)

    def transposed(self) -> Spectrum:
        """Of the transposed weight."""
        return Spectrum(self.singular_values, self.right.T, self.left.T)

    def changes_under(self, input_gram: Tensor, output_gram: Tensor) -> Tensor:
        """Predicted loss change of every rank 0..r under other Grams than chose the directions.

        Damping keeps the directions sane where the data showed little, and counts as loss what
        the data never used; the change that the data predict is that of their own, undamped,
        Grams. For ``E_k = sum_{i > k} l_i r_i^T`` it is ``1/2 tr(B E_k A E_k^T)``, a sum over the
        trailing block of ``(L^T B L) * (R A R^T)``, so all ranks cost no more than one.

        Args:
            input_gram: A, ``(in, in)`` float64, or its diagonal ``(in,)``.
            output_gram: B, ``(out, out)`` float64, or its diagonal ``(out,)``.

        Returns:
            ``(r + 1,)`` float64; the last is 0.
        """
        left, right = self.factors(len(self.singular_values))
        outputs, inputs = left.T @ times(output_gram, left), right @ times(input_gram, right.T)
        blocks = _trailing_sums(outputs * inputs)
        return 0.5 * torch.cat([blocks, blocks.new_zeros(1)]).clamp(min=0)

    def changes_with_less(self, input_damping: float, output_damping: float) -> Tensor:
        """Predicted loss change of every rank 0..r under the Grams that chose it, less damped.

        As ``changes_under``, where what was added to the diagonals is all that differs. Under its
        own Grams the factors are known to have ``L^T B L = diag(sigma^2)`` and ``R A R^T = 1``, or
        the other way round where R is the longer one.

        Args:
            input_damping: What the Gram A had more on its diagonal.
            output_damping: What B had.

        Returns:
            ``(r + 1,)`` float64; the last is 0.
        """
        outputs = -output_damping * (self.left.T @ self.left).to(torch.float64)
        inputs = -input_damping * (self.right @ self.right.T).to(torch.float64)
        # The longer side has the energies (``whitened_spectrum``).
        longer, shorter = (
            (outputs, inputs) if len(self.left) >= self.right.shape[1] else (inputs, outputs)
        )
        longer.diagonal().add_(self.singular_values.square())
        shorter.diagonal().add_(1)
        blocks = _trailing_sums(outputs * inputs)
        return 0.5 * torch.cat([blocks, blocks.new_zeros(1)]).clamp(min=0)

    def changes_along(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """Predicted loss change of every rank 0..r by one direction in each row.

        For ``E_k = sum_{i > k} l_i r_i^T`` it is half the weighted sum over the rows of
        ``(E_k[row] . vector[row])^2``.

        Args:
            vectors: ``(out, in)``.
            weights: ``(out,)`` float64, 0 or more.

        Returns:
            ``(r + 1,)`` float64; the last is 0.
        """
        left, right = self.factors(len(self.singular_values))
        changes = left.new_zeros(len(self.singular_values) + 1)
        for rows in torch.arange(len(weights), device=weights.device).split(ROWS_AT_ONCE):
            parts = left[rows] * (vectors[rows].to(torch.float64) @ right.T)
            along = parts.flip(1).cumsum(1).flip(1)  # (rows, r), of E_0 .. E_{r - 1}
            changes[:-1] += 0.5 * (weights[rows] @ along.square())
        return changes


def _trailing_sums(matrix: Tensor) -> Tensor:
    """The sums of the trailing blocks ``matrix[k:, k:]`` of ``(r, r)``, for k = 0..r-1."""
    return matrix.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)


def tail_energies(singular_values: Tensor) -> Tensor:
    """``sum_{i > k} sigma_i^2`` for k = 0..r, from descending values ``(r,)`` to ``(r + 1,)``."""
    zero = singular_values.new_zeros(1)
    return torch.cat([singular_values.square().flip(0).cumsum(0).flip(0), zero])


def lossless_rank(singular_values: Tensor, tolerance: float) -> int:
    """Numerical rank at a tolerance: the smallest k with ``sum_{i > k} sigma_i^2 <= tolerance^2``.

    With the singular values of ``T = B^1/2 W A^1/2 - S`` and the tolerance ``|S|`` this is the
    smallest rank whose best factorization the quadratic model predicts to do no harm.

    Args:
        singular_values: ``(r,)``, descending.
        tolerance: Radius of the ball of harmless perturbations, 0 or more.
    """
    harmless = tail_energies(singular_values) <= tolerance**2
    return int(harmless.int().argmax())


def whitened_spectrum(
    weight: Tensor, input_gram: Tensor | None = None, output_gram: Tensor | None = None
) -> Spectrum:
    """Spectrum and factors of ``B^1/2 W A^1/2``, exact, through the smaller side only.

    For in <= out the right singular vectors V are those of ``A^1/2 W^T B W A^1/2`` and the best
    rank-k weight is ``W A^1/2 V_k V_k^T A^-1/2``: neither a root nor an inverse of B is needed.
    For out < in the roles are exchanged. (The idea is Swift-SVD's, arXiv 2604.01609, extended
    from B = I to both sides.)

    Args:
        weight: ``(out, in)``.
        input_gram: A, ``(in, in)``, damped as wanted, or its diagonal ``(in,)``; None for the
            identity.
        output_gram: B, ``(out, out)`` or ``(out,)``, likewise.
    """
    w = weight.detach().to(torch.float64)
    if w.shape[1] > w.shape[0]:
        return whitened_spectrum(w.T, output_gram, input_gram).transposed()
    if input_gram is None:
        input_gram = torch.ones(w.shape[1], dtype=w.dtype, device=w.device)
    # Any root of A gives the same factors: A = R R^T for R = A Q, where Q^T A Q is the identity.
    diagonal = input_gram.dim() == 1
    q = symmetric_roots(input_gram)[1] if diagonal else inverse_factor(input_gram)
    coloured = times(q if diagonal else q.T, times(input_gram, w.T)).T  # W A Q, (out, in)
    weighted = coloured if output_gram is None else times(output_gram, coloured)
    energies, v = descending_eigh(coloured.T @ weighted)
    return Spectrum(energies.sqrt(), coloured @ v, times(q, v).T)


def smaller_side_spectrum(weight: Tensor, gram: Tensor, product: Tensor) -> Spectrum:
    """The spectrum of ``whitened_spectrum``, from what is known of the smaller side alone.

    For out <= in, with ``B^1/2 C B^1/2 = U diag(s^2) U^T`` and ``C = W A W^T``, the best rank-k
    weight is ``B^-1/2 U_k U_k^T B^1/2 W``: A matters only as C. For in < out likewise B only as
    ``W^T B W``.

    Args:
        weight: ``(out, in)``.
        gram: Of the smaller side, damped as wanted: B ``(out, out)`` for out <= in, else A.
        product: ``W A W^T`` ``(out, out)`` for out <= in, else ``W^T B W`` ``(in, in)``, likewise.

    Returns:
        With the longer factor in the weight's dtype: it may be by far the largest of all.
    """
    w, gram = weight.detach(), gram.to(torch.float64)
    if w.shape[1] < w.shape[0]:
        return smaller_side_spectrum(w.T, gram, product).transposed()
    q = inverse_factor(gram)
    root = gram @ q  # root root^T is the Gram
    energies, u = descending_eigh(root.T @ product.to(torch.float64) @ root)
    return Spectrum(energies.sqrt(), q @ u, (root @ u).T.to(w.dtype) @ w)


def quadratic_change(
    delta: Tensor, input_gram: Tensor, output_gram: Tensor, gradient: Tensor | None = None
) -> float:
    """Predicted loss change ``<G, Delta> + 1/2 tr(B Delta A Delta^T)`` of any perturbation.

    It is computed in the precision of the Grams, and summed in float64.

    Args:
        delta: ``(out, in)``.
        input_gram: ``(in, in)``.
        output_gram: ``(out, out)``.
        gradient: ``(out, in)`` or None for 0.
    """
    d = delta.to(output_gram.dtype)
    quadratic = 0.5 * float(((output_gram @ d @ input_gram) * d).sum(dtype=torch.float64))
    linear = 0.0 if gradient is None else float((gradient.to(d) * d).sum(dtype=torch.float64))
    return linear + quadratic
