"""Gradients used one by one equal those that autograd gives together."""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.model.backward import each_gradient


def test_each_gradient_is_that_of_autograd_and_grad_stays_as_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, unused = (
        torch.randn(3, 3, generator=generator, requires_grad=True) for _ in range(3)
    )
    stands = torch.ones(3, 3)
    first.grad = stands
    stepped: list[Tensor] = []
    first.register_post_accumulate_grad_hook(stepped.append)  # as an optimizer in backward does
    x = torch.randn(3, generator=generator)
    loss = (second @ torch.tanh(first @ torch.tanh(first @ x))).square().sum()
    wanted = torch.autograd.grad(loss, [first, second], retain_graph=True)
    found: dict[int, Tensor] = {}
    for retain in (True, False):
        found.clear()
        each_gradient(loss, [first, second, unused], found.__setitem__, retain_graph=retain)
        assert sorted(found) == [0, 1]
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
    assert first.grad is stands
    assert torch.equal(stands, torch.ones(3, 3))
    assert second.grad is None
    assert not stepped
    assert not first._backward_hooks


def test_a_loss_without_a_graph_has_no_gradients() -> None:
    weight = torch.ones(2, requires_grad=True)

    def never(place: int, gradient: Tensor) -> None:
        raise AssertionError(f"called for {place}")

    each_gradient(torch.tensor(1.0), [weight], never)
