"""Passes that wait for each other give what passes one after the other give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rankfold import InputError
from rankfold.data.parts import as_part
from rankfold.machine import offload
from rankfold.machine.offload import Offload
from rankfold.machine.weights import move_to_files
from rankfold.tasks import in_step as stepping
from rankfold.tasks.evaluation import Evaluation, evaluate
from rankfold.tasks.in_step import in_step
from rankfold.tasks.supervised import CausalLM, UserLoss
from tests.small_models import tiny_llama, token_windows

BATCHES = 5


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors lie in files, too, and nothing is known of any model."""
    monkeypatch.setattr(offload, "SMALL", 0)
    monkeypatch.setattr(stepping, "_checked", {})


class Noted(nn.Module):
    """A block that notes when it was called; ``kept`` holds something of a pass on its model."""

    def __init__(self, number: int, model: Blocks) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.number = number
        vars(self)["model"] = model

    def forward(self, x: Tensor) -> Tensor:
        self.model.calls.append(self.number)
        if self.number == 1 and self.model.fails(x):
            raise ValueError("not this one")
        here = self.model.kept if self.model.forgetful else x
        self.model.kept = x
        found: Tensor = self.linear(here)
        return found


class Blocks(nn.Module):
    """Blocks of linear layers."""

    def __init__(self, *, forgetful: bool = False, worst: float = torch.inf) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.calls: list[int] = []
        self.forgetful, self.worst = forgetful, worst
        self.kept = torch.zeros(1, 4)
        self.blocks = nn.ModuleList(Noted(number, self) for number in range(3))

    def fails(self, x: Tensor) -> bool:
        return bool(self.kept.isnan().any()) or bool(x.abs().max() > self.worst)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        for block in self.blocks:
            x = block(x)
        return x


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    found: Tensor = model(batch).square().mean(1)
    return found


def evaluated(model: nn.Module) -> Evaluation:
    torch.manual_seed(1)
    part = as_part("selection", list(torch.randn(BATCHES, 4)))
    return evaluate(model, UserLoss(loss), part, batch_size=1)


def in_files(model: nn.Module, folder: Path) -> nn.Module:
    move_to_files(model, Offload(folder, weights=True))
    return model


def groups(calls: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of the same block: which, and how many."""
    start = 0
    for place in range(1, len(calls) + 1):
        if place == len(calls) or calls[place] != calls[start]:
            yield calls[start], place - start
            start = place


def test_all_batches_go_through_a_block_before_the_next(tmp_path: Path) -> None:
    plain, model = Blocks(), in_files(Blocks(), tmp_path)
    wanted = evaluated(plain)
    assert list(groups(plain.calls)) == [(number, 1) for number in (0, 1, 2)] * BATCHES
    for _ in range(2):
        model.calls.clear()
        assert torch.equal(evaluated(model).losses, wanted.losses)
    assert list(groups(model.calls)) == [(0, BATCHES), (1, BATCHES), (2, BATCHES)]


def test_as_many_at_once_as_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_files(Blocks(), tmp_path)
    wanted = evaluated(model)
    monkeypatch.setattr(stepping, "HELD", 2 * 4 * 4)  # of two batches' inputs
    model.calls.clear()
    assert torch.equal(evaluated(model).losses, wanted.losses)
    assert list(groups(model.calls)) == [*[(0, 2), (1, 2), (2, 2)] * 2, (0, 1), (1, 1), (2, 1)]


def test_a_model_that_keeps_something_on_itself_runs_as_ever(tmp_path: Path) -> None:
    wanted = evaluated(Blocks(forgetful=True))
    model = in_files(Blocks(forgetful=True), tmp_path)
    assert torch.equal(evaluated(model).losses, wanted.losses)
    assert not torch.equal(wanted.losses, evaluated(Blocks()).losses)
    assert [*stepping._checked.values()] == [False]


def test_an_error_ends_all_passes_and_names_the_batch(tmp_path: Path) -> None:
    model = in_files(Blocks(), tmp_path)
    evaluated(model)
    model.worst = 0.0
    with pytest.raises(InputError, match="not this one"):
        evaluated(model)
    model.worst = torch.inf
    evaluated(model)  # no hook is left
    assert not any("forward" in vars(block) for block in model.blocks)


def test_a_pass_with_a_state_of_its_own_waits_for_none() -> None:
    model = Blocks()

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(torch.ones(1, 4))

    with torch.no_grad():
        found = list(in_step(model, [run, run]))
    assert model.calls == [0, 1, 2, 0, 1, 2]
    assert found[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model(tmp_path: Path, dtype: torch.dtype) -> None:
    plain, model = tiny_llama(dtype), in_files(tiny_llama(dtype), tmp_path)
    part = as_part("held_out", token_windows(6))
    wanted, found = (evaluate(m, CausalLM(), part, batch_size=1) for m in (plain, model))
    assert torch.equal(found.losses, wanted.losses)
    assert torch.equal(found.correct, wanted.correct)
    assert [*stepping._checked.values()] == [True]
