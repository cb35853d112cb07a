"""A form that rankfold does not know, added by one registration and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import rankfold
from rankfold.errors import ArtifactError
from rankfold.forms.curve import Choice, Curve
from rankfold.forms.layer import FactorizedLayer, take_flags
from rankfold.forms.problem import Calls, LayerProblem, Size
from rankfold.forms.registry import (
    form_named,
    form_names,
    register_form,
    unregister_form,
)
from rankfold.forms.storage import STORAGES, Storage
from rankfold.maths.spectrum import quadratic_change, whitened_spectrum
from rankfold.model.layer_matrix import MatrixLayer
from rankfold.model.stock_layers import linear
from rankfold.statistics.grams import damped_grams, expected_grams

SIDE = 12


class DiagonalPlusLowRank(FactorizedLayer):
    """A square Linear as a diagonal plus a product of two factors."""

    def __init__(self, diagonal: Tensor, left: Tensor, right: Tensor, bias: Tensor | None):
        super().__init__()
        self.diagonal = nn.Parameter(diagonal.contiguous())
        self.left = nn.Parameter(left.contiguous())
        self.right = nn.Parameter(right.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        mixed = functional.linear(functional.linear(input, self.right), self.left, self.bias)
        return input * self.diagonal + mixed

    def dense_matrix(self) -> Tensor:
        return torch.diag(self.diagonal) + self.left @ self.right

    def to_dense(self) -> nn.Linear:
        return linear(self.dense_matrix().detach(), self.bias)

    def to_stock(self) -> nn.Sequential:
        return nn.Sequential(self.to_dense())


@dataclass(frozen=True)
class ToyFactors:
    diagonal: Tensor
    left: Tensor
    right: Tensor

    def dense(self, layer: MatrixLayer) -> Tensor:
        return (torch.diag(self.diagonal) + self.left @ self.right).to(layer.weight)

    def module(self, layer: MatrixLayer) -> DiagonalPlusLowRank:
        factors = (f.to(layer.weight) for f in (self.diagonal, self.left, self.right))
        module = DiagonalPlusLowRank(*factors, layer.bias)
        take_flags(module, layer)
        return module


class ToyForm:
    names: tuple[str, ...] = ("diagonal-plus-low-rank",)
    storages: tuple[Storage, ...] = STORAGES
    setting: str | None = None

    def fits(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and layer.in_features == layer.out_features

    def curve(self, problem: LayerProblem) -> tuple[Curve, Any]:
        assert problem.statistics is not None
        grams = expected_grams(problem.statistics)
        weight = problem.weight.double()
        side = len(weight)
        changes = [
            quadratic_change(
                self._parts(problem, rank).dense(problem.layer).double() - weight, *grams
            )
            for rank in range(1, side)
        ]
        ranks = torch.arange(1, side)
        curve = Curve(
            ranks=ranks,
            costs=(side + 2 * side * ranks) * problem.price,
            changes=torch.tensor(changes, dtype=torch.float64),
            dense_cost=side * side * problem.price,
            forms=self.names,
        )
        return curve, None

    def kept(self, state: Any, keep: Callable[[Tensor], Tensor]) -> Any:
        return state

    def factors(
        self, problem: LayerProblem, choice: Choice, state: Any, keep: Callable[[Tensor], Tensor]
    ) -> ToyFactors:
        (rank,) = choice.ranks
        return self._parts(problem, rank)

    def _parts(self, problem: LayerProblem, rank: int) -> ToyFactors:
        assert problem.statistics is not None
        weight = problem.weight.double()
        rest = weight - torch.diag(weight.diagonal())
        grams = damped_grams(problem.statistics, problem.damping)
        left, right = whitened_spectrum(rest, *grams).factors(rank)
        return ToyFactors(weight.diagonal(), left, right)

    def size(
        self, layer: MatrixLayer, name: str, ranks: Sequence[int], storage: Storage, calls: Calls
    ) -> Size:
        side = len(layer.weight)
        kept = side + 2 * side * ranks[0]
        return Size(kept, 2 * calls.rows * kept)

    def empty(
        self, layer: MatrixLayer, name: str, ranks: Sequence[int], pivoted: bool
    ) -> DiagonalPlusLowRank:
        side, (rank,) = len(layer.weight), ranks
        if not self.fits(layer) or not 1 <= rank < side:
            raise ValueError(f"a {tuple(layer.weight.shape)} weight has no {name} of rank {rank}")
        new = layer.weight.new_empty
        return DiagonalPlusLowRank(new(side), new(side, rank), new(rank, side), layer.bias)


@pytest.fixture
def toy() -> Iterator[ToyForm]:
    form = ToyForm()
    register_form(form)
    yield form
    unregister_form(form)


class Net(nn.Module):
    """One layer that is near to a diagonal and rank 2, one that is not square."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(SIDE, SIDE)
        self.head = nn.Linear(SIDE, 4)
        with torch.no_grad():
            low = torch.randn(SIDE, 2) @ torch.randn(2, SIDE)
            self.square.weight.copy_(torch.diag(torch.linspace(3, 5, SIDE)) + low)

    def forward(self, values: Tensor) -> Tensor:
        return self.head(torch.tanh(self.square(values)))


def _result() -> tuple[Net, rankfold.Result]:
    torch.manual_seed(0)
    model = Net().eval()
    values = torch.randn(200, SIDE)
    data = [(x, int(y)) for x, y in zip(values, model(values).argmax(-1), strict=True)]
    return model, rankfold.lossless(
        model, data, size=0.75, gradient_step=False, include=["square"], size_of="factorizable"
    )


def test_it_is_allocated_built_saved_reloaded_reported_and_exported(
    toy: ToyForm, tmp_path: Path
) -> None:
    model, result = _result()
    (entry,) = result.report["layers"]
    assert entry["form"] == toy.names[0]
    assert entry["factorized_parameters"] == SIDE + 2 * SIDE * entry["rank"] <= 0.75 * SIDE**2
    assert result.report["factorized"]["parameters"] == sum(
        p.numel() for p in result.model.parameters()
    )
    values = torch.randn(5, SIDE)
    assert isinstance(result.model.square, DiagonalPlusLowRank)
    changed = (result.model(values) - model(values)).norm() / model(values).norm()
    assert 0 < changed < 0.2
    folder = result.save(tmp_path / "out")
    assert json.loads((folder / "rankfold.json").read_text())["layers"][0]["form"] == toy.names[0]
    again = rankfold.load(folder, model=Net())
    assert isinstance(again.square, DiagonalPlusLowRank)
    assert torch.equal(again(values), result.model(values))
    dense = rankfold.export(folder, tmp_path / "dense", to="dense", model=Net())
    stock = Net()
    stock.load_state_dict(_tensors(dense.folder))
    torch.testing.assert_close(stock(values), result.model(values))


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_without_it_its_folders_are_refused_by_name(tmp_path: Path) -> None:
    form = ToyForm()
    register_form(form)
    try:
        folder = _result()[1].save(tmp_path / "out")
    finally:
        unregister_form(form)
    with pytest.raises(ArtifactError, match=r"expected a form of square among"):
        rankfold.load(folder, model=Net())


def test_a_damaged_rank_of_it_is_refused(toy: ToyForm, tmp_path: Path) -> None:
    folder = _result()[1].save(tmp_path / "out")
    file = folder / "rankfold.json"
    manifest = json.loads(file.read_text())
    manifest["layers"][0]["rank"] = SIDE
    file.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"square.*has no diagonal-plus-low-rank of rank 12"):
        rankfold.load(folder, model=Net())


def test_a_name_is_registered_once(toy: ToyForm) -> None:
    with pytest.raises(ValueError, match="'diagonal-plus-low-rank' is registered already"):
        register_form(ToyForm())
    assert form_named(toy.names[0]) is toy
    assert form_names()[: len(STORAGES)] == STORAGES
