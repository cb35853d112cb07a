"""From a layer's weight and statistics to the spectrum that decides its rank.

The loss change of replacing W by W + Delta is modelled as
``<G, Delta> + 1/2 tr(B Delta A Delta^T)`` with A the input Gram, B the Gram of output gradients
and G the mean gradient (K-FAC; Martens and Grosse 2015). In whitened coordinates
``D = B^1/2 Delta A^1/2`` the second term is ``1/2 |D|^2``, so the best rank-k weight is a truncated
SVD (Eckart and Young 1936) of the whitened weight, and what it costs is the tail of the spectrum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.linalg import descending_eigh, inverse_factor, symmetric_roots, thin_svd


@dataclass(frozen=True)
class Spectrum:
    """Singular values of ``T = B^1/2 W A^1/2`` and the factors of every rank at once.

    Attributes:
        singular_values: ``(r,)`` float64, descending, r = min(out, in).
        left: ``(out, r)`` float64.
        right: ``(r, in)`` float64; the best rank-k weight is ``left[:, :k] @ right[:k]``.
    """

    singular_values: Tensor
    left: Tensor
    right: Tensor

    def truncation_changes(self) -> Tensor:
        """Predicted loss change of every rank 0..r, ``(r + 1,)``: half the tail's energy."""
        return 0.5 * tail_energies(self.singular_values)


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
        input_gram: A, ``(in, in)``, damped as wanted; None for the identity.
        output_gram: B, ``(out, out)``, likewise.
    """
    w = weight.detach().to(torch.float64)
    if w.shape[1] > w.shape[0]:
        flipped = whitened_spectrum(w.T, output_gram, input_gram)
        return Spectrum(flipped.singular_values, flipped.right.T, flipped.left.T)
    if input_gram is None:
        identity = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
        root, inverse_root = identity, identity
    else:
        root, inverse_root = symmetric_roots(input_gram)
    coloured = w @ root  # (out, in)
    weighted = coloured if output_gram is None else output_gram @ coloured
    energies, v = descending_eigh(coloured.T @ weighted)
    return Spectrum(energies.sqrt(), coloured @ v, v.T @ inverse_root)


def quadratic_change(
    delta: Tensor, input_gram: Tensor, output_gram: Tensor, gradient: Tensor | None = None
) -> float:
    """Predicted loss change ``<G, Delta> + 1/2 tr(B Delta A Delta^T)`` of any perturbation.

    Args:
        delta: ``(out, in)``.
        input_gram: ``(in, in)``.
        output_gram: ``(out, out)``.
        gradient: ``(out, in)`` or None for 0.
    """
    d = delta.to(torch.float64)
    quadratic = 0.5 * float(((output_gram @ d @ input_gram) * d).sum())
    linear = 0.0 if gradient is None else float((gradient.to(torch.float64) * d).sum())
    return linear + quadratic


@dataclass(frozen=True)
class GradientStep:
    """The direction in which the quadratic model says that a weight should move.

    Attributes:
        direction: ``(out, in)`` float64; the weight moves by ``-eta * direction``.
        signal: ``<S1, S2>`` of the whitened gradients of two halves of the calibration data, an
            unbiased estimate of ``|S|^2``.
        noise: ``|S1 - S2|^2 / 4``, the energy of the noise in their mean.
    """

    direction: Tensor
    signal: float
    noise: float


def cross_validated_step(
    gradients: tuple[Tensor, Tensor], input_gram: Tensor, output_gram: Tensor
) -> GradientStep:
    """Natural-gradient step from what two halves of the data agree on.

    Each half's whitened gradient gives the singular directions, the other half the coefficients;
    directions on which they disagree in sign count for nothing. The mean of both is mapped back:
    ``B^-1/2 S A^-1/2``. Noise of one half is independent of the other, so it is not taken for
    signal however large it is.

    Args:
        gradients: Mean gradients ``(out, in)`` of the two halves.
        input_gram: A, ``(in, in)`` float64, damped.
        output_gram: B, ``(out, out)`` float64, damped.
    """
    q_out, q_in = inverse_factor(output_gram), inverse_factor(input_gram)
    first, second = (q_out.T @ half.to(torch.float64) @ q_in for half in gradients)
    agreed = (_confirmed(first, second) + _confirmed(second, first)) / 2
    return GradientStep(
        direction=q_out @ agreed @ q_in.T,
        signal=float((first * second).sum()),
        noise=float((first - second).square().sum()) / 4,
    )


def _confirmed(half: Tensor, other: Tensor) -> Tensor:
    u, _, v = thin_svd(half)
    coefficients = ((u.T @ other) * v.T).sum(1).clamp(min=0)
    return (u * coefficients) @ v.T
