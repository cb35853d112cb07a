"""Weights in files: the same values, whatever becomes of the user's files and of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankfold
from rankfold import InputError
from rankfold.integrations.transformers import load_folder
from rankfold.machine import offload
from rankfold.machine.offload import Offload
from rankfold.machine.weights import as_in_file, in_files, move_to_files
from rankfold.model.kept import KeptModel
from tests.small_models import image_data, same_state, state, tiny_llama, token_data, trained_cnn


@pytest.fixture(autouse=True)
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors lie in files, too."""
    monkeypatch.setattr(offload, "SMALL", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def sharded(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_opened_tensor_by_tensor_in_its_own_dtype(
    tmp_path: Path, folder: Path, dtype: torch.dtype
) -> None:
    source = sharded(tiny_llama(dtype), tmp_path / "model")
    plain, opened = load_folder(source), load_folder(source, offload=Offload(folder, weights=True))
    assert in_files(opened) and not in_files(plain)
    assert same_state(opened, state(plain))
    assert {p.dtype for p in opened.parameters()} == {dtype}
    assert all(as_in_file(parameter) is not None for parameter in opened.parameters())
    strides = [[t.stride() for t in model.state_dict().values()] for model in (plain, opened)]
    assert strides[0] == strides[1]
    assert opened.lm_head.weight is opened.model.embed_tokens.weight  # type: ignore[union-attr]
    assert not list(folder.iterdir())
    for file in source.glob("*.safetensors"):
        file.write_bytes(b"another")
    assert same_state(opened, state(plain))


def test_a_checkpoint_in_another_dtype_than_the_configuration_says(
    tmp_path: Path, folder: Path
) -> None:
    source = sharded(tiny_llama(), tmp_path / "model")
    config = source / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    plain, opened = load_folder(source), load_folder(source, offload=Offload(folder, weights=True))
    assert in_files(opened) and same_state(opened, state(plain))


def test_a_given_model_moves_with_values_strides_and_shared_parameters(folder: Path) -> None:
    model = tiny_llama()
    before, tied = state(model), model.lm_head.weight
    flat = nn.Parameter(torch.arange(8.0))
    model.first, model.second = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
    move_to_files(model, Offload(folder, weights=True))
    assert in_files(model) and model.lm_head.weight is tied is model.model.embed_tokens.weight
    assert as_in_file(model.first) is None  # a view of what others see, too
    del model.first, model.second
    assert same_state(model, before)


def test_changes_stay_in_memory_and_are_put_back(folder: Path) -> None:
    model = tiny_llama()
    before = state(model)
    move_to_files(model, Offload(folder, weights=True))
    kept = KeptModel(model, lambda values: values, as_in_file)
    with pytest.raises(InputError, match=r"model\.norm\.weight"), kept.as_it_was():
        model.model.norm.weight.data.add_(1)
    assert same_state(model, before)


@pytest.mark.parametrize("effort", ["fast", "standard", "thorough"])
def test_a_run_gives_the_same_model_and_certificate(folder: Path, effort: Any) -> None:
    options: Any = {"size": 0.8, "effort": effort, "margin": 0.5, "timing": False}
    options |= {"batch_size": 3}
    plain = rankfold.lossless(tiny_llama(), token_data(), **options)
    model = tiny_llama()
    before = state(model)
    # The limit is small, but leaves the refit as many examples as it takes without one.
    found = rankfold.lossless(
        model, token_data(), offload_folder=folder, model_offload=True, memory="1GB", **options
    )
    assert same_state(model, before) and in_files(model) and in_files(found.model)
    assert same_state(found.model, state(plain.model))
    assert found.certificate == plain.certificate
    shared = {id(parameter) for parameter in model.parameters()}
    assert any(id(parameter) in shared for parameter in found.model.parameters())
    assert not list(folder.iterdir())


def test_convs_and_what_has_no_blocks(folder: Path) -> None:
    options: Any = {"size": 0.7, "effort": "fast", "margin": 0.5, "timing": False}
    plain = rankfold.lossless(trained_cnn(), image_data(), **options)
    found = rankfold.lossless(
        trained_cnn(), image_data(), offload_folder=folder, model_offload=True, **options
    )
    assert same_state(found.model, state(plain.model))


def test_a_flag_that_is_none_and_a_model_elsewhere_are_refused(folder: Path) -> None:
    given: Any = {"offload_folder": folder, "size": 0.5}
    with pytest.raises(InputError, match="model_offload"):
        rankfold.lossless(tiny_llama(), token_data(), model_offload="no", **given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="model_offload is given, but the model is on meta"):
        rankfold.lossless(tiny_llama().to("meta"), token_data(), model_offload=True, size=0.5)
