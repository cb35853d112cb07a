"""What the conv forms offer at each size: the candidates that no other one beats, as a curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankfold.forms.conv.fit import (
    RIDGE,
    grouped,
    shared_basis,
)
from rankfold.forms.conv.modules import (
    CONV_FORMS,
    ConvForm,
    conv_factor_flops,
    conv_factor_parameters,
)
from rankfold.forms.curve import Curve
from rankfold.forms.problem import Calls
from rankfold.forms.storage import Storage
from rankfold.maths.linalg import (
    Damping,
    damped,
)
from rankfold.maths.spectrum import Spectrum, whitened_spectrum
from rankfold.objective import Cost
from rankfold.statistics.grams import damped_grams, expected_grams
from rankfold.statistics.layer_statistics import LayerStatistics


def conv_curve(
    layer: nn.Conv2d,
    weight: Tensor,
    statistics: LayerStatistics,
    spectrum: Spectrum,
    damping: Damping,
    storage: Storage,
    cost: Cost,
    calls: Calls,
) -> Curve:
    """What the forms of a conv with more than one tap offer.

    Choices that take more operations than the dense conv are left out, also where parameters are
    counted: behind a stride, or with identity rows that are multiplied, a form may store less and
    take longer.

    Their changes are those of the damped Grams. They are brought to the scale of the other curves
    by what the plain truncations of the same layer show at the same damped change: the share of it
    that the Grams as measured confirm.

    Args:
        layer: The conv.
        weight: Its weight ``(out, in * kh * kw)``, moved by the step.
        statistics: Its statistics, with gradients.
        spectrum: Its spectrum under the damped Grams.
        damping: Of both Grams.
        storage: Of the factors.
        cost: What the curve counts.
        calls: Of one example.
    """
    a, b = damped_grams(statistics, damping)
    pivoted = storage == "pivoted"
    dense_flops = 2 * calls.rows * layer.weight.numel()

    def flops(form: ConvForm, ranks: tuple[int, ...]) -> int:
        sizes = calls.image_sizes
        return sum(conv_factor_flops(layer, form, ranks, *size, pivoted) for size in sizes)

    found = conv_candidates(
        weight.view_as(layer.weight),
        a,
        b,
        pivot=pivoted,
        allowed=lambda form, ranks: flops(form, ranks) <= dense_flops,
    )
    changes = _as_measured(np.array([c.change for c in found]), spectrum, statistics)
    in_flops = cost == "flops"
    costs = [flops(c.form, c.ranks) if in_flops else c.parameters for c in found]
    return Curve(
        ranks=torch.tensor([candidate.ranks[0] for candidate in found], dtype=torch.int64),
        costs=torch.tensor(costs, dtype=torch.int64),
        changes=torch.from_numpy(changes),
        dense_cost=dense_flops if in_flops else layer.weight.numel(),
        forms=CONV_FORMS,
        form_of=torch.tensor([CONV_FORMS.index(c.form) for c in found], dtype=torch.int64),
        second_ranks=torch.tensor([(*c.ranks, 0)[1] for c in found], dtype=torch.int64),
    )


def _as_measured(
    changes: NDArray[np.float64], spectrum: Spectrum, statistics: LayerStatistics
) -> NDArray[np.float64]:
    """Changes under damped Grams, ``(n,)``, times the share that the measured ones confirm."""
    regular = spectrum.truncation_changes()[1:-1].flip(0)  # rising
    measured = spectrum.changes_under(*expected_grams(statistics))[1:-1].flip(0)
    if not len(regular):
        return changes
    share = (measured / regular.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
    confirmed = np.interp(changes, regular.cpu().numpy(), share.cpu().numpy())
    return np.asarray(changes * confirmed, dtype=np.float64)


# Input ranks of Tucker-2 among which candidates are listed; each costs a decomposition.
TUCKER_INPUT_RANKS = 32


@dataclass(frozen=True)
class ConvCandidate:
    """One factorization that a conv could get.

    Attributes:
        form: Its form.
        ranks: ``(rank,)``, or ``(input rank, output rank)`` for ``tucker``.
        parameters: Parameters of its factors, bias not counted.
        change: Predicted loss change, before any sweep: ``conv_factors`` finds at most this.
    """

    form: ConvForm
    ranks: tuple[int, ...]
    parameters: int
    change: float


def conv_candidates(
    weight: Tensor,
    input_gram: Tensor,
    output_gram: Tensor,
    forms: Sequence[ConvForm] = CONV_FORMS,
    *,
    pivot: bool = True,
    allowed: Callable[[ConvForm, tuple[int, ...]], bool] = lambda form, ranks: True,
) -> list[ConvCandidate]:
    """All factorizations worth having of one conv, by rising parameters and falling change.

    Every rank of the spatial forms is looked at, and for Tucker-2 every output rank at up to
    ``TUCKER_INPUT_RANKS`` input ranks. Those that another one beats in both numbers, and those that
    save nothing, are left out. A kernel of one pixel has no candidates, one of a single row or
    column no spatial ones.

    Args:
        weight: ``(out, in, kh, kw)``.
        input_gram: A, ``(in * kh * kw, in * kh * kw)``, damped as wanted.
        output_gram: B, ``(out, out)``, likewise.
        forms: Those to look at.
        pivot: Count the parameters of pivoted factors.
        allowed: Whether a form with its ranks may be taken at all.
    """
    found: list[ConvCandidate] = []
    b = output_gram.to(torch.float64)
    _, _, height, width = weight.shape
    for form in forms:
        if min(height, width) == 1 and (form != "tucker" or height * width == 1):
            continue
        w, gram = grouped(weight, damped(input_gram, RIDGE), form)
        changes = (_tucker_changes if form == "tucker" else _spatial_changes)(w, gram, b)
        for ranks, change in changes.items():
            if not allowed(form, ranks):
                continue
            count = conv_factor_parameters(tuple(weight.shape), form, ranks, pivot)
            found.append(ConvCandidate(form, ranks, count, change))
    return _not_beaten([c for c in found if c.parameters < weight.numel()])


def _spatial_changes(w: Tensor, gram: Tensor, b: Tensor) -> dict[tuple[int, ...], float]:
    changes = shared_basis(w, gram, b).changes[1:].tolist()
    return {(rank,): change for rank, change in enumerate(changes, start=1)}


def _tucker_changes(w: Tensor, gram: Tensor, b: Tensor) -> dict[tuple[int, ...], float]:
    _, _, taps = w.shape
    basis = shared_basis(w, gram, b)
    directions = len(basis.directions)
    count = min(directions, TUCKER_INPUT_RANKS)
    found: dict[tuple[int, ...], float] = {}
    for first in sorted({round(directions * i / count) for i in range(1, count + 1)}):
        coordinates, _ = basis.part(first)
        tail = whitened_spectrum(coordinates, None, b).truncation_changes()
        changes = (basis.changes[first] + tail).tolist()
        for last in range(1, len(changes)):
            if last <= first * taps and first <= last * taps:
                found[first, last] = changes[last]
    return found


def _not_beaten(candidates: list[ConvCandidate]) -> list[ConvCandidate]:
    kept: list[ConvCandidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.parameters, c.change)):
        if not kept or candidate.change < kept[-1].change:
            kept.append(candidate)
    return kept
