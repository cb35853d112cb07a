"""The two algorithms, from a model and data to a result."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import rankfold
from rankfold.compress import prepare
from rankfold.data import Data
from rankfold.errors import InputError
from rankfold.modules import FORMS, LowRankConv2d, LowRankLinear
from rankfold.objectives import OBJECTIVES
from rankfold.sizes import model_parameters
from tests.small_models import (
    SmallCNN,
    flags,
    image_data,
    images,
    mlp,
    pairs,
    same_state,
    seeded,
    state,
    tiny_llama,
    token_data,
    trained_cnn,
)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", FORMS)
def test_lossless_keeps_the_size_and_the_model(objective: str, form: str) -> None:
    model = trained_cnn().train()
    before, were = state(model), flags(model)
    result = rankfold.lossless(model, image_data(), size=0.6, objective=objective, form=form)
    assert same_state(model, before)
    assert flags(model) == were
    report = result.report
    assert model_parameters(result.model) == report["factorized"]["parameters"]
    assert model_parameters(model) == report["original"]["parameters"]
    assert result.ratio == report["factorized"]["parameters"] / report["original"]["parameters"]
    assert result.ratio <= 0.6
    low_rank = [m for m in result.model.modules() if isinstance(m, LowRankLinear | LowRankConv2d)]
    ranks = [layer["rank"] for layer in report["layers"] if layer["rank"] is not None]
    assert sorted(m.rank for m in low_rank) == sorted(ranks)
    assert {m.form for m in low_rank} == {form}
    values = images(20, seed=9).tensors[0]
    assert torch.isfinite(result.model(values)).all()


def test_better_objectives_lose_less() -> None:
    data, model = image_data(400), trained_cnn()
    change = {
        name: rankfold.lossless(model, data, size=0.5, objective=name).certificate.change
        for name in ("svd", "kronecker")
    }
    assert change["kronecker"] < change["svd"]


@torch.no_grad()
def test_reported_losses_are_those_of_the_models() -> None:
    data, model = image_data(), trained_cnn()
    result = rankfold.lossless(model, data, size=0.6)
    values, labels = images(120, seed=13).tensors
    loss = nn.functional.cross_entropy
    report = result.report["loss"]
    assert report["original"] == pytest.approx(float(loss(model(values), labels)), rel=1e-5)
    factorized = loss(result.model(values), labels, reduction="none")
    assert report["factorized"] == pytest.approx(float(factorized.mean()), rel=1e-5)
    differences = (factorized - loss(model(values), labels, reduction="none")).double()
    error = float(differences.std()) / math.sqrt(len(labels))
    assert report["standard_error"] == pytest.approx(error, rel=1e-4)


def test_same_seed_same_ranks_and_weights() -> None:
    model = trained_cnn()
    pool = images(400, seed=4)
    results = [rankfold.compact(model, pool, margin=0.1, seed=seed) for seed in (3, 3, 4)]
    first, again, other = ([layer["rank"] for layer in r.report["layers"]] for r in results)
    assert first == again
    assert same_state(results[1].model, state(results[0].model))
    digests = [r.report["data"]["held_out"]["digest"] for r in results]
    assert digests[0] == digests[1] != digests[2]
    assert other is not None


def test_compact_is_smaller_and_within_the_margin() -> None:
    result = rankfold.compact(trained_cnn(), image_data(400), margin=0.2)
    assert result.found
    assert result.certificate.upper_bound <= 0.2
    tried = result.report["selection"]
    assert len(tried) >= 2
    assert result.ratio in [t["ratio"] for t in tried]


def test_compact_that_finds_nothing_says_so() -> None:
    data = image_data(12)
    result = rankfold.compact(trained_cnn(), data, margin=0, objective="svd")
    assert not result.found
    assert result.certificate.verdict in ("not shown", "worse")
    assert result.model is not None


def test_several_sizes_from_one_preparation() -> None:
    prepared = prepare(trained_cnn(), image_data())
    ratios = [prepared.lossless(size).ratio for size in (0.9, 0.7, 0.5)]
    assert ratios == sorted(ratios, reverse=True)
    pair = prepared.in_form("pair").lossless(0.7)
    alone = rankfold.lossless(trained_cnn(), image_data(), size=0.7, form="pair")
    assert same_state(pair.model, state(alone.model))


def test_size_one_leaves_everything_there() -> None:
    result = rankfold.lossless(trained_cnn(), image_data(), size=1.0, objective="kronecker")
    assert result.ratio <= 1
    assert abs(result.certificate.change) < 1e-3


def test_size_of_the_factorizable_layers() -> None:
    result = rankfold.lossless(tiny_llama(), token_data(), size=0.5, size_of="factorizable")
    layers = result.report["layers"]
    kept = sum(layer["factorized_parameters"] for layer in layers)
    assert 0.45 < kept / sum(layer["parameters"] for layer in layers) <= 0.5
    assert result.ratio > 0.5
    reasons = {entry["name"]: entry["reason"] for entry in result.report["not_factorized"]}
    assert reasons["lm_head"] == "its weight is shared with another layer"


def test_flops_are_another_budget() -> None:
    model, data = trained_cnn(), image_data()
    result = rankfold.lossless(model, data, size=0.6, cost="flops")
    original, factorized = result.report["original"], result.report["factorized"]
    assert factorized["flops"] <= 0.6 * original["flops"]
    by_parameters = rankfold.lossless(model, data, size=result.ratio)
    assert factorized["flops"] <= by_parameters.report["factorized"]["flops"]


def test_a_loss_of_ones_own() -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        values, labels = batch
        return (model(values).sum(1) - labels).square()

    result = rankfold.lossless(mlp(), pairs(80), size=0.9, loss=loss)
    assert result.certificate.unit == "units of the given loss"
    assert result.report["curvature"] == "empirical"
    with pytest.raises(InputError, match="one loss per example"):
        rankfold.lossless(mlp(), pairs(80), size=0.9, loss=lambda m, b: loss(m, b).mean())


def _nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    return model


BAD = {
    "size 0": ({"size": 0}, "size is 0"),
    "size above 1": ({"size": 1.5}, "size is 1.5"),
    "size nan": ({"size": math.nan}, "size is nan"),
    "too small": ({"size": 0.01}, "too small"),
    "margin": ({"margin": -1}, "margin is -1"),
    "objective": ({"objective": "magic"}, "objective is 'magic'"),
    "form": ({"form": "round"}, "form is 'round'"),
    "size of": ({"size_of": "it"}, "size_of is 'it'"),
    "confidence": ({"confidence": 1.0}, "confidence is 1.0"),
    "damping": ({"damping": -1}, "damping is -1"),
    "limit": ({"limit": 1}, "limit is 1"),
    "batch size": ({"batch_size": 0}, "batch_size is 0"),
    "include": ({"include": ["nothing*"]}, "'nothing.*' matches no layer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(InputError, match=message):
        rankfold.lossless(trained_cnn(), image_data(), **{"size": 0.7, **changes})


def test_bad_models_and_data() -> None:
    with pytest.raises(InputError, match=r"head\.weight holds NaN"):
        rankfold.lossless(_nan(trained_cnn()), image_data(), size=0.7)
    with pytest.raises(InputError, match="no layer to factorize"):
        rankfold.lossless(nn.Sequential(nn.Flatten()), image_data(), size=0.7)
    shared = Data(images(20, seed=1), images(20, seed=2), images(20, seed=1))
    with pytest.raises(InputError, match="calibration and held-out parts share 20"):
        rankfold.lossless(trained_cnn(), shared, size=0.7)
    with pytest.raises(InputError, match="too few"):
        rankfold.lossless(trained_cnn(), images(9, seed=1), size=0.7)
    with pytest.raises(InputError, match="data is int"):
        rankfold.lossless(trained_cnn(), 7, size=0.7)
    with pytest.raises(InputError, match="can't be recognised"):
        rankfold.lossless(mlp(), [torch.randn(6) for _ in range(50)], size=0.7)


def test_layers_that_are_never_reached_stay_dense_with_a_reason() -> None:
    class Unused(SmallCNN):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(6, 6)

    result = rankfold.lossless(seeded(1, Unused), image_data(), size=0.8)
    reasons = {entry["name"]: entry["reason"] for entry in result.report["not_factorized"]}
    assert reasons == {"spare": "not called in a forward pass"}
