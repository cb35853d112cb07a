"""Embedding matrices end to end: counted once, factorized once, and tied wherever they were."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import rankfold
from rankfold import InputError
from rankfold.forms.embedding.modules import LowRankEmbedding, LowRankHead
from rankfold.forms.storage import factor_parameters
from rankfold.model import find_layers as find_layers_module
from rankfold.model.find_layers import find_embeddings, find_layers
from rankfold.model.sizes import model_parameters
from rankfold.search.build import build
from rankfold.search.interactions import corrected as corrected_by
from rankfold.search.trial import measure
from tests.command_line import rankfold as command
from tests.rounds import first_round
from tests.small_models import seeded, tiny_llama, token_data
from tests.test_families import FAMILIES, WORDS, _close, _model, _opened_by_its_readme, _outputs
from tests.tiny_language_model import TEXT, save_tiny_llama

# The matrix of each family, its uses, and how many parameters hold it.
TIED = {
    "llama": ("model.embed_tokens", ["model.embed_tokens", "lm_head"]),
    "gpt2": ("transformer.wte", ["transformer.wte", "lm_head"]),
    "bert": (
        "bert.embeddings.word_embeddings",
        ["bert.embeddings.word_embeddings", "cls.predictions.decoder"],
    ),
    "t5": ("shared", ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
}
NO_PAIRS = {"t5"}  # the model reads an attribute of a layer


def tied(name: str) -> nn.Module:
    family = FAMILIES[name]
    if name != "llama":
        return _model(family)
    return seeded(
        5, lambda: LlamaForCausalLM(LlamaConfig(**family.options, tie_word_embeddings=True))
    )


def lowered(model: nn.Module, name: str, rank: int) -> nn.Module:
    """The matrix of a module cut to a rank, in place."""
    weight = model.get_submodule(name).weight
    u, sigma, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    with torch.no_grad():
        weight.copy_((u[:, :rank] * sigma[:rank]) @ v[:rank])
    return model


@pytest.mark.parametrize("name", TIED)
def test_a_tied_matrix_is_factorized_once_and_stays_tied(name: str, tmp_path: Path) -> None:
    family, (first, uses) = FAMILIES[name], TIED[name]
    model = tied(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = rankfold.lossless(
        model, family.data(), size=0.6, size_of="factorizable", embeddings=True, include=[first]
    )
    report = result.report
    (layer,) = report["layers"]
    assert layer["name"] == first and layer["uses"] == uses and layer["rank"] is not None
    weight = model.get_submodule(first).weight
    assert layer["parameters"] == weight.numel()
    kept = factor_parameters(*weight.shape, layer["rank"], "pivoted")
    assert layer["factorized_parameters"] == kept
    assert report["original"]["factorizable_parameters"] == weight.numel()
    assert model_parameters(result.model) == model_parameters(model) - weight.numel() + kept
    assert report["factorized"]["parameters"] == model_parameters(result.model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    folder = result.save(tmp_path / "out")
    assert report["factorized"]["bytes"] == (folder / "model.safetensors").stat().st_size
    opened = type(model).from_pretrained(folder)
    opened.save_pretrained(tmp_path / "again")
    models = {
        "built": result.model,
        "loaded": rankfold.load(folder),
        "from_pretrained": opened,
        "saved by transformers": type(model).from_pretrained(tmp_path / "again"),
        "tied again": copy.deepcopy(opened),
    }
    models["tied again"].tie_weights()
    expected = _outputs(result.model, family.data()[0])
    for how, one in models.items():
        parts = [one.get_submodule(use) for use in uses]
        assert {type(part) for part in parts} <= {LowRankEmbedding, LowRankHead}, how
        assert all(part.weight is parts[0].weight and part.mix is parts[0].mix for part in parts), (
            how
        )
        assert model_parameters(one) == model_parameters(result.model), how
        for key, value in _outputs(one, family.data()[0]).items():
            assert torch.equal(value, expected[key]), (how, key)

    dense = rankfold.export(folder, tmp_path / "dense", to="dense")
    assert dense.parameters == model_parameters(model)
    _close(_outputs(type(model).from_pretrained(dense.folder), family.data()[0]), expected)
    pairs = rankfold.export(folder, tmp_path / "pairs", to="pairs")
    if name not in NO_PAIRS:
        _close(_outputs(_opened_by_its_readme(pairs.folder), family.data()[0]), expected)


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("form", ["pair", "pivoted"])
def test_a_matrix_of_low_rank_is_recovered_to_it(name: str, form: str) -> None:
    family, (first, _) = FAMILIES[name], TIED[name]
    model = lowered(tied(name).double(), first, 4)
    prepared = first_round(
        model, family.data(), embeddings=True, include=[first], form=form, gradient_step=False
    )
    budget = factor_parameters(*model.get_submodule(first).weight.shape, 4, form)
    plan = prepared.plan(budget)
    assert plan[first].rank == 4 and prepared.predicted(plan) == pytest.approx(0, abs=1e-12)
    built = build(prepared, plan)
    expected = _outputs(model, family.data()[0])
    for key, value in _outputs(built, family.data()[0]).items():
        torch.testing.assert_close(value, expected[key], atol=1e-8, rtol=1e-7)


def test_untied_matrices_are_factorized_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A head of its own is an ordinary layer, until it has more outputs than a Gram can have."""
    config = LlamaConfig(**FAMILIES["llama"].options, tie_word_embeddings=False)
    model = seeded(5, lambda: LlamaForCausalLM(config))
    found, _ = find_embeddings(model)
    assert {name: list(matrix.uses) for name, matrix in found.items()} == {
        "model.embed_tokens": ["model.embed_tokens"]
    }
    monkeypatch.setattr(find_layers_module, "LARGEST_SIDE", WORDS - 1)
    result = rankfold.lossless(
        model, FAMILIES["llama"].data(), size=0.5, size_of="factorizable", embeddings=True,
        include=["model.embed_tokens", "lm_head"], interactions=False,
    )  # fmt: skip
    assert {layer["name"]: layer["kind"] for layer in result.report["layers"]} == {
        "model.embed_tokens": "Embedding", "lm_head": "Linear",
    }  # fmt: skip
    for name in ("model.embed_tokens", "lm_head"):
        assert isinstance(result.model.get_submodule(name), LowRankEmbedding | LowRankHead)
    assert result.model.lm_head.weight is not result.model.model.embed_tokens.weight
    folder = result.save(tmp_path / "out")
    ids = torch.arange(10)[None]
    expected = result.model(ids).logits
    assert torch.equal(rankfold.load(folder)(ids).logits, expected)
    assert torch.equal(LlamaForCausalLM.from_pretrained(folder)(ids).logits, expected)
    # A class without the head has the lookup alone.
    body = LlamaModel.from_pretrained(folder)(ids).last_hidden_state
    assert torch.equal(body, result.model.model(ids).last_hidden_state)


def test_embeddings_join_the_other_layers_in_one_plan_and_their_interactions() -> None:
    model = lowered(tiny_llama(), "model.embed_tokens", 8)
    result = rankfold.lossless(model, token_data(), size=0.7, embeddings=True, rounds=2)
    layers = {layer["name"]: layer for layer in result.report["layers"]}
    embedding = layers["model.embed_tokens"]
    assert embedding["rank"] is not None
    assert embedding["harmless_range"] is None  # no step, so no range around it
    assert len(layers) > 10 and result.ratio <= 0.7
    assert not any("embed" in e["name"] for e in result.report["not_factorized"])
    prepared = first_round(model, token_data(), embeddings=True)
    measured = measure(prepared, prepared.plan(0.5 * prepared.factorizable))
    corrected = corrected_by(prepared, measured)
    assert corrected.factors is not None and corrected.factors["model.embed_tokens"] > 0
    by_flops = rankfold.lossless(
        model, token_data(), size=0.8, embeddings=True, cost="flops", interactions=False
    )
    assert by_flops.report["factorized"]["flops"] <= 0.8 * by_flops.report["original"]["flops"]


def test_by_default_embeddings_are_left_out_and_say_how_to_include_them() -> None:
    layers, skipped = find_layers(tiny_llama())
    assert "model.embed_tokens" not in layers and "lm_head" not in layers
    reasons = {entry.name: entry.reason for entry in skipped}
    assert "embeddings=True" in reasons["model.embed_tokens"]
    with pytest.raises(InputError, match="predicts the loss by curvature"):
        rankfold.prepare(tiny_llama(), token_data(), embeddings=True, objective="svd")


class Scaled(nn.Embedding):
    def forward(self, words: Tensor) -> Tensor:
        return 2 * super().forward(words)


class Uses(nn.Module):
    """Matrices that are shared in ways of all kinds."""

    def __init__(self, make: Callable[[], dict[str, nn.Module]]) -> None:
        super().__init__()
        for name, module in make().items():
            self.add_module(name, module)


def shared(*modules: nn.Module) -> dict[str, nn.Module]:
    for module in modules[1:]:
        module.weight = modules[0].weight
    return {f"use{place}": module for place, module in enumerate(modules)}


def renamed() -> dict[str, Any]:
    first, holder = nn.Embedding(9, 4), nn.Module()
    holder.table = first.weight
    return {"use0": first, "holder": holder}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: shared(Scaled(9, 4)), "use0 (Scaled) looks its rows up by a rule of its own"),
        (lambda: shared(nn.Embedding(9, 4), nn.EmbeddingBag(9, 4)), "EmbeddingBag) uses its matri"),
        (lambda: shared(nn.Embedding(9, 4, max_norm=1.0)), "max_norm"),
        (lambda: shared(nn.Embedding(9, 1)), "rank 1 already"),
        (renamed, "parameter of another name"),
    ],
)
def test_a_matrix_that_is_used_otherwise_is_listed_with_the_reason(
    make: Callable[[], dict[str, nn.Module]], reason: str
) -> None:
    model = Uses(make)
    found, reasons = find_embeddings(model)
    assert found == {} and reason in reasons["use0"]
    model.add_module("other", nn.Linear(4, 4))
    _, skipped = find_layers(model, embeddings=reasons)
    assert reason in {entry.name: entry.reason for entry in skipped}["use0"]


def test_include_and_exclude_hold_for_all_uses_of_a_matrix() -> None:
    model = tiny_llama()
    assert list(find_embeddings(model, include=["lm_head"])[0]) == ["model.embed_tokens"]
    assert find_embeddings(model, exclude=["lm_head"])[1]["model.embed_tokens"] == "excluded"
    assert find_embeddings(model, include=["model.layers"])[1]["lm_head"] == "not included"


def test_a_damaged_entry_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_llama()
    result = rankfold.lossless(
        model, token_data(), size=0.6, size_of="factorizable", embeddings=True,
        include=["model.embed_tokens"], interactions=False,
    )  # fmt: skip
    folder = result.save(tmp_path / "out")
    text = (folder / "rankfold.json").read_text()
    for old, new, message in (
        ('"lm_head"', '"lm_tail"', "its layer lm_tail is no such layer"),
        ('"lm_head"', '"model.layers.0.mlp.up_proj"', "different shapes"),
        ('"lm_head"', "3", "names of the uses"),
    ):
        place = text.index('"uses"')
        damaged = text[:place] + text[place:].replace(old, new, 1)
        (folder / "rankfold.json").write_text(damaged)
        with pytest.raises(InputError, match=message):
            rankfold.load(folder)


def test_the_commands_on_a_tied_embedding(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "llama")
    (tmp_path / "text.txt").write_text(TEXT)
    data = ("--data", "text.txt", "--length", "32")
    made = command(
        "lossless", "llama", *data, "--size", "0.7", "--size-of", "factorizable", "--embeddings",
        "--include", "model.embed_tokens", "--out", "out", "--json", cwd=tmp_path,
    )  # fmt: skip
    (layer,) = json.loads(made.stdout)["layers"]
    assert layer["uses"] == ["model.embed_tokens", "lm_head"] and layer["rank"] > 0
    shown = " ".join(command("inspect", "out", cwd=tmp_path).stdout.split())
    assert f"{layer['rank']} pivoted" in shown and "model.embed_tokens" in shown
    checked = command("verify", "out", *data, "--model", "llama", "--json", cwd=tmp_path)
    assert json.loads(checked.stdout)["agrees"]
    found = json.loads(command("evaluate", "out", *data, "--json", cwd=tmp_path).stdout)
    assert found["loss"]["mean"] > 0
