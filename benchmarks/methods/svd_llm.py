"""SVD-LLM and what was built on it: its update, V2's ratios, Swift-SVD, BALF, PIFA.

- SVD-LLM: Wang et al. 2024, arXiv 2403.07378, section 3.1: the weight is whitened by the Cholesky
  factor of the input Gram, so that a singular value cut off is the error of the outputs. Any root
  of the Gram gives the same product; here the symmetric one. One ratio for all layers. The
  authors recommend this alone for sizes of .7 and above.
- with update: section 3.2 as in the public code (``whitening_local_update``): block by block, the
  left factor is the least-squares solution for the dense layer's outputs on inputs that come from
  the blocks compressed before; 16 windows of text, or 256 other examples.
- SVD-LLM V2: Wang et al. 2025, arXiv 2503.12340, algorithm 1: within each group of layers of one
  type the share removed is proportional to 1 / log(L), L the Frobenius norm of the output error
  at the target ratio. A group is: the same shape and the same last name. Rounding aside all
  groups keep the target share.
- Swift-SVD: Qi et al. 2026, arXiv 2604.01609: the same optimum by one eigendecomposition of the
  output Gram ``W A W^T``. One ratio for all layers: of its dynamic ranks no formula was at hand.
- BALF: Gonzalez Martinez 2025, arXiv 2509.25136: whitening by the eigendecomposition of the input
  Gram of unfolded patches, ranks by a Lagrangian of the summed *relative* energies (each layer's
  total is 1). Here the same integer program is solved exactly.
- PIFA: Zhao et al. 2025, arXiv 2501.19090: k rows of the product and the coefficients of the
  others, k (out + in - k) parameters, on top of SVD-LLM, without and with its update.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.methods.low_rank import (
    Spectra,
    build,
    curve,
    energy_curves,
    spectra,
    uniform,
    within_ratios,
)
from benchmarks.methods.method import AtSize, Compressed, Method, Study
from rankfold.forms.factors import balanced_pair, pivoted
from rankfold.forms.low_rank.fit import low_rank_module
from rankfold.forms.storage import Storage
from rankfold.maths.linalg import descending_eigh
from rankfold.maths.spectrum import Spectrum, tail_energies
from rankfold.model.layer_matrix import MatrixLayer
from rankfold.model.replace import with_replaced
from rankfold.search.allocate import RankPlan, best_within_cost, uniform_within_cost
from rankfold.statistics.recorder import collect_statistics

UPDATE_EXAMPLES, UPDATE_WINDOWS = 256, 16
LOWEST_KEPT = 0.05  # share that V2's ratios leave of a layer at least
RELATIVE_CUTOFF = 1e-10


def whitened(study: Study) -> Spectra:
    return spectra(study, lambda name: (study.input_gram(name), None))


def svd_llm(study: Study) -> AtSize:
    return uniform(study, whitened(study))


def pifa(study: Study) -> AtSize:
    return uniform(study, whitened(study), "pivoted")


def svd_llm_update(study: Study) -> AtSize:
    return _updated(study, "pair")


def pifa_update(study: Study) -> AtSize:
    return _updated(study, "pivoted")


def _updated(study: Study, form: Storage) -> AtSize:
    found = whitened(study)
    curves = energy_curves(study, found, form)
    return lambda size: update(
        study, found, uniform_within_cost(curves, size * study.factorizable), form
    )


def update(study: Study, found: Spectra, plan: RankPlan, form: Storage) -> Compressed:
    """The model of a plan, every left factor fitted on inputs from the blocks before it."""
    collected = study.collected
    part = study.calibration(UPDATE_WINDOWS if study.language else UPDATE_EXAMPLES)
    modules: dict[str, nn.Module] = {}
    for block in study.progress.track(study.blocks, "updates", len(study.blocks)):
        partial = with_replaced(collected.model, modules)
        layers: dict[str, MatrixLayer] = {
            name: partial.get_submodule(name)  # type: ignore[misc]
            for name in block
            if plan[name].rank is not None
        }
        if not layers:
            continue
        statistics = collect_statistics(partial, collected.task, part, layers, curvature=None)
        for name, layer in layers.items():
            right = found[name].right[: plan[name].rank]
            gram = statistics[name].input_gram.to(torch.float64)
            left = fitted_left(study.weights[name], right, gram)
            factors = balanced_pair(left, right) if form == "pair" else pivoted(left, right)
            modules[name] = low_rank_module(layer, factors)
    return Compressed.of(with_replaced(collected.model, modules))


def fitted_left(weight: Tensor, right: Tensor, input_gram: Tensor) -> Tensor:
    """The left factor U ``(out, k)`` of the smallest ``|(W - U R) X|``, float64.

    Args:
        weight: W ``(out, in)``.
        right: R ``(k, in)``.
        input_gram: ``X X^T``, up to a scale, ``(in, in)``.
    """
    of_right = input_gram @ right.T
    inverse = torch.linalg.pinv(right @ of_right, rtol=RELATIVE_CUTOFF, hermitian=True)
    fitted: Tensor = weight.double() @ of_right @ inverse
    return fitted


def svd_llm_v2(study: Study) -> AtSize:
    found = whitened(study)
    curves = energy_curves(study, found, "pair")
    rows = study.collected.seen.rows
    examples = len(study.collected.parts["calibration"].examples)
    groups: dict[object, list[str]] = defaultdict(list)
    for name, weight in study.weights.items():
        groups[name.rpartition(".")[2], tuple(weight.shape)].append(name)

    def at(size: float) -> Compressed:
        ratios: dict[str, float] = {}
        for group in groups.values():
            losses = {}
            for name in group:
                out, in_ = study.weights[name].shape
                rank = max(1, int(size * out * in_ / (out + in_)))
                tail = float(tail_energies(found[name].singular_values)[rank])
                losses[name] = math.sqrt(tail * rows[name] * examples)
            ratios |= kept_shares(losses, size)
        plan = within_ratios(curves, ratios, size * study.factorizable)
        return build(study, found, plan, "pair")

    return at


def kept_shares(losses: Mapping[str, float], size: float) -> dict[str, float]:
    """SVD-LLM V2, algorithm 1: the share that each layer of a group keeps.

    Args:
        losses: Norm of each layer's output error at the target ratio.
        size: Share to keep of the group.
    """
    if min(losses.values()) <= 1:  # 1 / log is not positive: the rule says nothing
        return dict.fromkeys(losses, size)
    scores = {name: 1 / math.log(loss) for name, loss in losses.items()}
    unit = len(scores) * (1 - size) / sum(scores.values())
    return {name: max(LOWEST_KEPT, 1 - unit * score) for name, score in scores.items()}


def swift_svd(study: Study) -> AtSize:
    found = {
        name: output_spectrum(weight, study.input_gram(name))
        for name, weight in study.weights.items()
    }
    return uniform(study, found)


def output_spectrum(weight: Tensor, input_gram: Tensor) -> Spectrum:
    """The best factors for the outputs, ``V_k (V_k^T W)``, V the eigenvectors of ``W A W^T``."""
    w = weight.double()
    energies, vectors = descending_eigh(w @ input_gram @ w.T)
    rank = min(w.shape)
    left = vectors[:, :rank]
    return Spectrum(energies[:rank].sqrt(), left, left.T @ w)


def balf(study: Study) -> AtSize:
    found = whitened(study)
    curves = {
        name: curve(study, name, "pair", relative_energies(spectrum))
        for name, spectrum in found.items()
    }
    return lambda size: build(
        study, found, best_within_cost(curves, size * study.factorizable).plan, "pair"
    )


def relative_energies(spectrum: Spectrum) -> Tensor:
    """Share of the energy that each rank 1..r cuts off, ``(r,)``."""
    tails = tail_energies(spectrum.singular_values)
    return tails[1:] / tails[0].clamp(min=torch.finfo(tails.dtype).tiny)


METHODS = {
    "svd-llm": Method("SVD-LLM", "Wang et al. 2024, arXiv 2403.07378", svd_llm),
    "svd-llm-update": Method(
        "SVD-LLM, updated", "Wang et al. 2024, arXiv 2403.07378", svd_llm_update
    ),
    "svd-llm-v2": Method("SVD-LLM V2", "Wang et al. 2025, arXiv 2503.12340", svd_llm_v2),
    "swift-svd": Method("Swift-SVD, one ratio", "Qi et al. 2026, arXiv 2604.01609", swift_svd),
    "balf": Method("BALF", "Gonzalez Martinez 2025, arXiv 2509.25136", balf, models="vision"),
    "pifa": Method("PIFA on SVD-LLM", "Zhao et al. 2025, arXiv 2501.19090", pifa),
    "pifa-update": Method(
        "PIFA on SVD-LLM, updated", "Zhao et al. 2025, arXiv 2501.19090", pifa_update
    ),
}
