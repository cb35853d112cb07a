"""KFAC-SVD and LEMS (ICML 2026, ``lems-svd/lems``).

Whitening by both K-FAC factors, with the settings of the public code: gradient norms clipped to
0.1 to 10 times their mean, the first and last eighth of a sequence's gradients left out, A shrunk
by 0.1 and B by 0.3 (vision 0.7) to a multiple of the identity. One ratio for all layers, or LEMS:
a layer's sensitivity is the share of energy that a rank cuts off, scaled to the divergence
(temperature 0.6) that the whole model shows with this layer alone at a tenth of its break-even
rank; ranks of 0.1 to 0.95 of break-even or dense; in language models 0.3 or more for sizes of .5
and above, multiples of 8, and a weight of 6 falling linearly to 1 along the depth (``harmonicv2``
with alpha 0 and gamma 5, the preset). The published search tunes alpha and gamma in 10 trials
more; here the preset is used as it is. The integer program, which the code gives to Gurobi, is
solved exactly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.methods.gradients import Gradients, clipped_output_grams
from benchmarks.methods.low_rank import Spectra, build, curve, spectra, uniform
from benchmarks.methods.method import AtSize, Compressed, Method, Study
from benchmarks.methods.sensitivity import Sensitivity
from rankfold.forms.curve import Curve
from rankfold.maths.linalg import damped
from rankfold.maths.spectrum import Spectrum, tail_energies
from rankfold.search.allocate import best_within_cost

INPUT_SHRINKAGE, OUTPUT_SHRINKAGE, VISION_OUTPUT_SHRINKAGE = 0.1, 0.3, 0.7
TEMPERATURE = 0.6
REFERENCE, LOWEST, HIGHEST = 0.1, 0.1, 0.95  # shares of the break-even rank
LOWEST_LANGUAGE = 0.3
MULTIPLE = 8
DEPTH_WEIGHT = 5.0


def shrunk(gram: Tensor, share: float) -> Tensor:
    """``(1 - share) M + share mean(M) I``, divided by 1 - share: no scale matters here."""
    return damped(gram, share / (1 - share))


def two_sided(study: Study, source: Gradients) -> Spectra:
    grams = study.once(source, lambda: clipped_output_grams(study, source))
    output = VISION_OUTPUT_SHRINKAGE if study.vision else OUTPUT_SHRINKAGE
    return spectra(
        study,
        lambda name: (
            shrunk(study.input_gram(name), INPUT_SHRINKAGE),
            shrunk(grams[name], output),
        ),
    )


def kfac_svd(study: Study) -> AtSize:
    return uniform(study, two_sided(study, Gradients.of(study)))


def kfac_svd_lems(study: Study) -> AtSize:
    return _lems(study, two_sided(study, Gradients.of(study)), "selection")


def kfac_svd_lems_calibration(study: Study) -> AtSize:
    return _lems(study, two_sided(study, Gradients.of(study)), "calibration")


def kfac_svd_lems_labels(study: Study) -> AtSize:
    return _lems(study, two_sided(study, Gradients(sampled=False, seed=study.seed)), "selection")


def _lems(study: Study, found: Spectra, part: Literal["calibration", "selection"]) -> AtSize:
    sensitivity = Sensitivity.on(study, part)
    depths = [name for block in study.blocks for name in block]
    level = {name: place for place, block in enumerate(study.blocks) for name in block}
    curves: dict[str, Curve] = {}
    for name in study.progress.track(depths, "each layer alone", len(depths)):
        spectrum = found[name]
        even = break_even_rank(*study.weights[name].shape)
        reference = max(1, int(REFERENCE * even))
        measured = sensitivity.divergence(
            {name: spectrum.truncated(reference)}, temperature=TEMPERATURE
        )
        weight = 1.0
        if not study.vision:
            last = max(1, len(study.blocks) - 1)
            weight += DEPTH_WEIGHT * (last - level[name]) / last
        changes = weight * measured * scaled_energies(spectrum, reference)
        curves[name] = curve(study, name, "pair", changes)

    def at(size: float) -> Compressed:
        lowest = LOWEST_LANGUAGE if not study.vision and size >= 0.5 else LOWEST
        allowed = {
            name: _between(one, study.weights[name].shape, lowest, study.language)
            for name, one in curves.items()
        }
        plan = best_within_cost(allowed, size * study.factorizable).plan
        return build(study, found, plan, "pair")

    return at


def break_even_rank(out: int, in_: int) -> int:
    """The largest rank whose pair of factors is no larger than the matrix."""
    return out * in_ // (out + in_)


def scaled_energies(spectrum: Spectrum, reference: int) -> Tensor:
    """Energy that each rank 1..r cuts off as a share of what the reference rank does, ``(r,)``."""
    tails = tail_energies(spectrum.singular_values)
    return tails[1:] / torch.maximum(tails[reference], 1e-6 * tails[0])


def _between(one: Curve, shape: torch.Size, lowest: float, multiples: bool) -> Curve:
    """The choices that LEMS looks at."""
    even = break_even_rank(*shape)
    ranks = one.ranks
    kept = (ranks >= max(1, int(lowest * even))) & (ranks < max(2, int(HIGHEST * even)))
    if multiples:
        kept &= ranks % MULTIPLE == 0
    return replace(
        one, ranks=ranks[kept], costs=one.costs[kept], changes=one.changes[kept].contiguous()
    )


SOURCE = "ICML 2026, github.com/lems-svd/lems"
METHODS = {
    "kfac-svd": Method("KFAC-SVD", SOURCE, kfac_svd),
    "kfac-svd-lems": Method("KFAC-SVD + LEMS", SOURCE, kfac_svd_lems),
    "kfac-svd-lems-calibration": Method(
        "KFAC-SVD + LEMS, ranks by calibration", SOURCE, kfac_svd_lems_calibration
    ),
    "kfac-svd-lems-labels": Method(
        "KFAC-SVD + LEMS, Fisher of the labels", SOURCE, kfac_svd_lems_labels, needs_labels=True
    ),
}
