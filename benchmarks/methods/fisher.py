"""GFWSVD (Chekalina et al. 2025, arXiv 2505.17974), and what the Fisher of the weights gives.

The observed Fisher of a layer is the mean of ``vec(G) vec(G)^T`` over samples of its weight's
gradient G ``(out, in)``. Its nearest Kronecker product is the rank-one SVD of its permutation
``sum of (G kron G)`` (Van Loan and Pitsianis 1993): the factors U ``(out, out)``
and V ``(in, in)`` maximise ``sum of <U, G V G^T>``, and each is found from the other,
alternately. Both stay positive semi-definite from a positive start. As in the public code,
samples are mean gradients over 16 examples, and a factor that is not positive definite is shrunk
to a multiple of the identity by tenths. The weight is whitened by both; one ratio for all layers,
or the threshold search of ASVD, the pair that the code of KFAC-SVD recommends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.methods.gradients import weight_gradients
from benchmarks.methods.low_rank import Spectra, spectra, uniform
from benchmarks.methods.method import AtSize, Method, Study
from benchmarks.methods.sensitivity import Sensitivity, threshold_search

MOST_ITERATIONS = 50
CONVERGED = 1e-5  # relative change of the singular value
SHRINKAGE = 0.1
RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Fisher:
    """What one layer's gradient samples show.

    Attributes:
        samples: ``(k, out, in)`` float32.
    """

    samples: Tensor

    @property
    def diagonal(self) -> Tensor:
        """Fisher information of each weight, ``(out, in)`` float64."""
        return self.samples.double().square().mean(0)

    def kronecker(self) -> tuple[Tensor, Tensor]:
        """The nearest Kronecker product: U ``(out, out)`` and V ``(in, in)``, float64.

        Both have the root of the top singular value as their Frobenius norm.
        """
        g = self.samples
        v = torch.eye(g.shape[2], dtype=g.dtype, device=g.device) / g.shape[2] ** 0.5
        value = 0.0
        for _ in range(MOST_ITERATIONS):
            u = torch.einsum("kij,klj->il", g @ v, g)  # sum of G V G^T
            u /= u.norm().clamp(min=torch.finfo(g.dtype).tiny)
            v = torch.einsum("kij,kil->jl", u @ g, g)  # sum of G^T U G
            before, value = value, float(v.norm()) / len(g)
            v /= v.norm().clamp(min=torch.finfo(g.dtype).tiny)
            if abs(value - before) <= CONVERGED * value:
                break
        root = value**0.5
        return root * u.double(), root * v.double()


def fishers(study: Study) -> Iterator[tuple[str, Fisher]]:
    """One layer after the other."""
    for name, samples in weight_gradients(study):
        yield name, Fisher(samples)


def positive_definite(factor: Tensor) -> Tensor:
    """The factor, mixed with a multiple of the identity as far as it takes."""
    mean = factor.diagonal().mean()
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    for tenths in range(11):
        share = SHRINKAGE * tenths
        mixed = (1 - share) * factor + share * mean * identity
        if int(torch.linalg.cholesky_ex(mixed)[1]) == 0:
            return mixed
    raise ValueError("the Fisher factor is not finite, or 0")


def _spectra(study: Study) -> Spectra:
    factors = {
        name: tuple(positive_definite(factor) for factor in fisher.kronecker())
        for name, fisher in fishers(study)
    }
    return spectra(study, lambda name: (factors[name][1], factors[name][0]))


def gfwsvd(study: Study) -> AtSize:
    return uniform(study, _spectra(study))


def gfwsvd_search(study: Study) -> AtSize:
    return threshold_search(study, _spectra(study), Sensitivity.on(study, "selection"), RATIOS)


SOURCE = "Chekalina et al. 2025, arXiv 2505.17974"
METHODS = {
    "gfwsvd": Method("GFWSVD", SOURCE, gfwsvd),
    "gfwsvd-search": Method("GFWSVD, ranks as ASVD", SOURCE, gfwsvd_search),
}
