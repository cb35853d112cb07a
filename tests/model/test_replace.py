from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rankfold.files.tensors import safetensors_bytes
from rankfold.model.replace import put_modules, with_replaced
from rankfold.model.sizes import model_parameters, stored_tensors
from tests.small_models import same_state, state, tiny_llama, trained_cnn


class Twice(nn.Module):
    """One module under two names, in two parents."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.inner = nn.Sequential(self.first)


def test_a_copy_gets_the_new_modules_and_the_model_keeps_its_own() -> None:
    model = trained_cnn()
    before, head = state(model), nn.Linear(64, 5)
    twin = with_replaced(model, {"head": head}, {"features.0": torch.zeros(8, 27)})
    assert twin.head is head
    assert not twin.features[0].weight.any()
    assert same_state(model, before)
    assert twin.features[3].weight.data_ptr() != model.features[3].weight.data_ptr()


def test_a_copy_to_look_at_shares_what_is_not_moved_and_takes_weights_as_they_are() -> None:
    model = trained_cnn()
    before, moved = state(model), torch.zeros(8, 27)
    model.features[0].weight.requires_grad_(False)
    twin = with_replaced(model, {}, {"features.0": moved}, share=True)
    assert twin.features[0].weight.data_ptr() == moved.data_ptr()
    assert twin.features[0].weight.shape == model.features[0].weight.shape
    assert not twin.features[0].weight.requires_grad and twin.features[3].weight.requires_grad
    assert twin.features[3].weight is model.features[3].weight
    assert same_state(model, before)
    llama = tiny_llama()
    tied = with_replaced(llama, {}, {"lm_head": llama.lm_head.weight + 1}, share=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert torch.equal(tied.lm_head.weight, llama.lm_head.weight + 1)


def test_shared_modules_and_tied_weights_stay_shared() -> None:
    new = nn.Linear(4, 4)
    twin = with_replaced(Twice(), {"first": new})
    assert twin.first is twin.again is twin.inner[0] is new
    llama = with_replaced(tiny_llama(), {})
    assert llama.lm_head.weight is llama.model.embed_tokens.weight


def test_modules_are_put_everywhere_and_back() -> None:
    model, new = Twice(), nn.Linear(4, 4)
    old = model.first
    before = put_modules(model, {"first": new})
    assert model.first is model.again is model.inner[0] is new
    put_modules(model, before)
    assert model.first is model.again is model.inner[0] is old


def test_tied_weights_count_once() -> None:
    model = tiny_llama()
    embedding = model.model.embed_tokens.weight.numel()
    everything = sum(tensor.numel() for tensor in model.state_dict().values())
    assert model_parameters(model) == everything - embedding
    tensors, aliases = stored_tensors(model)
    assert aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_are_those_of_the_file(dtype: torch.dtype, tmp_path) -> None:
    tensors = {
        "größe.weight": torch.zeros(3, 5, dtype=dtype),
        "order": torch.arange(7, dtype=torch.int32),
        "a": torch.zeros((), dtype=torch.int64),
        "z": torch.zeros(3, dtype=torch.float64),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "flag": torch.zeros(5, dtype=torch.bool),
    }
    for metadata in ({}, {"format": "pt"}):
        file = tmp_path / "model.safetensors"
        save_file(tensors, file, metadata=metadata or None)
        assert safetensors_bytes(tensors, metadata) == file.stat().st_size
