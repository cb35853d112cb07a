"""Copies of a user's model; the user's own stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from rankfold.errors import InputError, visible

ModelT = TypeVar("ModelT", bound=nn.Module)


def copied(model: ModelT, memo: dict[int, Any]) -> ModelT:
    """A copy of a model by ``copy.deepcopy``.

    Args:
        model: The model.
        memo: What takes the place of parts of it, by ``id``; filled with what was copied.

    Raises:
        InputError: It can't be copied, as a lock or an open file can't; what can't is named.
    """
    for module in model.modules():
        for value in vars(module).values():
            # Kept from a pass with gradients, as by a model that shows its attention: torch copies
            # no such tensor.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    known = dict(memo)
    try:
        return copy.deepcopy(model, memo)
    except Exception:
        _refuse_uncopyable(model, known)
        raise


def _refuse_uncopyable(model: nn.Module, known: Mapping[int, Any]) -> None:
    shared = {**{id(module): module for module in model.modules()}, **known}
    for name, module in model.named_modules():
        if id(module) in known:
            continue
        for key, value in vars(module).items():
            try:
                copy.deepcopy(value, dict(shared))
            except Exception as error:
                raise InputError(
                    f"the model can't be copied, and rankfold works on copies: {key} of "
                    f"{visible(name) or 'the model itself'} ({type(module).__name__}) is a "
                    f"{type(value).__name__}: {error}. Delete it before, or make it where it is "
                    "used."
                ) from error
