"""The gradient step: which part of a gradient is signal, how far to go, and what does no harm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.maths.linalg import inner, singular_directions, thin_svd, whitening
from rankfold.maths.names import StepEstimator as StepEstimator
from rankfold.maths.spectrum import (
    lossless_rank,
)

STEP_ESTIMATORS: tuple[StepEstimator, ...] = ("cross-validated", "denoised", "raw")


@dataclass(frozen=True)
class GradientStep:
    """The direction in which the quadratic model says that a weight should move.

    Attributes:
        direction: ``(out, in)``, of the gradients' dtype; the weight moves by ``-eta * direction``.
        norm: ``|S|`` of the estimate in whitened coordinates: the distance of the centre of the
            harmless ball, for eta = 1.
        signal: ``<S1, S2>`` of the whitened gradients of two halves of the calibration data, an
            unbiased estimate of ``|S|^2``.
        noise: ``|S1 - S2|^2 / 4``, the energy of the noise in their mean.
    """

    direction: Tensor
    norm: float
    signal: float
    noise: float


def gradient_step(
    gradients: Iterable[Tensor],
    input_gram: Tensor,
    output_gram: Tensor,
    estimator: StepEstimator = "cross-validated",
) -> GradientStep:
    """Natural-gradient step ``B^-1/2 S A^-1/2``, S estimated from two halves of the data.

    ``raw`` takes the mean of both halves. ``denoised`` shrinks its singular values optimally for
    noise of the level that the halves show (Gavish and Donoho 2017, Frobenius loss). In
    ``cross-validated`` each half's whitened gradient gives the singular directions and the other
    half the coefficients; directions on which they disagree in sign count for nothing, and the
    mean of both is taken: noise of one half is independent of the other, so it is not taken for
    signal however large it is and whatever its distribution.

    Args:
        gradients: Mean gradients ``(out, in)`` of the two halves, asked for one by one: neither
            is kept here once it is whitened.
        input_gram: A, ``(in, in)`` float64, damped.
        output_gram: B, ``(out, out)`` float64, damped.
        estimator: How S is estimated.
    """
    halves = iter(gradients)
    first = next(halves)
    dtype = first.dtype
    outputs, inputs = whitening(output_gram, dtype), whitening(input_gram, dtype)
    first = inputs.down(outputs.down(first).T).T
    second = inputs.down(outputs.down(next(halves)).T).T
    noise = float((first - second).square_().sum(dtype=torch.float64)) / 4
    if estimator == "raw":
        whitened = (first + second).div_(2)
    elif estimator == "denoised":
        whitened = _shrunk((first + second).div_(2), noise)
    else:
        whitened = _confirmed(first, second).add_(_confirmed(second, first)).div_(2)
    signal = inner(first, second)
    del first, second
    norm = float(whitened.norm())
    return GradientStep(outputs.up(inputs.up(whitened.T).T), norm, signal, noise)


def _confirmed(half: Tensor, other: Tensor) -> Tensor:
    u, v = singular_directions(half)
    coefficients = (u * (other @ v)).sum(0).clamp(min=0)
    return (u * coefficients) @ v.T


def _shrunk(noisy: Tensor, noise: float) -> Tensor:
    """Optimal shrinkage of singular values for white noise of this total energy."""
    u, sigma, v = (part.to(noisy) for part in thin_svd(noisy.to(torch.float64)))
    m, n = sorted(noisy.shape)
    unit = math.sqrt(noise / m)  # sqrt(n) times the noise's standard deviation
    if unit == 0:
        return noisy
    return (u * (unit * shrink_singular_values(sigma / unit, m / n))) @ v.T


def shrink_singular_values(values: Tensor, aspect: float) -> Tensor:
    """Optimal shrinkage for the Frobenius loss; 0 below the Marchenko-Pastur edge.

    Args:
        values: ``(r,)`` singular values of signal plus noise, in units of ``sqrt(n)`` times the
            noise's standard deviation, for an ``(m, n)`` matrix with m <= n.
        aspect: ``m / n``.

    Returns:
        ``(r,)``; Gavish and Donoho 2017, equation (7).
    """
    above = values >= 1 + math.sqrt(aspect)
    y = values.where(above, 1 + math.sqrt(aspect))
    shrunk = ((y.square() - aspect - 1).square() - 4 * aspect).clamp(min=0).sqrt() / y
    return shrunk.where(above, 0)


@dataclass(frozen=True)
class HarmlessRange:
    """The perturbations of one layer that do no harm: a ball in whitened coordinates.

    Attributes:
        centre: Distance of the ball's centre from the trained weight, ``eta |S|``.
        radius: Radius of the ball: a perturbation at most this far from the centre does not
            raise the loss, when this layer alone is changed.
        lossless_rank: The smallest rank inside the ball, by the weights' whitened spectrum.
        signal: ``<S1, S2>``, the unbiased energy of the gradient.
        noise: Energy of the noise in its estimate.
    """

    centre: float
    radius: float
    lossless_rank: int
    signal: float
    noise: float


def step_length(signal: float, interaction: float = 1.0) -> float:
    """Length at which the quadratic model with the global term is lowest.

    All layers move the same loss at once, so the mean gradient of all layers together is one
    more direction of curvature, of strength ``interaction * signal``:
    ``dL(eta) = -signal eta + 1/2 (signal + interaction signal^2) eta^2``.

    Args:
        signal: ``<S1, S2>``, of one layer or summed over all that move.
        interaction: 1 for the empirical Fisher, whose own rank-one part this is.
    """
    return 1 / (1 + interaction * max(0.0, signal))


def harmless_range(
    singular_values: Tensor, norm: float, signal: float, noise: float
) -> HarmlessRange:
    """The harmless ball of a layer that is changed alone.

    With ``eta = step_length(signal)`` the loss at the centre is lower by ``1/2 eta signal``, and
    at a distance d from it higher by ``1/2 d^2`` again: the radius is ``sqrt(eta signal)``.

    Args:
        singular_values: ``(r,)``, of the whitened weight.
        norm: ``|S|`` of the step's estimate.
        signal: ``<S1, S2>``.
        noise: Energy of the noise in S.
    """
    eta = step_length(signal)
    radius = math.sqrt(eta * max(0.0, signal))
    return HarmlessRange(eta * norm, radius, lossless_rank(singular_values, radius), signal, noise)
