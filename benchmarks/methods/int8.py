"""int8 weights, per output channel: what a user may choose instead of low rank.

Symmetric rounding to nearest with one float32 scale for each row, as torchao's
``Int8WeightOnlyConfig`` does it for Linear layers; simulated here (rounded, and multiplied back to
float32) because that has no kernel for convs. The bytes are those of int8 values and their scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.methods.method import AtSize, Compressed, Method, Study
from rankfold.files.tensors import model_sizes
from rankfold.model.replace import with_replaced

LEVELS = 127


def row_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``(rows, ...)`` as int8 values of its shape and a scale ``(rows, 1, ...)``.

    The largest of each row becomes 127.
    """
    largest = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True)
    scales = largest.clamp(min=torch.finfo(weight.dtype).tiny) / LEVELS
    return (weight / scales).round().clamp(-LEVELS, LEVELS).to(torch.int8), scales


def round_rows(weight: Tensor) -> Tensor:
    """Each row at 255 evenly spaced values, symmetric about 0; the same shape and type."""
    values, scales = row_scales(weight.detach())
    return values.to(scales.dtype) * scales


def rounded(model: nn.Module, names: Sequence[str]) -> Compressed:
    """A copy of the model with the matrices of these modules, or their factors, in int8."""
    twin = with_replaced(model, {})
    saved = 0
    for name in names:
        for parameter in twin.get_submodule(name).parameters():
            if parameter.dim() < 2:
                continue
            with torch.no_grad():
                parameter.copy_(round_rows(parameter))
            saved += (parameter.element_size() - 1) * parameter.numel() - 4 * len(parameter)
    sizes = model_sizes(model)
    return Compressed(twin, sizes["parameters"], sizes["bytes"] - saved)


def int8(study: Study) -> AtSize:
    made = rounded(study.collected.model, list(study.layers))
    return lambda size: made


METHODS = {
    "int8": Method("int8 weights", "torchao's int8 weight-only", int8, "outside", sized=False),
}
