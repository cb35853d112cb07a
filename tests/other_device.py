"""Runs rankfold on the CPU and on another device, and prints what came out.

The device is ``cuda``, or ``emulated`` for machines without one: its tensors are the CPU's
underneath, and an operation that mixes them with the CPU's own is refused, as CUDA refuses it. It
is run in a process of its own, because PyTorch registers a device for good.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from tempfile import TemporaryDirectory
from typing import Any

import torch
from few_rounds import few_rounds  # it stands beside this script
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.data import TensorDataset

import rankfold
from rankfold.model import unsuitable

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
# On the device these take places from the CPU too.
INDEXING = (
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
)


class OnEmulated(Tensor):
    """A tensor of the device ``emulated``; ``inner`` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnEmulated:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("emulated", 0),
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> OnEmulated:
        return OnEmulated(inner["inner"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            twin: Tensor = OnEmulated(self.inner.detach().clone())
            if getattr(self, "_is_param", False):
                twin = nn.Parameter(twin, self.requires_grad)
            memo[id(self)] = twin.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives; its results are where its tensors were, or where it says."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    refuse_mixed(func, args, tensors)
    mixed = func in COPIES
    there = isinstance(tensors[0], OnEmulated) if mixed else any_emulated(tensors)
    kwargs = dict(kwargs)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == "emulated"
        kwargs["device"] = torch.device("cpu")
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: expected a generator of the device, not of the CPU")
    plain_args, plain_kwargs = pytree.tree_map_only(OnEmulated, lambda x: x.inner, (args, kwargs))
    if func is aten._to_copy.default:
        plain_args = (plain_args[0].clone(), *plain_args[1:])  # a copy even to the same device
    out = func(*plain_args, **plain_kwargs)
    if not there:
        return out
    out = pytree.tree_map_only(
        Tensor, lambda x: x if isinstance(x, OnEmulated) else OnEmulated(x), out
    )
    if any_emulated(tensors):
        return return_and_correct_aliasing(func, args, kwargs, out)
    return out


def any_emulated(tensors: list[Tensor]) -> bool:
    return any(isinstance(x, OnEmulated) for x in tensors)


def refuse_mixed(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise where CUDA would: tensors of both devices, but for numbers and for places."""
    if func in COPIES or not any_emulated(tensors):
        return
    if func in INDEXING:
        tensors = [x for x in (args[0], *args[2:3]) if isinstance(x, Tensor)]
    first, *others = tensors
    for x in others:
        if isinstance(x, OnEmulated) != isinstance(first, OnEmulated) and x.dim():
            raise RuntimeError(f"{func}: tensors of {first.device} and of {x.device}")
    if func in INDEXING and not isinstance(first, OnEmulated):
        raise RuntimeError(f"{func}: places of {first.device} are on another device")


class Emulated(TorchDispatchMode):
    """While it is entered, tensors can be made on, and moved to, the device ``emulated``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def register() -> None:
    """Make the device known, before anything is differentiated: autograd counts devices then."""
    backend_registration._setup_privateuseone_for_python_backend("emulated")


@contextmanager
def emulated() -> Iterator[None]:
    """The device is there, and its tensors count as plain ones."""
    quantized = unsuitable._quantized
    unsuitable._quantized = lambda module: None  # it takes only torch.Tensor itself for plain
    try:
        with Emulated():
            yield
    finally:
        unsuitable._quantized = quantized


def convolutional() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    images = torch.randn(600, 1, 8, 8)
    return net.eval(), TensorDataset(images, images.flatten(1)[:, :10].argmax(1))


def language() -> tuple[nn.Module, Any]:
    from tiny_language_model import TEXT, tiny_llama

    model, tokenizer = tiny_llama(steps=30)
    tokens = torch.tensor(tokenizer(TEXT, verbose=False)["input_ids"])
    return model, list(tokens[: len(tokens) // 32 * 32].view(-1, 32)[:300])


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "convolutional": convolutional,
    "language": language,
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "conv two rounds": ("convolutional", "lossless", {"size": 0.7, "rounds": 2}),
    "conv damping": ("convolutional", "lossless", {"size": 0.7, "damping": "auto"}),
    "conv compact": ("convolutional", "compact", {"margin": 0.1}),
    "language lossless": ("language", "lossless", {"size": 0.8}),
    "language no step": ("language", "lossless", {"size": 0.8, "gradient_step": False}),
    "language embeddings": ("language", "lossless", {"size": 0.7, "embeddings": True}),
}


def outcome(case: str, model: nn.Module, data: Any) -> dict[str, Any]:
    kind, algorithm, settings = CASES[case]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = getattr(rankfold, algorithm)(copy.deepcopy(model), data, **settings)
    skeleton = convolutional()[0] if kind == "convolutional" else None
    with TemporaryDirectory() as folder:
        result.save(folder, overwrite=True)
        loaded = rankfold.load(folder, model=skeleton)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name].cpu()), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return {
        "change": result.certificate.change,
        "ratio": result.ratio,
        "devices": sorted({p.device.type for p in result.model.parameters()}),
    }


def both(device: str) -> dict[str, dict[str, dict[str, Any]]]:
    """By case what the CPU gave and what the device did."""
    if device == "emulated":
        register()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    made = {name: make() for name, make in MODELS.items()}
    for case, (name, _, _) in CASES.items():
        model, data = made[name]
        found[case] = {"cpu": outcome(case, model, data)}
    with emulated() if device == "emulated" else nullcontext():
        for case, (name, _, _) in CASES.items():
            model, data = made[name]
            there = copy.deepcopy(model).to(device)
            found[case][device] = outcome(case, there, data)
    return found


if __name__ == "__main__":
    few_rounds()
    torch.backends.cudnn.allow_tf32 = False  # as exact as the CPU's
    print(json.dumps(both(sys.argv[1]), indent=1))
