"""The invariant: a model that can't be worked on is refused before any work, and the message names
what was met and what to do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import TensorDataset

import rankfold
from rankfold import InputError
from rankfold.model.replace import with_replaced
from rankfold.model.unpack import unpack
from tests.small_models import mlp, pairs, seeded


def _pruned(times: int = 1) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    for name in ("weight", "bias")[:times]:
        prune.l1_unstructured(model[2], name, amount=1)
    return model


def _meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(6, 5))


def _half_meta() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    model[1].running_mean = torch.zeros(8, device="meta")
    return model


def _with(**attributes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = mlp()
        for name, value in attributes.items():
            setattr(model.first, name, value)
        return model

    return make


CASES: list[tuple[Callable[[], nn.Module], str]] = [
    (_pruned, r"layer 2 \(Linear\) is pruned: its weight .*prune\.remove\(layer, 'weight'\)"),
    (lambda: _pruned(2), r"its weight, bias .*'weight'\); .*prune\.remove\(layer, 'bias'\)"),
    (_meta, r"layer 0 \(Linear\) has no values: its weight, bias lie on the device meta"),
    (_half_meta, r"layer 1 \(BatchNorm1d\) has no values: its running_mean lie"),
    (lambda: nn.Sequential(nn.LazyLinear(5)), r"layer 0 \(LazyLinear\) isn't initialized yet"),
    (lambda: nn.Sequential(nn.LazyConv2d(5, 3)), "isn't initialized yet.*Run the model once"),
    (_with(lock=threading.Lock()), r"copied.*lock of first \(Linear\) is a lock: .*Delete it"),
    (_with(worker=(x for x in ())), r"worker of first \(Linear\) is a generator"),
    (_with(parts={"a": [threading.Event()]}), r"parts of first \(Linear\) is a dict"),
]


@pytest.mark.parametrize(("make", "message"), CASES)
def test_it_is_named_before_any_work(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    with pytest.raises(InputError, match=message):
        rankfold.lossless(model, pairs(40), size=0.8)


def test_a_pruned_model_is_taken_once_it_is_made_permanent() -> None:
    model = _pruned(2).eval()
    prune.remove(model[2], "weight")
    prune.remove(model[2], "bias")
    assert rankfold.lossless(model, pairs(60), size=0.9).report["task"] == "classification"


class Shows(nn.Module):
    """Keeps what it computed, as models do that show their attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 5)
        self.kept: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        self.kept = torch.tanh(self.first(values))
        return self.last(self.kept)


def test_a_model_that_keeps_what_it_computed_is_taken() -> None:
    model = seeded(1, Shows)
    values = torch.stack([x for x, _ in pairs(80)])
    labels = model(values).argmax(1)
    assert model.kept is not None and model.kept.grad_fn is not None
    result = rankfold.lossless(model, TensorDataset(values, labels), size=0.9)
    assert result.model.first is not model.first
    model(values)
    twin = with_replaced(model, {})
    assert torch.equal(twin.kept, model.kept) and twin.kept.grad_fn is None


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, values: Tensor) -> Tensor:
        if values.shape[-1] != 6:
            raise ValueError("six values are wanted")
        return self.last(self.first(values))


def test_an_error_of_the_model_is_told_as_it_is() -> None:
    examples = [(torch.rand(7), n % 5) for n in range(40)]
    with pytest.raises(InputError) as caught:
        rankfold.lossless(Picky(), examples, size=0.8)
    message = str(caught.value)
    assert "ValueError: six values are wanted (test_unsuitable.py, line" in message
    assert "float32 (1, 7)" in message
    assert "belongs" not in message


class OnlyShort(nn.Module):
    """Fails at one example that is not the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, values: Tensor) -> Tensor:
        assert float(values.max()) < 50, "too large"
        return self.last(self.first(values))


@pytest.mark.parametrize("place", [7, 25, 38])
def test_an_error_at_a_later_example_is_told_likewise(place: int) -> None:
    examples = [(torch.rand(6), n % 5) for n in range(45)]
    examples[place][0][3] = 99
    data = rankfold.Data(examples[:20], examples[20:30], examples[30:])
    part = {7: "calibration", 25: "selection", 38: "held-out"}[place]
    said = rf"a batch of (\d+ examples of )?the {part} part, .*AssertionError: too large"
    with pytest.raises(InputError, match=said):
        rankfold.lossless(OnlyShort(), data, size=0.8)


class Asks(nn.Module):
    """Asks a packed layer for what no other has."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last = nn.Linear(6, 5)

    def forward(self, values: Tensor) -> Tensor:
        rows = values[:, None]
        size = self.attention.kdim + self.attention.vdim
        return self.last(self.attention(rows, rows, rows)[0][:, 0] * size)


def test_an_error_of_ours_does_not_blame_the_user() -> None:
    assert unpack(Asks()).names == ["attention"]
    with pytest.raises(InputError, match=r"fault of rankfold.*'UnpackedAttention'|'kdim'") as found:
        rankfold.lossless(Asks(), pairs(40), size=0.8)
    assert "That is a fault of rankfold, not of the model or the data" in str(found.value)
