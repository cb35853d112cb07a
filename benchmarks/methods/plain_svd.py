"""Methods that need no more than a diagonal weighting: plain SVD, FWSVD, ASVD, LASER.

- SVD: Eckart and Young 1936; one ratio for all layers.
- FWSVD: Hsu et al. 2022, arXiv 2207.00112: rows weighted by the root of the sum of their weights'
  Fisher information, from labels' gradients. One ratio for all layers.
- ASVD: Yuan et al. 2023, arXiv 2312.05821: columns scaled by mean |x| to the power alpha = 0.5
  (the authors' value); ranks by the threshold search (STRS) on the loss of few examples
  (``sensitivity``) over the ratios .4 to .9. The published list begins at .4; .1 to .3 are added
  so that every size can be reached.
- LASER: Sharma et al. 2023, arXiv 2312.13558: plain SVD of chosen layers at chosen ranks, picked
  by validation loss. It is published as a way to higher accuracy without a target size; here
  layers and ranks are taken in the order of their loss until the size is reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.methods.fisher import Fisher, fishers
from benchmarks.methods.low_rank import spectra, uniform
from benchmarks.methods.method import AtSize, Method, Study
from benchmarks.methods.sensitivity import Sensitivity, threshold_search
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.model.layer_matrix import MatrixLayer, call_input, input_rows
from rankfold.tasks.evaluation import on_device

ALPHA = 0.5
ASVD_RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
LASER_RATIOS = (0.8, 0.6, 0.4, 0.2, 0.1, 0.05)


def svd(study: Study) -> AtSize:
    return uniform(study, spectra(study, lambda name: (None, None)))


def fwsvd(study: Study) -> AtSize:
    rows = {name: row_weights(found) for name, found in fishers(study)}
    return uniform(study, spectra(study, lambda name: (None, rows[name])))


def row_weights(fisher: Fisher) -> Tensor:
    """The row sums of the Fisher information of the weights as a diagonal ``(out, out)``."""
    return torch.diag(fisher.diagonal.sum(1))


def asvd(study: Study) -> AtSize:
    return _asvd(study, Sensitivity.on(study, "calibration"))


def asvd_selection(study: Study) -> AtSize:
    return _asvd(study, Sensitivity.on(study, "selection"))


def _asvd(study: Study, sensitivity: Sensitivity) -> AtSize:
    scales = mean_absolute_inputs(study)
    found = spectra(study, lambda name: (torch.diag(scales[name] ** (2 * ALPHA)), None))
    return threshold_search(study, found, sensitivity, ASVD_RATIOS)


def laser(study: Study) -> AtSize:
    found = spectra(study, lambda name: (None, None))
    return threshold_search(study, found, Sensitivity.on(study, "selection"), LASER_RATIOS)


def mean_absolute_inputs(study: Study) -> dict[str, Tensor]:
    """Mean of ``|x|`` of each input of each layer over the calibration part, ``(in,)`` float64."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def saw(
        name: str, layer: MatrixLayer, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        for rows in input_rows(layer, call_input(args, kwargs)):
            total = rows.abs().sum(0).double()
            sums[name] = sums[name] + total if name in sums else total
            counts[name] = counts.get(name, 0) + len(rows)

    collected = study.collected
    with ExitStack() as stack:
        for name, layer in study.layers.items():
            hook = partial(saw, name, layer)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.enter_context(evaluation_mode(collected.model))
        for batch in _batches(study):
            collected.task.batch_loss(collected.model, batch)
    return {name: total / counts[name] for name, total in sums.items()}


def _batches(study: Study) -> Iterator[object]:
    part = study.collected.parts["calibration"]
    batches = part.batches()
    for examples in study.progress.track(batches, "mean absolute inputs", len(batches)):
        yield on_device(part.collate(examples), study.collected.model)


METHODS = {
    "svd": Method("SVD", "Eckart and Young 1936", svd),
    "fwsvd": Method("FWSVD", "Hsu et al. 2022, arXiv 2207.00112", fwsvd),
    "asvd": Method("ASVD", "Yuan et al. 2023, arXiv 2312.05821", asvd),
    "asvd-selection": Method(
        "ASVD, ranks by selection", "Yuan et al. 2023, arXiv 2312.05821", asvd_selection
    ),
    "laser": Method("LASER, to a size", "Sharma et al. 2023, arXiv 2312.13558", laser),
}
