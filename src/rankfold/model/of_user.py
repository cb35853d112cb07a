"""What a user has put on a layer beside its weights, and a layer in its place has to have, too.

Hooks, buffers, parameters and attributes go along (``carry_over``). A layer that was given a
behaviour of its own, which nothing can go along with, stays as it is (``own_behaviour``).
"""

from __future__ import annotations

import copy
import dis
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.utils import parametrize

from rankfold.errors import InputError

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip
_STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip
LayerT = TypeVar("LayerT", bound=nn.Module)
_LIBRARIES = ("torch.", "transformers.", "rankfold.")
# What a class may define that changes nothing its instances compute: how they are made and shown.
_OF_NO_EFFECT = re.compile(
    r"__(?!call__|getattr|setattr|deepcopy__|getstate__|setstate__|reduce).*__|_abc_impl"
    r"|.*(init|reset|repr).*|forward|_conv_forward"
)


def carry_over(
    name: str, old: nn.Module, new: nn.Module, copied: Callable[[Any], Any] = lambda value: value
) -> None:
    """Give what takes a layer's place all that the user has put on the layer.

    Args:
        name: Of the layer, for messages.
        old: The layer.
        new: What takes its place.
        copied: Of a value on the layer the one that goes along.

    Raises:
        InputError: ``new`` has another thing of the same name.
    """
    for kind in _HOOKS:
        hooks = {k: h for k, h in getattr(old, kind).items() if not _of_torch(h)}
        getattr(new, kind).update(copied(hooks))
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook
    if not _is_of_library(next(kind for kind in type(old).__mro__ if "forward" in vars(kind))):
        return  # what it holds is what it computes with, and new was made of it
    own = _assigned(cast("Any", type(old))) | {"weight", "bias"} | set(_computed_from(old))
    for kind in ("_parameters", "_buffers"):
        for key, value in getattr(old, kind).items():
            if key not in own:
                _refuse_another(name, key, new, value)
                getattr(new, kind)[key] = copied(value)
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set & new._buffers.keys()
    for key in vars(old).keys() - vars(nn.Module()).keys() - own:
        _refuse_another(name, key, new, vars(old)[key])
        setattr(new, key, copied(vars(old)[key]))


def own_behaviour(module: nn.Module, *, of_class: bool = True) -> str | None:
    """Why nothing else can take a layer's place, or None.

    Args:
        module: A stock layer, or of a class that computes what a stock one does.
        of_class: Look at what its class defines, too.
    """
    methods = [key for key, value in vars(module).items() if _is_method(module, key, value)]
    if methods:
        return f"it has a method of its own: {', '.join(methods)} was set on the layer itself"
    if of_class and (methods := [*_own_methods(parametrize.type_before_parametrizations(module))]):
        return f"{type(module).__name__} has methods of its own: {', '.join(methods)}"
    if any(not _of_torch(hook) for kind in _STATE_HOOKS for hook in vars(module)[kind].values()):
        return "its state_dict has hooks"
    if any(p is not None and p._backward_hooks for p in module._parameters.values()):
        return "a parameter of it has hooks"
    # A forward of its own computes with the modules that it holds, and is looked at as a whole.
    if of_class and isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd):
        inner = module._modules.keys() - {"parametrizations"}
        if inner:
            return f"it holds modules of its own: {', '.join(sorted(inner))}"
    return None


def hooked(model: nn.Module) -> list[str]:
    """Names of the modules whose forward pass has hooks of the user's."""
    return [
        name
        for name, module in model.named_modules()
        if any(
            not _is_of_library(hook)
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
            for hook in hooks.values()
        )
    ]


def bare_copy(module: LayerT, memo: dict[int, Any] | None = None) -> LayerT:
    """A copy of a layer without its hooks: what they are bound to, often the model, stays."""
    memo = {} if memo is None else memo
    for part in module.modules():
        for hooks in (getattr(part, kind) for kind in _HOOKS):
            memo[id(hooks)] = type(hooks)()
    return copy.deepcopy(module, memo)


def _computed_from(module: nn.Module) -> Iterator[str]:
    """Parameters and buffers from which hooks of torch compute a weight."""
    for hook in module._forward_pre_hooks.values():
        if _of_torch(hook) and hasattr(hook, "name"):
            stem = f"{hook.name}_"
            yield from (k for k in (*module._parameters, *module._buffers) if k.startswith(stem))
            yield hook.name


def _refuse_another(name: str, key: str, new: nn.Module, value: object) -> None:
    if key not in _assigned(cast("Any", type(new))) and not hasattr(type(new), key):
        return
    if not hasattr(new, key) or not _same(getattr(new, key), value):
        raise InputError(
            f"the layer {name or 'at the root'} has {key}, which {type(new).__name__} in its place "
            "uses for something else. Give it another name, or leave the layer out with exclude=."
        )


def _same(one: object, other: object) -> bool:
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, int | float | str | tuple) and one == other


def _is_method(module: nn.Module, key: str, value: object) -> bool:
    return callable(value) and hasattr(type(module), key) and key not in vars(nn.Module())


def _own_methods(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        if _is_of_library(base):
            return
        yield from (key for key in vars(base) if not _OF_NO_EFFECT.fullmatch(key))


def _is_of_library(made: object) -> bool:
    """Whether a class or a hook is one of torch, transformers or rankfold."""
    return f"{getattr(made, '__module__', '')}.".startswith(_LIBRARIES)


def _of_torch(hook: object) -> bool:
    """Whether a hook is one by which torch computes a weight from others."""
    hook = getattr(hook, "hook", hook)
    return str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")


@cache
def _assigned(kind: Any) -> frozenset[str]:
    """Names that the methods of the library's classes among the bases store on an instance."""
    functions = (
        inspect.unwrap(value)
        for base in kind.__mro__
        if _is_of_library(base)
        for value in vars(base).values()
        if isinstance(value, FunctionType)
    )
    return frozenset(name for function in functions for name in _stored_by(function))


def _stored_by(function: Callable[..., Any]) -> Iterator[str]:
    """Names that a function stores on an object, or registers a parameter or buffer by."""
    for step in dis.get_instructions(function):
        if step.opname == "STORE_ATTR":
            yield str(step.argval)
        if step.opname == "LOAD_CONST":
            found = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            yield from (name for name in found if isinstance(name, str))
