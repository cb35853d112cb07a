"""Outputs of a pivoted factor: pivots, and the other outputs as combinations of them, in order.

The way that autograd, tracing and autocast can follow writes three tensors of the outputs' size:
joined, in order, with their bias. Without gradients, both products of many rows write into one
buffer. Few rows take the first way: there the calls take longer than what is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from rankfold.forms.storage import features_in_order, plus_bias

_PLAIN = (Tensor, nn.Parameter)  # others may stand for what no memory holds
MANY = 1 << 17  # outputs from which on the buffer was faster on a CPU


def pivoted_features(
    input: Tensor, pivots: Tensor, others: Sequence[Tensor], order: Tensor, bias: Tensor | None
) -> Tensor:
    """Map ``(..., in)`` to ``(..., out)``.

    Args:
        input: ``(..., in)``.
        pivots: ``(k1 + .. + kn, in)``, the pivot rows of all blocks.
        others: Of each block ``(rows - k, k)``, its other rows by its pivots.
        order: ``(out,)`` integers: which of [pivots; others of the first block; ..] each output is.
        bias: ``(out,)`` or None.
    """
    ranks = [factor.shape[1] for factor in others]
    if not writes_into_a_buffer(len(order), input, pivots, *others):
        hidden = functional.linear(input, pivots)
        parts = torch.split(hidden, ranks, dim=-1) if len(ranks) > 1 else [hidden]
        rest = [functional.linear(part, one) for part, one in zip(parts, others, strict=True)]
        outputs = features_in_order(torch.cat([hidden, *rest], dim=-1), order)
        return plus_bias(outputs, bias)
    rows = input.reshape(-1, input.shape[-1])
    buffer = rows.new_empty(len(rows), len(order))
    first, *rest = torch.split(buffer, [sum(ranks), *(len(one) for one in others)], dim=1)
    torch.mm(rows, pivots.T, out=first)
    for part, factor, place in zip(torch.split(first, ranks, dim=1), others, rest, strict=True):
        torch.mm(part, factor.T, out=place)
    outputs = buffer.index_select(1, order).view(*input.shape[:-1], len(order))
    return plus_bias(outputs, bias)


def writes_into_a_buffer(outputs: int, *tensors: Tensor) -> bool:
    """Whether products of these tensors are written into one: nobody follows what is done.

    Not where outputs are few, autograd records, a compiler or an exporter traces, autocast chooses
    types, or a transform (``torch.func``, forward derivatives) or a subclass of tensors stands in
    between.

    Args:
        outputs: Of one row.
        tensors: The input, ``(..., in)``, and the factors.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call,attr-defined,unused-ignore]
        return False
    given = tensors[0]
    if given.dim() == 0 or given.numel() * outputs < MANY * given.shape[-1]:
        return False
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        return False
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    kind = given.device.type
    if kind not in ("cpu", "cuda") or torch.is_autocast_enabled(kind):
        return False
    return all(type(one) in _PLAIN for one in tensors)
