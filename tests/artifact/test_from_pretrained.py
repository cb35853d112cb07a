"""transformers itself opens what rankfold saves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitConfig,
    BitForImageClassification,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    pipeline,
)

import rankfold
from rankfold import ArtifactError, InputError
from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import open_data, open_model
from rankfold.forms.low_rank.modules import LowRankLinear
from rankfold.integrations.transformers import load_folder
from tests.command_line import environment
from tests.new_process import in_a_new_process
from tests.small_models import seeded, tiny_llama, token_data
from tests.tiny_language_model import TEXT, save_tiny_llama

IDS = torch.arange(20).view(1, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tokenizer, chat template, generation settings and a processor's file."""
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    (folder / "preprocessor_config.json").write_text('{"do_resize": true}')
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"max_new_tokens": 7}))
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> rankfold.Result:
    text = folder / "text.txt"
    text.write_text(TEXT)
    opened = open_model(str(folder))
    return rankfold.lossless(
        opened.model, open_data(str(text), opened, DataOptions(length=32)), size=0.7
    )


@pytest.fixture(scope="module")
def saved(result: rankfold.Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result.save(tmp_path_factory.mktemp("saved") / "model")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.processors
def test_it_gives_the_same_bits_as_rankfold(result: rankfold.Result, saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    assert torch.equal(logits(model), logits(result.model))
    assert torch.equal(logits(model), logits(rankfold.load(saved)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training


@pytest.mark.processors
@pytest.mark.parametrize("on_disk", [True, False])
def test_bfloat16_gives_the_same_bits(on_disk: bool, tmp_path: Path) -> None:
    """Loaded or cast: a cast rounds the rotary frequencies, which loading computes anew."""
    model: nn.Module = tiny_llama(torch.bfloat16)
    if on_disk:
        model.save_pretrained(tmp_path / "original")
        model = load_folder(tmp_path / "original")
    result = rankfold.lossless(model, token_data(), size=0.8)
    again = AutoModelForCausalLM.from_pretrained(result.save(tmp_path / "a"))
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(result.model))


def test_a_dtype_can_be_asked_for(result: rankfold.Result, saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    orders = [module.order for module in model.modules() if isinstance(module, LowRankLinear)]
    assert {order.dtype for order in orders if order is not None} == {torch.int32}
    torch.testing.assert_close(logits(model).float(), logits(result.model), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}])
def test_a_device_can_be_asked_for(where: Any, result: rankfold.Result, saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=where)
    assert torch.equal(logits(model), logits(result.model))


def test_it_generates_with_the_cache(result: rankfold.Result, saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 9}
    expected = result.model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, use_cache=True, **options), expected)
    assert torch.equal(model.generate(IDS, use_cache=False, **options), expected)


def test_what_stood_beside_the_model_is_kept(folder: Path, saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    words = AutoTokenizer.from_pretrained(folder)("the statement")["input_ids"]
    assert tokenizer("the statement")["input_ids"] == words
    message = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "hello!"
    assert (saved / "preprocessor_config.json").read_text() == '{"do_resize": true}'
    for model in (AutoModelForCausalLM.from_pretrained(saved), rankfold.load(saved)):
        assert model.generation_config.max_new_tokens == 7
    assert not (saved / "text.txt").exists()


def test_the_folder_is_what_a_hub_takes(saved: Path) -> None:
    assert sorted(str(p.relative_to(saved)) for p in saved.rglob("*")) == [
        "README.md",
        "certificate.json",
        "certificate.txt",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "rankfold.json",
        "report.html",
        "seen.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_pipeline_opens_it(saved: Path) -> None:
    generator = pipeline("text-generation", model=str(saved))
    (written,) = generator("The statement", do_sample=False)
    assert written["generated_text"].startswith("The statement")


def test_saved_again_in_shards_it_opens_again(
    result: rankfold.Result, saved: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(result.model))
    with pytest.raises(InputError, match="factorized already"):
        load_folder(tmp_path)
    with pytest.raises(InputError, match="from_pretrained"):
        rankfold.load(tmp_path)


def test_the_body_without_its_head(result: rankfold.Result, saved: Path) -> None:
    body = AutoModel.from_pretrained(saved)
    with torch.no_grad():
        hidden = body(IDS).last_hidden_state
        assert torch.equal(hidden, result.model.model(IDS).last_hidden_state)


def test_it_is_an_ordinary_model_to_transformers(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert not model.is_quantized
    assert model.half().dtype == torch.float16


def test_a_new_process_opens_it_whatever_is_imported_first(
    result: rankfold.Result, saved: Path, tmp_path: Path
) -> None:
    """Forks of one that has neither of both, but what both import."""
    code = """
import os, sys
import torch
from safetensors.torch import save_file
for name in ("huggingface_hub", "tokenizers", "torchao"):
    try:
        __import__(name)
    except ImportError:
        pass
for order in sys.argv[2:]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, order
        continue
    assert not any(name.startswith(("rankfold", "transformers")) for name in sys.modules)
    for name in order.split():
        __import__(name)
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    with torch.no_grad():
        save_file({"logits": model(torch.arange(20).view(1, 20)).logits}, order)
    break
"""
    orders = ("rankfold", "transformers rankfold", "transformers.modeling_utils rankfold")
    done = subprocess.run(
        [sys.executable, "-c", code, saved, *orders], cwd=tmp_path, env=environment(),
        capture_output=True, encoding="utf-8", timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for order in orders:
        assert torch.equal(load_file(tmp_path / order)["logits"], logits(result.model)), order


def test_importing_rankfold_does_not_import_transformers() -> None:
    code = "import sys, rankfold; print([m for m in sys.modules if m.startswith('transformers')])"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, check=True, capture_output=True).stdout.strip() == b"[]"


def test_without_rankfold_transformers_refuses_and_says_why(saved: Path) -> None:
    code = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""
    said = in_a_new_process(code, saved, cwd=saved, expect=1).stderr
    assert "ValueError" in said
    assert "pip install 'rankfold[transformers]'" in said and "import rankfold" in said


@pytest.mark.processors
def test_a_layer_that_was_unpacked_several_times(tmp_path: Path) -> None:
    """A conv along one axis with groups, its weight computed by weight_norm."""
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        conv_dim=[16, 16], conv_stride=[5, 2], conv_kernel=[10, 3], num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, num_labels=3,
        classifier_proj_size=16, mask_time_prob=0.0,
    )  # fmt: skip
    model = seeded(1, lambda: Wav2Vec2ForSequenceClassification(config)).eval()
    sounds = torch.randn(40, 400, generator=torch.Generator().manual_seed(1))
    data = [{"input_values": x, "labels": torch.tensor(i % 3)} for i, x in enumerate(sounds)]
    result = rankfold.lossless(model, data, size=0.8)
    names = result.report["unpacked"]
    assert len(set(names)) < len(names)
    folder = result.save(tmp_path / "a")
    again = Wav2Vec2ForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(again(sounds[:2]).logits, result.model(sounds[:2]).logits)
        expected = result.model(sounds[:2]).logits
        rankfold.export(folder, tmp_path / "dense", to="dense")
        dense = Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path / "dense")
        torch.testing.assert_close(dense(sounds[:2]).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.processors
def test_convs_that_standardise_their_weight(tmp_path: Path) -> None:
    """They are looked at before their weights are read, by random numbers."""
    config = BitConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], num_groups=8, num_labels=3,
        layer_type="bottleneck",
    )  # fmt: skip
    model = seeded(2, lambda: BitForImageClassification(config)).eval()
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    data = [{"pixel_values": x, "labels": torch.tensor(i % 3)} for i, x in enumerate(images)]
    result = rankfold.lossless(model, data, size=0.7)
    assert len(result.report["unpacked"]) == 9
    folder = result.save(tmp_path / "a")
    again = BitForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(again(images[:2]).logits, result.model(images[:2]).logits)
    with pytest.raises(InputError, match=r"computed from others there.*rankfold\.load"):
        rankfold.export(folder, tmp_path / "dense", to="dense")


# Damaged folders


def _edited(folder: Path, target: Path, **fields: object) -> Path:
    copied(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= fields
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_damaged_configurations_are_named(saved: Path, tmp_path: Path) -> None:
    newer = _edited(saved, tmp_path / "newer", format_version=99)
    with pytest.raises(InputError, match="newer rankfold"):
        AutoModelForCausalLM.from_pretrained(newer)
    layers = [{"name": "model.layers.0.mlp.none", "rank": 3, "form": "pair"}]
    unknown = _edited(saved, tmp_path / "unknown", layers=layers)
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.none"):
        AutoModelForCausalLM.from_pretrained(unknown)
    broken = _edited(saved, tmp_path / "broken", layers=None)
    with pytest.raises(InputError, match="a list 'layers'"):
        AutoModelForCausalLM.from_pretrained(broken)


def test_factors_that_are_missing_are_not_invented(saved: Path, tmp_path: Path) -> None:
    damaged = copied(saved, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".left"))
    save_file({n: t for n, t in tensors.items() if n != name}, damaged / "model.safetensors")
    with pytest.raises(InputError, match=name):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_a_layer_that_is_not_listed_is_not_invented(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    first, *others = config["quantization_config"]["layers"]
    damaged = _edited(saved, tmp_path / "damaged", layers=others)
    with pytest.raises(InputError, match=f"{first['name']}.weight: missing"):
        AutoModelForCausalLM.from_pretrained(damaged)
    smaller = [{**first, "rank": first["rank"] - 1}, *others]
    with pytest.raises(InputError, match=f"{first['name']}.right: .* in the file"):
        AutoModelForCausalLM.from_pretrained(_edited(saved, tmp_path / "rank", layers=smaller))


@pytest.mark.parametrize("length", [0, 4, 40, -1])
def test_a_truncated_file_of_weights_is_refused(length: int, saved: Path, tmp_path: Path) -> None:
    damaged = copied(saved, tmp_path / "damaged")
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match=r"model\.safetensors can't be read"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_other_weights_than_were_saved_are_refused(saved: Path, tmp_path: Path) -> None:
    damaged = copied(saved, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="not those that were saved"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_trained_further_and_saved_in_the_same_folder_it_opens_again(
    saved: Path, tmp_path: Path
) -> None:
    folder = copied(saved, tmp_path / "trained")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(folder)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    with pytest.raises(ArtifactError, match="is not the file that was saved"):
        rankfold.load(folder)  # its certificate is of other weights
    assert torch.equal(logits(rankfold.load(folder, as_saved=False)), logits(model))


def test_loading_twice_gives_two_models(saved: Path) -> None:
    first, second = (AutoModelForCausalLM.from_pretrained(saved) for _ in range(2))
    assert isinstance(first, PreTrainedModel)
    assert {id(p) for p in first.parameters()}.isdisjoint(id(p) for p in second.parameters())
