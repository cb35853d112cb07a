"""Layers whose weight is computed from others: parametrizations, weight norm, spectral norm."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankfold.model.evaluation_mode import evaluation_mode


def weight_hooks(module: nn.Module) -> list[tuple[int, Any]]:
    """Hooks of the older ``weight_norm`` and ``spectral_norm``, which compute a weight."""
    return [
        (key, hook)
        for key, hook in module._forward_pre_hooks.items()
        if type(hook).__module__.startswith("torch.nn.utils.")
        and hasattr(hook, "remove")
        and hasattr(hook, "name")
    ]


def baked(module: nn.Module) -> nn.Module:
    """A shallow copy whose computed weights are plain parameters of their present values.

    torch's own ``remove_parametrizations`` changes the class, which the user's module has, too.
    """
    parametrized = parametrize.is_parametrized(module)
    kind = parametrize.type_before_parametrizations(module) if parametrized else type(module)
    twin = shallow_copy(module, kind)
    if parametrized:
        lists = cast("nn.ModuleDict", twin._modules.pop("parametrizations"))
        with evaluation_mode(module):  # a weight that is updated in training is read as it is
            for name in lists:
                value: Tensor = getattr(module, name)
                twin.register_parameter(name, nn.Parameter(value.detach().clone()))
        return twin
    for name in ("_state_dict_hooks", "_load_state_dict_pre_hooks"):
        twin.__dict__[name] = {
            key: hook
            for key, hook in module.__dict__[name].items()
            if not type(getattr(hook, "hook", hook)).__module__.startswith("torch.nn.utils.")
        }
    twin.training = False
    for key, hook in weight_hooks(module):
        hook.remove(twin)
        twin._forward_pre_hooks.pop(key)
    twin.training = module.training
    return twin


def shallow_copy(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A module of this class with the same parts; others can be put on it."""
    twin: nn.Module = object.__new__(kind)
    twin.__dict__ = {
        name: copy.copy(value) if isinstance(value, dict | set) else value
        for name, value in module.__dict__.items()
    }
    return twin
