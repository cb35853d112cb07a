"""A backward pass whose gradients are used one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor


def each_gradient(
    loss: Tensor,
    weights: Sequence[Tensor],
    use: Callable[[int, Tensor], None],
    *,
    retain_graph: bool = False,
) -> None:
    """Call ``use(place, gradient)`` for each weight as soon as its gradient is there.

    Together the gradients take as much memory as the model; here none outlives its call. The
    ``grad`` of the weights is not touched.

    Args:
        loss: A scalar; one that depends on no weight is let through.
        weights: Leaves that require a gradient. Those that the loss doesn't depend on are left out.
        use: What is done with the gradient of ``weights[place]``.
        retain_graph: Whether another backward pass follows.
    """
    if not loss.requires_grad:
        return

    def take(place: int, gradient: Tensor) -> Tensor:
        use(place, gradient)
        return gradient.new_zeros(()).expand_as(gradient)  # what autograd keeps of it

    with ExitStack() as stack:
        for place, weight in enumerate(weights):
            stack.callback(weight.register_hook(partial(take, place)).remove)
        torch.autograd.grad(loss, list(weights), retain_graph=retain_graph, allow_unused=True)
