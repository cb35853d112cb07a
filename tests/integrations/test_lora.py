"""peft's LoRA on the factors of a factorized model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import rankfold
from rankfold.forms.low_rank.modules import LowRankLinear
from tests.every_form import FEATURES, EveryForm
from tests.small_models import tiny_llama, token_data, token_windows

peft = pytest.importorskip("peft", reason="pip install peft")
pytestmark = pytest.mark.filterwarnings(
    # transformers' own, on its way to another name; peft still asks for the old one.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

IDS = torch.stack(token_windows(8, seed=3))
FACTORS = (".left", ".right", ".shared", ".first", ".second")
SIDES = {"all": FACTORS, "right": (".right",)}


@pytest.fixture(scope="module", params=["pair", "pivoted"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = rankfold.lossless(tiny_llama(), token_data(), size=0.7, form=request.param)
    return result.save(tmp_path_factory.mktemp("saved") / "a")


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("sides", SIDES)
def test_it_trains_merges_saves_and_opens_again(sides: str, folder: Path, tmp_path: Path) -> None:
    model = opened(folder)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    factors = [n for n, _ in model.named_parameters() if n.endswith(SIDES[sides])]
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=factors)
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(logits(adapted), before)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-2)
    losses = []
    for _ in range(12):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3

    after = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(opened(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), after)

    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), after, atol=1e-5, rtol=1e-5)
    found = merged.state_dict()
    assert found.keys() == weights.keys()  # of the same ranks, and as small
    changed = {name for name in found if not torch.equal(found[name], weights[name])}
    assert changed == set(factors)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(opened(tmp_path / "merged")), logits(merged))


def test_a_factorized_layer_as_a_target_module_is_refused_by_name(folder: Path) -> None:
    model = opened(folder)
    name = next(n for n, m in model.named_modules() if isinstance(m, LowRankLinear))
    with pytest.raises(ValueError, match=r"Target module LowRankLinear\(.*is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[name]))


def test_the_factors_of_blocks_are_adapted_and_merged() -> None:
    blocks = nn.Sequential(*EveryForm().linears[2:4])
    values = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(0))
    before = blocks(values).detach()
    factors = [name for name, _ in blocks.named_parameters() if name.endswith(FACTORS[2:])]
    assert len(factors) == 6
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=factors)
    adapted = peft.get_peft_model(blocks, config)
    torch.testing.assert_close(adapted(values), before)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.01)
    after = adapted(values).detach()
    assert not torch.allclose(after, before)
    merged = adapted.merge_and_unload()
    assert [type(layer) for layer in merged] == [type(layer) for layer in blocks]
    torch.testing.assert_close(merged(values), after, atol=1e-4, rtol=1e-4)
