"""The invariant: what a user has put on a layer is on whatever takes its place, or the layer stays
as it is and is listed with the reason."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.data import TensorDataset
from transformers.pytorch_utils import Conv1D

import rankfold
from rankfold import ArtifactError, InputError
from rankfold.model.find_layers import find_layers
from rankfold.model.of_user import hooked
from rankfold.model.replace import put_modules, with_replaced
from rankfold.model.unpack import unpack
from tests.small_models import pairs, seeded, tiny_llama, token_data


class InOtherWords(nn.Linear):
    def forward(self, values: Tensor) -> Tensor:
        return values @ self.weight.T + self.bias


class Prepared(nn.Conv2d):
    """Pads by a rule of its own."""

    def forward(self, values: Tensor) -> Tensor:
        return self._conv_forward(nn.functional.pad(values, (1, 0, 1, 0)), self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, values: Tensor) -> Tensor:
        return self.layer(values, values, values, need_weights=False)[0]


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: Tensor) -> Tensor:
        return self.layer(values)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 6), (2, 4)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed-1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 7)),
    "transposed-2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    "transformers": (lambda: Conv1D(6, 4), (2, 3, 4)),
    "weight-norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 6)), (2, 4)),
    "in-other-words": (lambda: InOtherWords(4, 6), (2, 4)),
    "rule": (lambda: Prepared(4, 6, 3), (2, 4, 5, 5)),
}


def around(name: str) -> tuple[nn.Module, Tensor]:
    if name == "attention":
        return seeded(1, Attention).eval(), torch.rand(2, 3, 4)
    make, shape = LAYERS[name]
    model = seeded(1, lambda: Around(make())).eval()
    return model, torch.rand(shape, generator=torch.Generator().manual_seed(0))


HOOKS: dict[str, Callable[[nn.Module, list[str]], object]] = {
    "output": lambda m, log: m.register_forward_hook(
        lambda _m, _a, out: log.append("output") or _scaled(out)
    ),
    "input": lambda m, log: m.register_forward_pre_hook(
        lambda _m, args: log.append("input") or tuple(a.clamp(max=0.5) for a in args)
    ),
    "keywords": lambda m, log: m.register_forward_hook(
        lambda _m, _a, _k, out: log.append("keywords") or _shifted(out), with_kwargs=True
    ),
    "first": lambda m, log: m.register_forward_hook(
        lambda _m, _a, out: log.append("first") or _shifted(out), prepend=True
    ),
    "looks": lambda m, log: m.register_forward_hook(lambda *_: log.append("looks")),
    "backward": lambda m, log: m.register_full_backward_hook(
        lambda _m, given, _out: log.append("backward")
    ),
}


def _scaled(out: Any) -> Any:
    return (out[0].tanh() * 2, *out[1:]) if isinstance(out, tuple) else out.tanh() * 2


def _shifted(out: Any) -> Any:
    return (out[0] + 0.25, *out[1:]) if isinstance(out, tuple) else out + 0.25


@settings(max_examples=60, deadline=None)
@given(
    name=strategies.sampled_from([*LAYERS, "attention"]),
    hooks=strategies.lists(strategies.sampled_from([*HOOKS]), min_size=1, max_size=4),
)
def test_hooks_go_along_when_a_layer_is_unpacked(name: str, hooks: list[str]) -> None:
    model, values = around(name)
    log: list[str] = []
    for hook in hooks:
        HOOKS[hook](model.layer, log)
    values.requires_grad_()
    wanted = model(values)
    wanted.sum().backward()
    expected, log[:] = list(log), []
    count = len(model.layer._forward_hooks)
    unpacked = unpack(model)
    again = values.detach().requires_grad_()
    found = unpacked.model(again)
    found.sum().backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(again.grad, values.grad)
    assert log == expected
    assert len(model.layer._forward_hooks) == count
    if unpacked.names:
        unpacked.model.layer.register_forward_hook(lambda *_: 1 / 0)
        model(values)  # hooks on the copy are not on the user's model


class Keeping(nn.Module):
    """A hook that is a method keeps what another layer needs: it must be the copy's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.second = nn.Linear(12, 5)
        self.first.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        self.kept = output.mean(-1, keepdim=True)
        return output * 2

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.first(values)
        return self.second(torch.tanh(hidden) + self.kept)


def test_a_hook_that_is_a_method_is_the_copys_own() -> None:
    model = seeded(3, Keeping)
    new = nn.Linear(6, 12)
    twin = with_replaced(model, {"first": new})
    (hook,) = new._forward_hooks.values()
    assert hook.__self__ is twin
    twin(torch.rand(3, 6))
    assert not hasattr(model, "kept")


@pytest.mark.parametrize("refit", [False, True])
def test_what_is_certified_computes_with_the_hooks(refit: bool) -> None:
    model = seeded(3, Keeping)
    values = torch.stack([x for x, _ in pairs(300)])
    labels = model(values).argmax(1)
    data = TensorDataset(values, labels)
    result = rankfold.lossless(model, data, size=0.9, refit=refit, gradient_step=False)
    cut = [layer["name"] for layer in result.report["layers"] if layer["rank"] is not None]
    assert cut
    for name in ("first", "second"):
        expected = [model._keep.__func__] if name == "first" else []
        hooks = [*result.model.get_submodule(name)._forward_hooks.values()]
        assert [hook.__func__ for hook in hooks] == expected
        assert all(hook.__self__ is result.model for hook in hooks)
    with torch.no_grad():
        first, second = result.model.first, result.model.second
        weights = [
            m.weight if isinstance(m, nn.Linear) else m.dense_matrix() for m in (first, second)
        ]
        hidden = values @ weights[0].T + first.bias
        found = torch.tanh(2 * hidden) + hidden.mean(-1, keepdim=True)
        torch.testing.assert_close(result.model(values), found @ weights[1].T + second.bias)


class Scaled(nn.Linear):
    """A subclass with state of its own."""

    def __init__(self, *sides: int) -> None:
        super().__init__(*sides)
        self.alpha = 0.5
        self.register_buffer("steering", torch.arange(6.0))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.gain = nn.Parameter(torch.full((6,), 1.5))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}"


class AsksLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Scaled(6, 6)
        self.layer.tags = ["a"]
        self.head = nn.Linear(6, 5)

    def forward(self, values: Tensor) -> Tensor:
        layer = self.layer
        return self.head(layer.alpha * layer(values) * layer.gain + layer.steering)


def test_buffers_parameters_attributes_and_a_subclass_state_go_along(tmp_path: Path) -> None:
    model = seeded(3, AsksLayer)
    values = torch.stack([x for x, _ in pairs(200)])
    labels = model(values).argmax(1)
    result = rankfold.lossless(model, TensorDataset(values, labels), size=0.8)
    layer = result.model.layer
    assert not isinstance(layer, nn.Linear)
    assert (layer.alpha, layer.tags) == (0.5, ["a"])
    assert layer.tags is not model.layer.tags
    assert torch.equal(layer.steering, model.layer.steering)
    assert layer.gain is not model.layer.gain
    assert {"layer.gain", "layer.steering"} <= result.model.state_dict().keys()
    assert "layer.scratch" not in result.model.state_dict()
    again = rankfold.load(result.save(tmp_path / "out"), model=AsksLayer())
    assert torch.equal(again(values), result.model(values))


def _with(change: Callable[[Any], object], kind: type[nn.Module] = nn.Linear) -> nn.Module:
    layer: Any = kind(6, 6)
    change(layer)
    return layer


class Extra(nn.Linear):
    def half(self) -> Tensor:
        return self.weight / 2


class Calls(nn.Linear):
    def __call__(self, values: Tensor) -> Tensor:
        return super().__call__(values) * 2


class Moves(nn.Linear):
    def train(self, mode: bool = True) -> Any:
        return super().train(mode)


class Starts(nn.Linear):
    """Defines nothing that it computes with."""

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


STAY: list[tuple[Callable[[], nn.Module], str | None]] = [
    (lambda: _with(lambda m: setattr(m, "forward", lambda x: x)), "forward was set on the layer"),
    (
        lambda: _with(lambda m: setattr(m, "forward", types.MethodType(nn.Linear.forward, m))),
        "forward was set on the layer",
    ),
    (lambda: Extra(6, 6), "Extra has methods of its own: half"),
    (lambda: Calls(6, 6), "Calls has methods of its own: __call__"),
    (lambda: Moves(6, 6), "Moves has methods of its own: train"),
    (lambda: Starts(6, 6), None),
    (lambda: _with(lambda m: m.add_module("adapter", nn.ReLU())), "modules of its own: adapter"),
    (lambda: _with(lambda m: m._register_state_dict_hook(lambda *_: None)), "state_dict has hooks"),
    (lambda: _with(lambda m: m.weight.register_hook(lambda g: g * 2)), "parameter of it has hooks"),
    (lambda: _with(lambda m: setattr(m, "NANOGPT_SCALE_INIT", 1)), None),
]


@pytest.mark.parametrize(("make", "reason"), STAY)
def test_a_layer_with_a_behaviour_of_its_own_stays_and_is_listed(
    make: Callable[[], nn.Module], reason: str | None
) -> None:
    model = nn.Sequential(make(), nn.Linear(6, 6))
    layers, skipped = find_layers(unpack(model).model)
    assert ("0" in layers) is (reason is None)
    assert [reason in s.reason for s in skipped] == [True] * (reason is not None)


def test_an_attribute_that_the_new_layer_uses_otherwise_is_refused_by_name() -> None:
    model = nn.Sequential(_with(lambda m: setattr(m, "kernel_size", 7)), nn.Linear(6, 6))
    with pytest.raises(InputError, match="layer 0 has kernel_size, which Conv2d"):
        with_replaced(model, {"0": nn.Conv2d(6, 6, 1)})


def test_modules_are_put_and_put_back_with_what_is_on_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda _m, _a, out: out + 1)
    old, new = model[0], nn.Linear(4, 4)
    before = put_modules(model, {"0": new})
    assert [*new._forward_hooks] == [*old._forward_hooks]
    put_modules(model, before)
    assert model[0] is old and len(old._forward_hooks) == 1


def test_older_norms_go_and_the_users_hooks_beside_them_stay() -> None:
    with pytest.warns(FutureWarning):
        layer = weight_norm(nn.Conv1d(4, 4, 3))
    model = nn.Sequential(layer)
    model[0].register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
    values = torch.rand(1, 4, 5)
    wanted = model(values).detach()
    twin = unpack(model).model
    torch.testing.assert_close(twin(values), wanted)
    assert len(twin[0]._forward_pre_hooks) == 1


def test_no_file_holds_hooks_so_a_model_without_them_is_refused(tmp_path: Path) -> None:
    model = seeded(3, Keeping)
    values = torch.stack([x for x, _ in pairs(200)])
    labels = model(values).argmax(1)
    result = rankfold.lossless(model, TensorDataset(values, labels), size=0.8)
    folder = result.save(tmp_path / "own")
    again = rankfold.load(folder, model=Keeping())
    assert torch.equal(again(values), result.model(values))
    without = Keeping()
    without.first._forward_hooks.clear()
    with pytest.raises(ArtifactError, match=r"none on these modules:\n  first"):
        rankfold.load(folder, model=without)

    llama = tiny_llama()
    handle = llama.model.layers[0].mlp.down_proj.register_forward_hook(lambda _m, _a, y: y * 1.5)
    assert hooked(llama) == ["model.layers.0.mlp.down_proj"]
    result = rankfold.lossless(llama, token_data(), size=0.8)
    folder = result.save(tmp_path / "llama")
    with pytest.raises(ArtifactError, match=r"hooks(.|\n)*layers\.0\.mlp\.down_proj"):
        rankfold.load(folder)
    with pytest.raises(ArtifactError, match="which no file holds"):
        type(llama).from_pretrained(folder)
    ids = token_data().held_out[0][None]
    again = rankfold.load(folder, model=llama)
    assert torch.equal(again(ids).logits, result.model(ids).logits)
    handle.remove()
