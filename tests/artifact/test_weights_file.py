"""Weights of a user's own model, as rankfold and other tools write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from rankfold import InputError
from rankfold.artifact.weights_file import load_weights
from rankfold.model.sizes import stored_tensors
from tests.small_models import SmallCNN, mlp, same_state, state, tiny_llama, trained_cnn


def zeroed(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def own_names(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_weights_fill_a_model(tmp_path: Path) -> None:
    trained = tiny_llama()
    save_file(stored_tensors(trained)[0], tmp_path / "w.safetensors")
    found = load_weights(zeroed(tiny_llama()), tmp_path / "w.safetensors")
    assert same_state(found, state(trained))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", None, "no such weights file"),
        ("w.pt", b"x", "reads no pickles"),
        ("w.safetensors", b"x", "can't be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_weights(mlp(), tmp_path / name)


def test_a_file_without_counts_of_batches_leaves_the_models(tmp_path: Path) -> None:
    trained = trained_cnn()
    old = {n: t for n, t in own_names(trained).items() if "num_batches_tracked" not in n}
    assert len(old) < len(trained.state_dict())
    save_file(old, tmp_path / "old.safetensors")
    found = load_weights(zeroed(SmallCNN()), tmp_path / "old.safetensors")
    torch_s_own = SmallCNN()
    torch_s_own.load_state_dict(old)
    assert same_state(found, state(torch_s_own))
    assert int(found.get_buffer("features.1.num_batches_tracked")) == 0


def test_what_else_is_missing_is_named(tmp_path: Path) -> None:
    weights = own_names(trained_cnn())
    del weights["features.1.running_mean"]
    save_file(weights, tmp_path / "w.safetensors")
    fresh = SmallCNN()
    before = state(fresh)
    with pytest.raises(InputError, match=r"features\.1\.running_mean: missing"):
        load_weights(fresh, tmp_path / "w.safetensors")
    assert same_state(fresh, before)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_a_wrapper_are_those_of_the_model_in_it(prefix: str, tmp_path: Path) -> None:
    trained = trained_cnn()
    wrapped = {f"{prefix}{name}": tensor for name, tensor in own_names(trained).items()}
    save_file(wrapped, tmp_path / "w.safetensors")
    assert same_state(load_weights(zeroed(SmallCNN()), tmp_path / "w.safetensors"), state(trained))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 3)


def test_a_model_whose_own_names_begin_like_a_wrapper_s_keeps_them(tmp_path: Path) -> None:
    trained = Outer()
    save_file(own_names(trained), tmp_path / "w.safetensors")
    assert same_state(load_weights(zeroed(Outer()), tmp_path / "w.safetensors"), state(trained))
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(InputError, match=r"module\.weight: missing"):
        load_weights(Outer(), tmp_path / "empty.safetensors")


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_shared_tensor_stands_under_any_of_its_names(kept: str, tmp_path: Path) -> None:
    trained = tiny_llama()
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    weights = {n: t for n, t in own_names(trained).items() if n == kept or n not in names}
    assert len(weights) == len(trained.state_dict()) - 1
    save_file(weights, tmp_path / "w.safetensors")
    found = load_weights(zeroed(tiny_llama()), tmp_path / "w.safetensors")
    assert same_state(found, state(trained))
    assert found.get_parameter("lm_head.weight") is found.get_parameter("model.embed_tokens.weight")


def test_what_safetensors_saves_of_a_model_is_read(tmp_path: Path) -> None:
    trained = tiny_llama()
    save_model(trained, str(tmp_path / "w.safetensors"))
    found = load_weights(zeroed(tiny_llama()), tmp_path / "w.safetensors")
    torch.testing.assert_close(found.state_dict(), trained.state_dict(), rtol=0, atol=0)
