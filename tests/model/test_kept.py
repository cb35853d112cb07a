"""A user's model has its values after a run, whatever its code does meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.errors import InputError
from rankfold.model.kept import KeptModel
from tests.small_models import SmallMLP, pairs, seeded

DATA = pairs(48)


class Counting(SmallMLP):
    """Changes a buffer and makes a new one of another, which its output doesn't depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("sums", torch.zeros(1))

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        self.sums = values.detach().sum(0)
        return super().forward(values)


class Drifting(SmallMLP):
    """Moves its weights, by less than a second look would see."""

    def forward(self, values: Tensor) -> Tensor:
        with torch.no_grad():
            self.second.weight.data.mul_(1 + 1e-7)
        return super().forward(values)


def _hooked() -> nn.Module:
    model = SmallMLP()

    def hook(module: Any, args: Any, output: Tensor) -> None:
        module.weight.data[0, 0] += 1e-7

    model.second.register_forward_hook(hook)
    return model


def test_buffers_that_a_forward_changes_are_put_back_and_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = seeded(3, Counting)
    tensors = dict(model.named_buffers())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rankfold.lossless(model, DATA, size=0.8, effort="fast")
    said = capsys.readouterr().err
    assert "calls" in said and "sums" in said and "put back" in said
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(tensor is tensors[name] for name, tensor in model.named_buffers())


@pytest.mark.parametrize("make", [Drifting, _hooked])
def test_weights_that_a_run_changes_are_put_back_and_there_is_no_result(
    make: Callable[[], nn.Module],
) -> None:
    model = seeded(3, make)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"weights of the model changed[^:]*:\n  second\.weight"):
        rankfold.lossless(model, DATA, size=0.8, effort="fast")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_model_that_the_user_changes_after_prepare_is_refused() -> None:
    model = seeded(3, SmallMLP)
    prepared = rankfold.prepare(model, DATA, effort="fast")
    with torch.no_grad():
        model.second.weight[0, 0] += 1
    changed = model.second.weight.clone()
    with pytest.raises(InputError, match=r"changed since it was prepared:\n  second\.weight"):
        prepared.lossless(0.8)
    assert torch.equal(model.second.weight, changed)  # it is the user's change


def test_what_raises_inside_leaves_the_model_as_it_was() -> None:
    model = SmallMLP()
    weight = model.second.weight
    model.second.weight.data[0, 0] = float("nan")
    kept = KeptModel(model, lambda values: values)
    with pytest.raises(KeyError), kept.as_it_was():
        model.second.weight = nn.Parameter(torch.zeros(2))
        raise KeyError
    assert model.second.weight is weight and weight.isnan().sum() == 1
    with kept.as_it_was():
        pass  # NaN is no change
