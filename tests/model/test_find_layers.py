from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rankfold
from rankfold.errors import InputError
from rankfold.model import find_layers as module
from rankfold.model.find_layers import find_layers
from tests.small_models import trained_cnn


class Everything(nn.Module):
    """One layer of each kind that is left as it is, and two that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(6, 6)
        self.conv = nn.Conv2d(4, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.embedding = nn.Embedding(9, 6)
        self.tied = nn.Linear(6, 9, bias=False)
        self.tied.weight = self.embedding.weight
        self.thin = nn.Linear(6, 1)
        self.sequence = nn.Conv1d(4, 4, 3)
        self.normed = parametrizations.weight_norm(nn.Linear(6, 6))
        self.wide = nn.Linear(40, 2)
        self.positions = nn.Parameter(torch.zeros(7, 6))
        with warnings.catch_warnings():  # torch's, that there is nothing to initialise
            warnings.simplefilter("ignore")
            self.empty, self.rest = nn.Linear(6, 0, bias=False), nn.Linear(0, 6)


def test_every_other_layer_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_SIDE", 39)
    layers, skipped = find_layers(Everything())
    assert set(layers) == {"good", "conv"}
    reasons = {entry.name: entry.reason for entry in skipped}
    assert "2 groups stand in one weight" in reasons["grouped"]
    assert "embeddings=True" in reasons["embedding"]
    assert "shared" in reasons["tied"]
    assert "rank 1" in reasons["thin"]
    assert "Conv1d" in reasons["sequence"]
    assert any(name.startswith("normed") for name in reasons)
    assert reasons["empty"] == reasons["rest"] == "its matrix is empty"
    assert "above the limit of 39" in reasons["wide"]
    assert "parameters of the model itself" in reasons[""]
    assert {entry.name: entry.parameters for entry in skipped}["grouped"] == 4 * 2 * 9 + 4


class _WithoutRest(nn.Module):
    """MobileBERT's head: what the words' vectors lack is a matrix, of no rows where they lack 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.rest = nn.Linear(3, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.rest(x[:, :3])], 1)


def test_a_model_with_an_empty_matrix(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = _WithoutRest()
    result = rankfold.lossless(
        model, [(torch.randn(8), i % 8) for i in range(80)], size=0.8, embeddings=True
    )
    again = rankfold.load(result.save(tmp_path / "out"), model=_WithoutRest())
    inputs = torch.randn(3, 8)
    assert torch.equal(again(inputs), result.model(inputs))


def test_include_and_exclude() -> None:
    model = trained_cnn()
    layers, skipped = find_layers(model, include=["features.*"], exclude=["*.3"])
    assert set(layers) == {"features.0", "features.5"}
    reasons = {entry.name: entry.reason for entry in skipped}
    assert reasons["head"] == "not included"
    assert reasons["features.3"] == "excluded"
    with pytest.raises(InputError, match=r"'fc\*' matches no layer; names look like features\.0"):
        find_layers(model, exclude=["fc*"])


def test_nothing_to_factorize_lists_what_there_is() -> None:
    with pytest.raises(InputError, match=r"no layer to factorize(.|\n)*0 \(Embedding\)"):
        find_layers(nn.Sequential(nn.Embedding(3, 3)))
    with pytest.raises(InputError, match="wrap it in a module"):
        find_layers(nn.Linear(3, 3))


def test_weights_that_are_not_finite_are_named() -> None:
    model = trained_cnn()
    with torch.no_grad():
        model.features[3].weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(InputError, match=r"features\.3\.weight holds NaN or infinite"):
        find_layers(model)
