"""All that turns data into a model's inputs goes along with it, wherever it was opened from."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankfold
from rankfold.integrations.transformers import copy_processing_files, source_folder
from tests.integrations.test_sentence_folder import write
from tests.small_models import token_data
from tests.tiny_language_model import save_tiny_llama

# As the tokenizers and processors of transformers call their files.
BELONGS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "vocab-src.json", "vocab-tgt.json",
    "merges.txt", "spiece.model", "spm.model", "spm_char.model", "sentencepiece.bpe.model",
    "source.spm", "target.spm", "bpe.codes", "normalizer.json", "tekken.json",
    "entity_vocab.json", "qwen.tiktoken", "tokenizer.tiktoken", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/tools.jinja", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
STAYS = (
    "model.safetensors", "pytorch_model.bin", "modeling_own.py", "tokenization_own.py",
    "training_args.bin", "optimizer.pt", "README.md", "rankfold.json", "certificate.json",
)  # fmt: skip


def test_files_of_tokenizers_and_processors_go_along_and_no_code(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    for name in (*BELONGS, *STAYS, "config.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (target / "vocab.txt").write_text("its own")
    copy_processing_files(source, target)
    found = {str(f.relative_to(target)) for f in target.rglob("*") if f.is_file()}
    assert found == set(BELONGS)
    assert (target / "vocab.txt").read_text() == "its own"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a hub's cache, as the model ``owner/name`` is opened from it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    return repository / "snapshots" / ("c" * 40)


def test_of_a_name_on_a_hub_what_lies_in_its_cache_goes_along(cached: Path, tmp_path: Path) -> None:
    save_tiny_llama(cached)
    (cached / "chat_template.jinja").write_text("{{ messages }}")
    model = AutoModelForCausalLM.from_pretrained(cached)
    model.config.name_or_path = "owner/name"  # as it is where the hub was asked
    assert source_folder(model) == cached
    result = rankfold.lossless(model, token_data(), size=0.8, objective="activation")
    saved = result.save(tmp_path / "out")
    assert (saved / "chat_template.jinja").read_text() == "{{ messages }}"
    assert AutoTokenizer.from_pretrained(saved)("the")["input_ids"]
    model.config.name_or_path = "owner/another"
    assert source_folder(model) is None
    model.config.name_or_path = "no name: of a hub"
    assert source_folder(model) is None


def test_an_encoder_of_a_hub_keeps_its_pooling(cached: Path) -> None:
    from transformers import BertModel

    from rankfold.integrations.transformers import pooling_of

    write(cached, modes=("cls",))
    model = BertModel.from_pretrained(cached)
    model.config.name_or_path = "owner/name"
    found = pooling_of(model)
    assert found is not None and found.names == ("cls", "normalize")


def test_generation_settings_are_those_of_the_folder(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    told = {"do_sample": True, "temperature": 0.5, "eos_token_id": [0, 7]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(told))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    result = rankfold.lossless(model, token_data(), size=0.8, objective="activation")
    saved = result.save(tmp_path / "out")
    dense = rankfold.export(saved, tmp_path / "dense", to="dense").folder
    for folder in (saved, dense):
        found = json.loads((folder / "generation_config.json").read_text())
        assert found.items() >= told.items()
