"""Put factorized modules and moved weights into a copy of a model, by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfold.model.copied import copied
from rankfold.model.of_user import carry_over


def with_replaced(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    weights: Mapping[str, Tensor] | None = None,
    *,
    share: bool = False,
) -> nn.Module:
    """A copy of the model with some modules exchanged and some weights moved.

    The user's model is untouched; parameters that it shares between modules stay shared in the
    copy. The weights of exchanged modules are not copied; what else is on them goes along.
    A new module's bias becomes the copy's, where the old one's was shared.

    Args:
        model: The model.
        modules: New modules by the name of the one that they replace.
        weights: New weights by the name of the module that holds them.
        share: Leave all other parameters the model's own, and take the new weights as they are,
            for a copy that is only looked at.
    """
    weights = weights or {}
    memo: dict[int, Any] = {
        id(model.get_submodule(name)): module for name, module in modules.items()
    }
    if share:
        memo |= {id(p): p for p in model.parameters()}
        for name, weight in weights.items():
            old = cast("nn.Parameter", model.get_submodule(name).weight)
            memo[id(old)] = nn.Parameter(weight.to(old).view_as(old), old.requires_grad)
    twin = copied(model, memo)
    for name, module in modules.items():
        carry_over(name, model.get_submodule(name), module, partial(copy.deepcopy, memo=memo))
        # A bias that stands in another module, too, as a masked language model's does.
        bias = memo.get(id(getattr(model.get_submodule(name), "bias", None)))
        if isinstance(bias, nn.Parameter) and getattr(module, "bias", None) is not None:
            module.bias = bias
    if not share:
        with torch.no_grad():
            for name, weight in weights.items():
                parameter = cast("nn.Parameter", twin.get_submodule(name).weight)
                parameter.copy_(weight.view_as(parameter))
    return twin


def put_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Exchange modules of ``model`` itself, at every place where each one stands.

    What the user has put on them goes along.

    Returns:
        The modules that stood there, by the same names: putting them back undoes the exchange.
    """
    before = {name: model.get_submodule(name) for name in modules}
    new = {id(before[name]): module for name, module in modules.items()}
    for name, module in modules.items():
        carry_over(name, before[name], module)
    for parent in list(model.modules()):
        # _modules, not named_children: that leaves out a module's second name in one parent.
        for child_name, child in list(parent._modules.items()):
            if id(child) in new:
                setattr(parent, child_name, new[id(child)])
    return before
