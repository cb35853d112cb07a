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

# Dampings looked at, as shares of the mean eigenvalue: where the first one is best, none is needed.
LEAST, MOST = 1e-6, 10.0
STEPS_PER_DECADE = 8


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
    eigenvalues, vectors = torch.linalg.eigh(gram)
    energies = ((other @ vectors) * vectors).sum(0).to(torch.float64).clamp(min=0) / trace
    eigenvalues = eigenvalues.to(torch.float64).clamp(min=0) / (mean * len(gram))
    places = round(math.log10(MOST / LEAST) * STEPS_PER_DECADE) + 1
    shares = torch.logspace(math.log10(LEAST), math.log10(MOST), places).to(energies)
    damped = eigenvalues + shares[:, None] / len(gram)
    best = int((damped.log() + energies / damped).sum(1).argmin())
    return float(shares[best]) if best > 0 else 0.0
