"""Weights in several files: what is read is what was written, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import rankfold
from rankfold import ArtifactError, InputError
from rankfold.files.shards import (
    INDEX,
    SINGLE,
    read_weights,
    weight_files,
    weights_size,
    write_weights,
)
from rankfold.files.tensors import METADATA
from tests.small_models import state, tiny_llama, token_data, token_windows

TENSORS = {name: torch.randn(3, n) for n, name in enumerate("abcdef", 1)}


def test_one_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    assert write_weights(tmp_path, TENSORS) == [tmp_path / SINGLE]
    save_file(TENSORS, tmp_path / "other.safetensors", metadata=METADATA)
    assert (tmp_path / SINGLE).read_bytes() == (tmp_path / "other.safetensors").read_bytes()


@pytest.mark.parametrize("largest", [1, 12, 40, 100, 251])
def test_several_files_hold_what_was_given(tmp_path: Path, largest: int) -> None:
    files = write_weights(tmp_path, TENSORS, largest)
    assert len(files) > 1 and weight_files(tmp_path) == files
    sizes = [[12 * int(t.shape[1]) for t in _tensors(file).values()] for file in files]
    assert all(sum(one) <= largest or len(one) == 1 for one in sizes)
    found = read_weights(tmp_path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert weights_size(tmp_path) == sum(file.stat().st_size for file in files)
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 252


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from rankfold.files.tensors import read_tensors

    return read_tensors(file)


DAMAGES: dict[str, tuple[Any, str]] = {
    "no map": (lambda index: index.pop("weight_map"), "no weight_map"),
    "elsewhere": (lambda index: index["weight_map"].update(a="../x.safetensors"), "no file beside"),
    "missing": (lambda index: index["weight_map"].update(a="x.safetensors"), "lacks files"),
    "one more": (lambda index: index["weight_map"].update(z=index["weight_map"]["a"]), "z in "),
    "one less": (lambda index: index["weight_map"].pop("a"), "a in "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: str) -> None:
    write_weights(tmp_path, TENSORS, 40)
    index = json.loads((tmp_path / INDEX).read_text())
    change, said = DAMAGES[damage]
    change(index)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=said):
        read_weights(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[rankfold.Result, Path, Path]:
    top = tmp_path_factory.mktemp("saved")
    options: Any = {"size": 0.8, "effort": "fast", "margin": 0.5, "timing": False}
    result = rankfold.lossless(tiny_llama(), token_data(), **options)
    result.save(top / "one")
    result.save(top / "several", max_shard_size="20KB")
    return result, top / "one", top / "several"


def test_an_artifact_in_several_files_opens_as_one_file_does(
    saved: tuple[rankfold.Result, Path, Path], tmp_path: Path
) -> None:
    result, one, several = saved
    assert weight_files(one) == [one / SINGLE] and len(weight_files(several)) > 2
    assert (one / "certificate.json").read_bytes() == (several / "certificate.json").read_bytes()
    manifests = [json.loads((folder / "rankfold.json").read_text()) for folder in (one, several)]
    assert manifests[0]["digest"] == manifests[1]["digest"]
    listed = [file.name for file in weight_files(several)]
    assert {*listed, INDEX} <= {*manifests[1]["files"]} and SINGLE not in manifests[1]["files"]
    for opened in (rankfold.load(several), AutoModelForCausalLM.from_pretrained(several)):
        wanted, found = state(result.model), state(opened)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert rankfold.verify(several, result.model, token_windows(12, 23)).holds
    exported = rankfold.export(several, tmp_path / "dense", to="dense")
    assert exported.factorized_bytes == weights_size(several)
    result.save(several, overwrite=True)  # in one file again: nothing of the others is left
    assert weight_files(several) == [several / SINGLE]
    assert len(list(several.glob("*.safetensors*"))) == 1
    result.save(several, overwrite=True, max_shard_size="20KB")


def test_each_file_is_checked(saved: tuple[rankfold.Result, Path, Path]) -> None:
    _, _, several = saved
    for file in weight_files(several):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ArtifactError, match="their digest is not the one stated"):
            rankfold.load(several)
        file.write_bytes(whole)
    file.unlink()
    with pytest.raises(ArtifactError, match=file.name):
        rankfold.load(several)
    file.write_bytes(whole)


def test_an_amount_that_is_none_is_refused(saved: tuple[rankfold.Result, Path, Path]) -> None:
    result, one, _ = saved
    with pytest.raises(InputError, match="max_shard_size is '5 apples'"):
        result.save(one.parent / "new", max_shard_size="5 apples")
    assert not (one.parent / "new").exists()
