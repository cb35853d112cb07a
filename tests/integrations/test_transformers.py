"""transformers folders in and out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import rankfold
from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import open_artifact, open_data, open_model
from rankfold.errors import InputError
from rankfold.integrations import transformers as hf
from tests.tiny_language_model import TEXT, save_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    opened = open_model(str(folder))
    out = tmp_path_factory.mktemp("saved")
    (out / "text.txt").write_text(TEXT)
    data = open_data(str(out / "text.txt"), opened, DataOptions(length=32))
    result = rankfold.lossless(opened.model, data, size=0.7)
    return result.save(out / "model", tokenizer=opened.tokenizer)


def test_saved_folder_holds_what_is_needed_and_nothing_else(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert {"model.safetensors", "rankfold.json", "config.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".py", ".pkl"))]
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_reloaded_model_is_equal_tied_and_generates(saved: Path) -> None:
    first, second = (open_artifact(saved, None) for _ in range(2))
    ids = torch.arange(20).view(1, 20)
    assert torch.equal(first.model(ids).logits, second.model(ids).logits)
    assert first.model.lm_head.weight is first.model.model.embed_tokens.weight
    text = first.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert text.shape == (1, 25)
    assert first.tokenizer is not None


def test_bfloat16_stays_bfloat16(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    windows = [torch.randint(0, 300, (32,)) for _ in range(40)]
    result = rankfold.lossless(model, windows, size=0.8)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    again = rankfold.load(result.save(tmp_path / "out"))
    ids = torch.arange(20).view(1, 20)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again(ids).logits, result.model(ids).logits)


def _copy(folder: Path, target: Path, **config: object) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    settings = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(settings))
    return target


def test_bad_folders_are_named(folder: Path, tmp_path: Path) -> None:
    unknown = _copy(folder, tmp_path / "unknown", architectures=["MadeUpForCausalLM"])
    with pytest.raises(InputError, match="MadeUpForCausalLM"):
        hf.load_folder(unknown)
    pickled = _copy(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="reads no pickles"):
        hf.load_folder(pickled)
    quantized = _copy(
        folder, tmp_path / "q", quantization_config={"quant_method": "gptq", "bits": 4}
    )
    with pytest.raises(InputError, match="quantized"):
        hf.load_folder(quantized)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        hf.load_folder(tmp_path / "empty")


def test_code_in_a_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    trap = _copy(
        folder,
        tmp_path / "trap",
        model_type="trap",
        auto_map={"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"},
    )
    (trap / "trap.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(InputError):
        hf.load_folder(trap)
    assert not marker.exists()
