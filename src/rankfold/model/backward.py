"""A backward pass whose gradients are used one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass
class Which:
    """Which of a pass' losses is gone back from."""

    loss: int = 0


def each_gradient(
    roots: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    use: Callable[[int, Tensor], None],
    *,
    gradients: Sequence[Tensor] | None = None,
    retain_graph: bool = False,
) -> None:
    """Call ``use(place, gradient)`` for each weight as soon as its gradient is there.

    Together the gradients take as much memory as the model; here none outlives its call. The
    ``grad`` of the weights is not touched.

    Args:
        roots: A scalar loss, or tensors whose gradients are known; those that depend on no weight
            are let through.
        weights: Leaves that require a gradient. Those that the loss doesn't depend on are left out.
        use: What is done with the gradient of ``weights[place]``.
        gradients: Of the roots, where they are no scalars.
        retain_graph: Whether another backward pass follows.
    """
    starts = [roots] if isinstance(roots, Tensor) else list(roots)
    if not (weights and any(root.requires_grad for root in starts)):
        return

    def take(place: int, gradient: Tensor) -> Tensor:
        use(place, gradient)
        return gradient.new_zeros(()).expand_as(gradient)  # what autograd keeps of it

    with ExitStack() as stack:
        for place, weight in enumerate(weights):
            stack.callback(weight.register_hook(partial(take, place)).remove)
        torch.autograd.grad(
            starts, list(weights), gradients, retain_graph=retain_graph, allow_unused=True
        )
