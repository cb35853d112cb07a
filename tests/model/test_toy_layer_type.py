"""A type of layer that rankfold does not know, added by one registration and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.model.unpack import register_layer_type, unpack, unregister_layer_type
from tests.small_models import same_state, state


class Sideways(nn.Module):
    """A matrix stored ``(in, out)``, twice as large as it is used."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.doubled = nn.Parameter(2 * torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, values: Tensor) -> Tensor:
        return values @ (self.doubled / 2)


def as_linear(module: nn.Module) -> nn.Module | None:
    if not isinstance(module, Sideways):
        return None
    plain = nn.Linear(*module.doubled.shape, bias=False).to(module.doubled)
    with torch.no_grad():
        plain.weight.copy_(module.doubled.T / 2)
    return plain.train(module.training)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Sideways(10, 24)
        self.head = nn.Linear(24, 4)

    def forward(self, values: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(values)))


@pytest.fixture
def rule() -> Iterator[None]:
    register_layer_type(as_linear)
    yield
    unregister_layer_type(as_linear)


def _result() -> tuple[nn.Module, rankfold.Result]:
    torch.manual_seed(0)
    model = Net().eval()
    values = torch.randn(200, 10)
    data = list(zip(values, model(values).argmax(-1).tolist(), strict=True))
    return model, rankfold.lossless(model, data, size=0.8, gradient_step=False, include=["body"])


@pytest.mark.usefixtures("rule")
def test_it_is_factorized_saved_reloaded_and_exported(tmp_path: Path) -> None:
    model, result = _result()
    before = state(model)
    assert result.report["unpacked"] == ["body"]
    (entry,) = result.report["layers"]
    assert (entry["name"], entry["shape"]) == ("body", [24, 10])
    assert entry["rank"] is not None
    assert same_state(model, before) and isinstance(model.body, Sideways)
    again = rankfold.load(result.save(tmp_path / "out"), Net())
    values = torch.randn(5, 10)
    assert torch.equal(again(values), result.model(values))
    assert rankfold.export(tmp_path / "out", tmp_path / "pairs", to="pairs", model=Net()).folder


def test_without_it_the_matrix_is_listed() -> None:
    torch.manual_seed(0)
    assert unpack(Net()).names == []
