"""Unstructured pruning at equal bytes: what a user may choose instead of low rank.

- magnitude: in each layer the smallest weights go (Han et al. 2015, arXiv 1506.02626), one share
  for all layers.
- Wanda: Sun et al. 2023, arXiv 2306.11695, equation 1: in each output's row the smallest
  ``|w| |x|_2`` go, one share for all layers, from calibration activations; no update.

A pruned matrix is counted as its nonzero values in float32 and one bit for each weight that says
where they are. At a size s it takes s times the dense bytes, so s - 1/32 of the weights stay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.methods.method import AtSize, Compressed, Method, Study
from rankfold.files.tensors import model_sizes
from rankfold.model.replace import with_replaced

VALUE_BITS = 32


def largest(scores: Tensor, share: float) -> Tensor:
    """A mask of the largest scores along the last axis, ``share`` of them rounded down."""
    kept = int(share * scores.shape[-1])
    places = scores.topk(kept, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, True)


def _pruned(study: Study, mask_of: Callable[[str, float], Tensor], size: float) -> Compressed:
    share = size - 1 / VALUE_BITS
    weights: dict[str, Tensor] = {}
    dropped = bits = 0
    for name, weight in study.weights.items():
        mask = mask_of(name, share)
        weights[name] = weight * mask
        dropped += int((~mask).sum())
        bits += weight.numel()
    model = study.collected.model
    sizes = model_sizes(model)
    smaller = sizes["bytes"] - dropped * VALUE_BITS // 8 + -(-bits // 8)
    return Compressed(with_replaced(model, {}, weights), sizes["parameters"] - dropped, smaller)


def magnitude(study: Study) -> AtSize:
    def mask(name: str, share: float) -> Tensor:
        weight = study.weights[name]
        return largest(weight.abs().flatten(), share).view_as(weight)

    return lambda size: _pruned(study, mask, size)


def wanda(study: Study) -> AtSize:
    norms = {name: study.input_gram(name).diagonal().sqrt() for name in study.weights}

    def mask(name: str, share: float) -> Tensor:
        return largest(study.weights[name].abs() * norms[name], share)

    return lambda size: _pruned(study, mask, size)


METHODS = {
    "magnitude": Method(
        "magnitude pruning", "Han et al. 2015, arXiv 1506.02626", magnitude, "outside"
    ),
    "wanda": Method("Wanda pruning", "Sun et al. 2023, arXiv 2306.11695", wanda, "outside"),
}
