"""What is computed twice is the same, or what draws is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import rankfold
from rankfold.data.parts import Part, as_part
from rankfold.errors import InputError
from rankfold.tasks.agreement import Teacher
from rankfold.tasks.recognise import recognise_task
from rankfold.tasks.repeated import refuse_random
from rankfold.tasks.supervised import Classification, Regression, UserLoss

INPUTS = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 3


class Net(nn.Module):
    """Two layers, with something between."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu, outputs: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, outputs)
        self.between = between

    def forward(self, values: Tensor) -> Tensor:
        return self.second(self.between(self.first(values)))


class Noise(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values + 0.01 * torch.randn_like(values)


class Counting(nn.Module):
    """Gives another output at each call, without drawing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        return values * self.calls


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Net(outputs=6), Net(forgotten, outputs=6), Net()])

    def forward(self, values: Tensor) -> Tensor:
        for block in self.blocks:
            values = block(values)
        return values


def forgotten(values: Tensor) -> Tensor:
    return functional.dropout(values, 0.3)


def part(collate: Any = None) -> Part:
    return as_part("calibration", list(zip(INPUTS, LABELS, strict=True)), collate)


RANDOM: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout forgotten": (lambda: Net(forgotten), r"the model \(Net\) gives two outputs"),
    "noise": (lambda: Net(Noise()), r"the module between \(Noise\) gives two outputs"),
    "a state": (lambda: Net(Counting()), r"the module between \(Counting\)"),
    "deep inside": (Deep, r"the module blocks\.1 \(Net\)"),
    "in half precision": (lambda: Net(forgotten).bfloat16(), r"the model \(Net\)"),
    "always training": (
        lambda: Net(lambda x: functional.alpha_dropout(x, 0.2, training=True)),
        r"the model \(Net\)",
    ),
}


@pytest.mark.parametrize("kind", ["classification", "teacher"])
@pytest.mark.parametrize("name", RANDOM)
def test_a_model_that_draws_in_evaluation_mode_is_named(name: str, kind: str) -> None:
    make, said = RANDOM[name]
    torch.manual_seed(0)
    model = make().train()
    batch = (INPUTS[:1].to(next(model.parameters()).dtype), LABELS[:1])
    task = Classification() if kind == "classification" else Teacher([model], batch)
    with pytest.raises(InputError, match=said):
        refuse_random(model, task, part())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


STEADY: dict[str, Callable[[], nn.Module]] = {
    "plain": Net,
    "dropout as a module": lambda: Net(nn.Dropout(0.5)),
    "batch norm": lambda: Net(nn.BatchNorm1d(8)),
    "bfloat16": lambda: Net().bfloat16(),
    "its own seed": lambda: Net(
        lambda x: x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    ),
}


@pytest.mark.parametrize("name", STEADY)
def test_a_model_that_gives_the_same_is_taken_as_it_is(name: str) -> None:
    model = STEADY[name]().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    refuse_random(model, Classification(), part())
    refuse_random(
        model, Teacher([model], (INPUTS[:1].to(model.first.weight.dtype), LABELS[:1])), part()
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


def test_nan_is_another_matter() -> None:
    model = Net(lambda values: values * float("nan"))
    refuse_random(model, Classification(), part())


def hides(rows: list[Any]) -> tuple[Tensor, Tensor]:
    inputs = torch.stack([values for values, _ in rows])
    return inputs * (torch.rand_like(inputs) > 0.2), torch.tensor([int(y) for _, y in rows])


def mixes_labels(rows: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([values for values, _ in rows]), torch.randint(3, (len(rows),))


@pytest.mark.parametrize("collate", [hides, mixes_labels])
def test_a_collate_function_that_draws_is_named(collate: Any) -> None:
    with pytest.raises(InputError, match="collate function makes another batch"):
        refuse_random(Net(), Classification(), part(collate))


def test_a_loss_that_draws_is_named() -> None:
    task = UserLoss(lambda model, batch: model(batch[0]).sum(1) + torch.randn(len(batch[0])))
    with pytest.raises(InputError, match=r"the loss function \(loss=\) that draws"):
        refuse_random(Net(), task, part())


def test_small_noise_beside_large_losses_is_found() -> None:
    values = [(x, float(y) * 100) for x, y in zip(INPUTS, LABELS, strict=True)]
    with pytest.raises(InputError, match="losses for the same examples are others"):
        refuse_random(Net(Noise(), 1), Regression(), as_part("calibration", values))


def test_a_run_refuses_what_draws_before_any_work() -> None:
    data = list(zip(INPUTS.repeat(3, 1) + torch.arange(60)[:, None], LABELS.repeat(3), strict=True))
    with pytest.raises(InputError, match="A dropout that is called as a function"):
        rankfold.lossless(Net(forgotten), data, size=0.9)
    metric = rankfold.Metric("luck", lambda model, batch: torch.rand(len(batch[0])))
    with pytest.raises(InputError, match="the metric luck of the same example"):
        rankfold.lossless(Net(), data, size=0.9, metrics=[metric])


def test_the_task_of_three_things_is_named_with_what_was_found() -> None:
    triples = as_part("calibration", [(torch.tensor(1), INPUTS[0], LABELS[0])] * 4)
    with pytest.raises(InputError, match=r"whose examples are \(int64 \(1,\), float32 \(1, 6\)"):
        recognise_task(triples, None)


def test_rounding_of_losses_near_zero_is_no_draw() -> None:
    noise = iter([1e-7, 2e-7] * 9)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).sum(1) * 0 + next(noise)

    refuse_random(Net(), UserLoss(loss), part())


def test_noise_in_tiny_values_is_found() -> None:
    model = Net(lambda values: 1e-4 * (values + 0.1 * torch.randn_like(values)), 1)
    with torch.no_grad():
        model.second.bias.zero_()
    values = as_part(
        "calibration", [(x, 1e-5 * float(y)) for x, y in zip(INPUTS, LABELS, strict=True)]
    )
    with pytest.raises(InputError, match=r"the model \(Net\) gives two outputs"):
        refuse_random(model, Regression(), values)
