from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from rankfold import layers as module
from rankfold.errors import InputError
from rankfold.layers import find_layers
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


def test_every_other_layer_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_SIDE", 39)
    layers, skipped = find_layers(Everything())
    assert set(layers) == {"good", "conv"}
    reasons = {entry.name: entry.reason for entry in skipped}
    assert "2 groups stand in one weight" in reasons["grouped"]
    assert "--embeddings" in reasons["embedding"]
    assert "shared" in reasons["tied"]
    assert "rank 1" in reasons["thin"]
    assert "Conv1d" in reasons["sequence"]
    assert any(name.startswith("normed") for name in reasons)
    assert "above the limit of 39" in reasons["wide"]
    assert {entry.name: entry.parameters for entry in skipped}["grouped"] == 4 * 2 * 9 + 4


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
