"""From a Conv2d's weight and statistics to its spatial and Tucker-2 factorizations of every rank.

All of them start from one decomposition: with the kernel's indices grouped as ``(out, s, t)``, the
weight is written as ``sum_r mix[o, r, t] directions[r, s]``. For the spatial forms s is an input
channel and the place along one axis, t the place along the other; for Tucker-2 s is the input
channel and t the place in the kernel.

The predicted loss change is ``1/2 tr(B Delta A Delta^T)``. For given directions the mix that
minimises it is a linear regression, exact for any A and B, and so is the output side of Tucker-2
(a reduced-rank regression). The directions are exact only where A is a Kronecker product of its
parts on s and t. It never is, so its marginals (the partial traces of A) stand in for them, and a
fixed small number of sweeps improves them in the exact metric. Whatever the surrogate misses is
part of the change that is reported: that of the resulting weight itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankfold.forms.conv.modules import (
    ConvForm,
    SpatialConv2d,
    TuckerConv2d,
    conv_factor_shapes,
)
from rankfold.forms.factors import Factors, balanced_pair, pivoted
from rankfold.forms.layer import take_flags
from rankfold.maths.linalg import RELATIVE_CUTOFF, damped, inverse_factor, symmetric_roots
from rankfold.maths.spectrum import quadratic_change, whitened_spectrum

# How often directions and mix take turns, and the steps of conjugate gradients for the directions
# in each turn. Two turns of three reach within 2 % of what 40 turns of ten do on ResNet-20.
SWEEPS = 2

GRADIENT_STEPS = 3

# Added to the input Gram while factors are looked for, as a share of its mean eigenvalue: where the
# Gram is singular (undamped, dead channels), a direction that was never seen stays as it was. The
# change of the factors is that of the Gram as it is.
RIDGE = 1e-8


@dataclass(frozen=True)
class SharedBasis:
    """``weight[o, s, t] ~ sum_{i < r} mix[o, i, t] directions[i, s]``, for every rank r at once.

    Attributes:
        directions: ``(R, s)`` float64, the most important first.
        coordinates: ``(out, R * t)``: the weight projected on the span of ``directions x t``, in
            coordinates where the input metric is the identity. Its first r * t columns are those
            of rank r.
        triangle: ``(R * t, R * t)`` lower triangular; ``mix_r @ triangle_r == coordinates_r``.
        changes: ``(R + 1,)`` predicted loss changes of the ranks 0..R.
    """

    directions: Tensor
    coordinates: Tensor
    triangle: Tensor
    changes: Tensor

    def part(self, rank: int) -> tuple[Tensor, Tensor]:
        """``coordinates`` and ``triangle`` of one rank."""
        columns = rank * (self.triangle.shape[0] // self.directions.shape[0])
        return self.coordinates[:, :columns], self.triangle[:columns, :columns]

    def mix(self, rank: int) -> Tensor:
        """The best mix of the first ``rank`` directions, ``(out, rank, t)``."""
        coordinates, triangle = self.part(rank)
        return _mixed(coordinates, triangle).view(len(coordinates), rank, -1)


def _mixed(coordinates: Tensor, triangle: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.solve_triangular(triangle, coordinates, upper=False, left=False)
    return solution


def shared_directions(weight: Tensor, input_gram: Tensor, output_gram: Tensor | None) -> Tensor:
    """Directions in s, the most important first, from A's marginals.

    The right singular vectors of the weight as an ``(out * t, s)`` matrix, whitened by A's marginal
    on s on one side and by ``B x`` A's marginal on t on the other.

    Args:
        weight: ``(out, s, t)``.
        input_gram: A, ``(s, t, s, t)``, damped as wanted.
        output_gram: B, ``(out, out)``, or None for the identity.

    Returns:
        ``(R, s)`` float64 with R = min(s, out * t).
    """
    out, _, taps = weight.shape
    marginal = torch.einsum("atbt->ab", input_gram)
    other = torch.einsum("sasb->ab", input_gram)
    scale = other.trace().clamp(min=torch.finfo(other.dtype).tiny)
    identity = torch.eye(out, dtype=other.dtype, device=other.device)
    rows = torch.kron(identity if output_gram is None else output_gram, other / scale)
    matrix = weight.transpose(1, 2).reshape(out * taps, -1)
    return whitened_spectrum(matrix, marginal, rows).right


def shared_basis(
    weight: Tensor,
    input_gram: Tensor,
    output_gram: Tensor,
    directions: Tensor | None = None,
) -> SharedBasis:
    """The best mix of given directions, for every number of them, in the exact metric.

    Args:
        weight: ``(out, s, t)``.
        input_gram: A, ``(s, t, s, t)`` float64, damped as wanted.
        output_gram: B, ``(out, out)`` float64, likewise.
        directions: ``(R, s)``; None for those of ``shared_directions``.
    """
    w = weight.detach().to(torch.float64)
    out, _, taps = w.shape
    if directions is None:
        directions = shared_directions(w, input_gram, output_gram)
    metric = _projected(directions, input_gram)  # of (direction, t) pairs
    lengths = metric.diagonal().view(-1, taps).mean(1).sqrt()
    scale = torch.where(lengths > 0, 1 / lengths.where(lengths > 0, 1), 0)
    directions = scale[:, None] * directions
    metric = scale.repeat_interleave(taps)[:, None] * metric * scale.repeat_interleave(taps)
    coloured = (w.reshape(out, -1) @ input_gram.reshape(w[0].numel(), -1)).view_as(w)
    products = torch.einsum("ost,rs->ort", coloured, directions).reshape(out, -1)
    triangle = _cholesky(metric)
    coordinates = torch.linalg.solve_triangular(triangle.T, products, upper=True, left=False)
    gains = ((output_gram @ coordinates) * coordinates).sum(0).view(-1, taps).sum(1)
    total = ((output_gram @ w.flatten(1)) * coloured.flatten(1)).sum()
    changes = 0.5 * (total - torch.cat([gains.new_zeros(1), gains.cumsum(0)]))
    return SharedBasis(directions, coordinates, triangle, changes.clamp(min=0))


def _projected(directions: Tensor, gram: Tensor) -> Tensor:
    """The Gram ``(s, t, s, t)`` on all pairs of a direction and a t, ``(R * t, R * t)``."""
    half = torch.tensordot(directions, gram, dims=([1], [0]))  # (R, t, s, t)
    whole = torch.einsum("rasb,qs->raqb", half, directions)
    side = len(directions) * gram.shape[1]
    return whole.reshape(side, side)


def _cholesky(metric: Tensor) -> Tensor:
    """Cholesky factor of a metric of unit vectors; a singular one gets a diagonal of rounding."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(metric)
    if int(info) == 0 and float(factor.diagonal().square().min()) > RELATIVE_CUTOFF:
        return factor
    # The first jitter does; more only where rounding has made the metric itself indefinite.
    identity = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    symmetric, jitter = (metric + metric.T) / 2, 10 * RELATIVE_CUTOFF
    while True:
        factor, info = torch.linalg.cholesky_ex(symmetric + jitter * identity)
        if int(info) == 0 or jitter > 1:
            return factor
        jitter *= 100


def improved_directions(
    weight: Tensor, input_gram: Tensor, output_gram: Tensor, directions: Tensor, mix: Tensor
) -> Tensor:
    """Better directions for a given mix, in the exact metric.

    The best ones solve ``sum_{t, u} (mix_t^T B mix_u) directions A_{u, t} = mix^T B W A``, a linear
    system of r x s unknowns: a few steps of conjugate gradients, preconditioned by the same
    equation with A's marginals. Each step lowers the predicted change.

    Args:
        weight: ``(out, s, t)`` float64.
        input_gram: A, ``(s, t, s, t)``.
        output_gram: B, ``(out, out)``.
        directions: ``(r, s)``, where the search starts.
        mix: ``(out, r, t)``.
    """
    side = weight[0].numel()
    gram = input_gram.reshape(side, side)
    weighted = torch.einsum("op,prt->ort", output_gram, mix)
    taps = torch.einsum("sasb->ab", input_gram)
    along = torch.einsum("oqu,tu->oqt", mix, taps / taps.trace())
    q_rows = inverse_factor(torch.einsum("ort,oqt->rq", weighted, along))
    q_columns = inverse_factor(torch.einsum("atbt->ab", input_gram))

    def pulled_back(delta: Tensor) -> Tensor:  # (out, s, t) -> (r, s)
        coloured = (delta.reshape(len(delta), side) @ gram).view_as(weight)
        products: Tensor = torch.einsum("ort,ost->rs", weighted, coloured)
        return products

    def preconditioned(residual: Tensor) -> Tensor:
        return q_rows @ (q_rows.T @ residual @ q_columns) @ q_columns.T

    residual = pulled_back(weight - torch.einsum("ort,rs->ost", mix, directions))
    step = preconditioned(residual)
    energy = (residual * step).sum()
    found, way = directions, step
    for _ in range(GRADIENT_STEPS):
        if not float(energy) > 0:
            break
        image = pulled_back(torch.einsum("ort,rs->ost", mix, way))
        length = energy / (way * image).sum()
        found = found + length * way
        residual = residual - length * image
        step = preconditioned(residual)
        before, energy = energy, (residual * step).sum()
        way = step + (energy / before) * way
    return found


def grouped(weight: Tensor, input_gram: Tensor, form: ConvForm) -> tuple[Tensor, Tensor]:
    """A conv's weight as ``(out, s, t)`` and its input Gram as ``(s, t, s, t)``, float64.

    Args:
        weight: ``(out, in, kh, kw)``.
        input_gram: ``(in * kh * kw, in * kh * kw)``.
        form: Which indices are s and which t.
    """
    w, gram = weight.detach().to(torch.float64), input_gram.to(torch.float64)
    out, in_, height, width = w.shape
    if form == "tucker":
        s, t = in_, height * width
    elif form == "vertical":
        s, t = in_ * height, width
    else:
        s, t = in_ * width, height
        w = w.transpose(2, 3)
        six = gram.view(in_, height, width, in_, height, width)
        gram = six.permute(0, 2, 1, 3, 5, 4)
    return w.reshape(out, s, t), gram.reshape(s, t, s, t)


@dataclass(frozen=True)
class SpatialFactors:
    """Factors of ``SpatialConv2d``, float64.

    Attributes:
        first: ``(rank, in, kh, 1)`` or ``(rank, in, 1, kw)``.
        second: ``(out * taps, rank)``, or ``(out * taps - rank, rank)`` when pivoted.
        order: ``(out * taps,)`` when pivoted, else None.
        change: Predicted loss change of the weight that they make.
    """

    first: Tensor
    second: Tensor
    order: Tensor | None
    change: float

    def module(self, layer: nn.Conv2d) -> SpatialConv2d:
        """The module that takes the layer's place: its dtype, device, bias and geometry."""
        first, second = self.first.to(layer.weight), self.second.to(layer.weight)
        module = SpatialConv2d(first, second, layer, layer.bias, _on(layer, self.order))
        take_flags(module, layer)
        return module


@dataclass(frozen=True)
class TuckerFactors:
    """Factors of ``TuckerConv2d``, float64.

    Attributes:
        first: ``(in, r_in)``, or ``(in - r_in, r_in)`` when pivoted; None where r_in is ``in``.
        core: ``(r_out, r_in, kh, kw)``.
        last: ``(out, r_out)``, or ``(out - r_out, r_out)``; None where r_out is ``out``.
        first_order: ``(in,)`` when ``first`` is pivoted, else None.
        last_order: ``(out,)`` when ``last`` is pivoted, else None.
        change: Predicted loss change of the weight that they make.
    """

    first: Tensor | None
    core: Tensor
    last: Tensor | None
    first_order: Tensor | None
    last_order: Tensor | None
    change: float

    def module(self, layer: nn.Conv2d) -> TuckerConv2d:
        """The module that takes the layer's place: its dtype, device, bias and geometry."""
        module = TuckerConv2d(
            None if self.first is None else self.first.to(layer.weight),
            self.core.to(layer.weight),
            None if self.last is None else self.last.to(layer.weight),
            layer,
            layer.bias,
            _on(layer, self.first_order),
            _on(layer, self.last_order),
        )
        take_flags(module, layer)
        return module


def _on(layer: nn.Conv2d, order: Tensor | None) -> Tensor | None:
    return None if order is None else order.to(layer.weight.device)


def conv_factors(
    weight: Tensor,
    input_gram: Tensor,
    output_gram: Tensor,
    form: ConvForm,
    ranks: tuple[int, ...],
    *,
    pivot: bool = True,
    sweeps: int = SWEEPS,
) -> SpatialFactors | TuckerFactors:
    """The best factors found of one conv, in a form and at given ranks.

    Args:
        weight: ``(out, in, kh, kw)``.
        input_gram: A, ``(in * kh * kw, in * kh * kw)``, damped as wanted.
        output_gram: B, ``(out, out)``, likewise.
        form: The form.
        ranks: ``(rank,)``, or ``(input rank, output rank)`` for ``tucker``.
        pivot: Leave identity rows out.
        sweeps: How often the directions are improved.

    Raises:
        ValueError: The weight has no such ranks.
    """
    conv_factor_shapes(tuple(weight.shape), form, ranks, pivot)
    if form == "tucker":
        first, last = ranks
        return _tucker_factors(weight, input_gram, output_gram, first, last, pivot, sweeps)
    return _spatial_factors(weight, input_gram, output_gram, form, ranks[0], pivot, sweeps)


def _spatial_factors(
    weight: Tensor,
    input_gram: Tensor,
    output_gram: Tensor,
    form: ConvForm,
    rank: int,
    pivot: bool,
    sweeps: int,
) -> SpatialFactors:
    w, gram = grouped(weight, damped(input_gram, RIDGE), form)
    b = output_gram.to(torch.float64)
    basis = shared_basis(w, gram, b, shared_directions(w, gram, b)[:rank])
    for _ in range(sweeps):
        directions = improved_directions(w, gram, b, basis.directions, basis.mix(rank))
        basis = shared_basis(w, gram, b, directions)
    mix, directions = basis.mix(rank), basis.directions
    rows = mix.transpose(1, 2).reshape(-1, rank)  # (out * t, rank)
    factors = _product(rows, directions, pivot)
    out, in_, height, width = weight.shape
    matrix = (rows @ directions).view(out, -1, in_, height if form == "vertical" else width)
    axes = (0, 2, 3, 1) if form == "vertical" else (0, 2, 1, 3)
    kernel = (height, 1) if form == "vertical" else (1, width)
    return SpatialFactors(
        factors.right.reshape(rank, in_, *kernel),
        factors.left,
        factors.order,
        _change(matrix.permute(axes), weight, input_gram, output_gram),
    )


def _tucker_factors(
    weight: Tensor,
    input_gram: Tensor,
    output_gram: Tensor,
    first: int,
    last: int,
    pivot: bool,
    sweeps: int,
) -> TuckerFactors:
    w, gram = grouped(weight, damped(input_gram, RIDGE), "tucker")
    out, in_, taps = w.shape
    b = output_gram.to(torch.float64)
    root, _ = symmetric_roots(b)
    whitened = torch.einsum("op,pst->ost", root, w)
    basis = shared_basis(w, gram, b, shared_directions(w, gram, b)[:first])
    for _ in range(sweeps if first < in_ else 0):
        # What the best outputs of this rank see of the weight, in coordinates where B is identity.
        u, _, _ = torch.linalg.svd(root @ basis.coordinates, full_matrices=False)
        seen = torch.einsum("op,ost->pst", u[:, :last], whitened)
        identity = torch.eye(last, dtype=b.dtype, device=b.device)
        inner = shared_basis(seen, gram, identity, basis.directions)
        directions = improved_directions(seen, gram, identity, inner.directions, inner.mix(first))
        basis = shared_basis(w, gram, b, directions)
    spectrum = whitened_spectrum(basis.coordinates, None, b)
    outputs = spectrum.left[:, :last]
    core = _mixed(spectrum.right[:last], basis.triangle)  # (last, first * taps)
    directions = basis.directions
    matrix = torch.einsum("or,rqt,qi->oit", outputs, core.view(last, first, taps), directions)
    change = _change(matrix.view_as(weight), weight, input_gram, output_gram)

    first_end = last_end = None
    if last < out:
        last_end = _product(outputs, core, pivot)
        core = last_end.right
    else:
        core = outputs @ core
    core = core.view(last, first, taps).transpose(0, 1).reshape(first, last * taps)
    if first < in_:
        first_end = _product(directions.T, core, pivot)
        core = first_end.right
    else:
        core = directions.T @ core
    core = core.view(first, last, taps).transpose(0, 1)
    return TuckerFactors(
        None if first_end is None else first_end.left,
        core.reshape(last, first, *weight.shape[2:]),
        None if last_end is None else last_end.left,
        None if first_end is None else first_end.order,
        None if last_end is None else last_end.order,
        change,
    )


def _product(left: Tensor, right: Tensor, pivot: bool) -> Factors:
    return pivoted(left, right) if pivot else balanced_pair(left, right)


def _change(found: Tensor, weight: Tensor, input_gram: Tensor, output_gram: Tensor) -> float:
    delta = found.flatten(1) - weight.detach().to(torch.float64).flatten(1)
    return quadratic_change(delta, input_gram.to(torch.float64), output_gram.to(torch.float64))
