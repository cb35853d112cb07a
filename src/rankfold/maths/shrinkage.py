"""What a Gram of few examples lacks, judged by examples that it has not seen.

Along the directions of its small eigenvalues the Gram of a sample has less energy than other
examples of the same kind, and the more so the fewer examples there are for its side: with fewer
rows than columns most directions have none. ``Gram + d I`` puts that right for all small
eigenvalues at once and hardly moves the large ones (docs/theory.md, 1). The d that it takes
differs by orders of magnitude between the Grams of one network: nearly nothing for a conv that
sees each image at thousands of places, the mean eigenvalue for a head that sees each image once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankfold.maths.linalg import kept_below, mirrored, random_signs, symmetric_eigh, whitening

# Dampings looked at, as shares of the mean eigenvalue: where the first one is best, none is needed.
LEAST, MOST = 1e-6, 10.0
STEPS_PER_DECADE = 8
# Side up to which a Gram is decomposed; above it a quadrature takes far less time and finds the
# same damping (docs/notebook/damping.md).
LARGEST_DECOMPOSED = 1024
PROBES = 8
LANCZOS_STEPS = 64


def held_out_damping(gram: Tensor, other: Tensor) -> float:
    """The damping with which one Gram describes the examples of another one best.

    The likeliest d for Gaussian rows with the second moment ``gram + d I`` whose Gram is ``other``:
    the minimum of ``sum_i log(l_i + d) + e_i / (l_i + d)``, l the eigenvalues of ``gram`` and e the
    energies of ``other`` along its eigenvectors. It asks for the right energy in proportion, so
    small eigenvalues count as much as large ones. Both Grams are taken on the scale of the first.

    Args:
        gram: ``(n, n)`` symmetric positive semi-definite, of some examples.
        other: ``(n, n)``, of others.

    Returns:
        d as a share of the mean eigenvalue of ``gram``, found to a third; 0 where ``gram`` needs
        none, or where one of both is 0.
    """
    mean, trace = float(gram.trace()) / len(gram), float(other.trace())
    if not (mean > 0 and trace > 0):
        return 0.0
    spectrum = decomposed if len(gram) <= LARGEST_DECOMPOSED else quadrature
    eigenvalues, counts, energies = (part.to(torch.float64) for part in spectrum(gram, other))
    places = round(math.log10(MOST / LEAST) * STEPS_PER_DECADE) + 1
    shares = torch.logspace(math.log10(LEAST), math.log10(MOST), places).to(energies)
    damped = eigenvalues.clamp(min=0) / (mean * len(gram)) + shares[:, None] / len(gram)
    best = int((counts * damped.log() + energies / trace / damped).sum(1).argmin())
    return float(shares[best]) if best > 0 else 0.0


def damping_of_half(diagonal: Tensor, running: Tensor) -> float:
    """The damping that a Gram needed when half of its rows were added up, by the rows since.

    Args:
        diagonal: ``(n,)`` of the Gram at its half.
        running: ``(n, n)`` the Gram now on and above the diagonal, and below it that at its half
            (``linalg.keep_below``).

    Returns:
        As ``held_out_damping``; 0 where n is.
    """
    if not len(running):
        return 0.0
    early = kept_below(running, diagonal)
    return held_out_damping(early, mirrored(running) - early)


def damping_behind(early: Tensor, later: Tensor, mixing: Tensor, mean: float) -> float:
    """The damping that a Gram needed, by what it is behind a weight.

    Of A only ``C = W A W^T`` is known: with ``A + d I`` it is ``C + d W W^T``, so where both are
    whitened by ``W W^T`` the damping is that of C.

    Args:
        early: ``(n, n)``, C of some examples.
        later: ``(n, n)``, of others.
        mixing: ``(n, n)``, ``W W^T``.
        mean: The mean eigenvalue of A, of the first examples.

    Returns:
        d as a share of ``mean``; 0 as ``held_out_damping``.
    """
    if not mean > 0:
        return 0.0
    q = whitening(mixing.to(torch.float64), torch.float64)
    first, second = (q.down(q.down(gram.to(torch.float64)).T).T for gram in (early, later))
    share = held_out_damping((first + first.T) / 2, (second + second.T) / 2)
    return share * float(first.diagonal().mean()) / mean


def decomposed(gram: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of a Gram, how often each is there, and another Gram's energy along them.

    Args:
        gram: ``(n, n)`` symmetric positive semi-definite.
        other: ``(n, n)`` likewise.

    Returns:
        Three ``(n,)`` tensors: ``sum counts f(eigenvalues)`` is ``tr f(gram)``, and ``sum energies
        f(eigenvalues)`` is ``tr(f(gram) other)``.
    """
    eigenvalues, vectors = symmetric_eigh(gram)
    energies = ((other @ vectors) * vectors).sum(0).clamp(min=0)  # below 0 only by rounding
    return eigenvalues, torch.ones_like(eigenvalues), energies


def quadrature(
    gram: Tensor, other: Tensor, *, probes: int = PROBES, steps: int = LANCZOS_STEPS
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``decomposed`` gives, estimated for smooth functions: few nodes for all eigenvalues.

    Stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017, section 3): random signs z have
    ``E z^T f(gram) z = tr f(gram)``, and the Krylov space of each z has nodes and weights for it.
    Along the way ``z^T f(gram) other z`` is known from the same space. The signs are the same every
    time.

    Args:
        gram: ``(n, n)`` symmetric positive semi-definite.
        other: ``(n, n)`` likewise.
        probes: How many z.
        steps: Nodes for each of them, n at most.

    Returns:
        As ``decomposed``, ``(probes * steps,)`` each.
    """
    side = len(gram)
    steps = min(steps, side)
    start = random_signs(side, probes).to(gram) / math.sqrt(side)
    basis = gram.new_zeros(probes, steps, side)
    basis[:, 0] = start.T
    diagonals, off_diagonals = gram.new_zeros(probes, steps), gram.new_zeros(probes, steps)
    for step in range(steps):
        following = (basis[:, step] @ gram)[:, None]
        diagonals[:, step] = (basis[:, step] * following[:, 0]).sum(1)
        known = basis[:, : step + 1]
        for _ in range(2):  # once is not enough in float32
            following = following - (following @ known.mT) @ known
        norms = following[:, 0].norm(dim=1)
        # A space that ends early has no more nodes.
        ended = norms <= torch.finfo(gram.dtype).eps * diagonals[:, 0].abs()
        off_diagonals[:, step] = norms.where(~ended, 0)
        if step + 1 < steps:
            unit = following[:, 0] / norms.where(~ended, 1)[:, None]
            basis[:, step + 1] = torch.where(ended[:, None], 0, unit)
    between = off_diagonals[:, : steps - 1]
    tridiagonal = torch.diag_embed(diagonals) + torch.diag_embed(between, 1)
    nodes, vectors = symmetric_eigh((tridiagonal + torch.diag_embed(between, -1)).double())
    seen = torch.einsum("pjn,np->pj", basis, other @ start).double()
    first, along = vectors[:, 0], torch.einsum("pji,pj->pi", vectors, seen)
    weight = side / probes
    return nodes.flatten(), (weight * first.square()).flatten(), (weight * first * along).flatten()
