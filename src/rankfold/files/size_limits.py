"""A look at what a description asks for, before it takes time or memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import get_ident

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from rankfold.errors import InputError

# Far from any real model, near enough that nothing breaks.
MODULES_A_TENSOR = 100
NUMBERS_A_NUMBER = 1000
SMALL_MODEL = 10_000_000  # numbers, which any machine has room for


def check_modest(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor], where: str) -> None:
    """Build a model without memory, no further than the weights that it is to hold allow.

    Args:
        make: Builds it.
        tensors: Its weights.
        where: What describes it, for messages.

    Raises:
        InputError: It has far more modules or numbers than the weights.
    """
    most = 1000 + MODULES_A_TENSOR * len(tensors)
    made = 0
    here = get_ident()

    def count(*_: object) -> None:
        nonlocal made
        made += get_ident() == here
        if made > most:
            raise InputError(
                f"{where} asks for more than {most} modules, and the weights are {len(tensors)} "
                "tensors: the folder is damaged."
            )

    handle = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            model = make()
    finally:
        handle.remove()
    asked = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = sum(tensor.numel() for tensor in tensors.values())
    if asked > max(SMALL_MODEL, NUMBERS_A_NUMBER * stored):
        raise InputError(
            f"{where} asks for {asked} numbers, and the weights are {stored}: the folder is "
            "damaged."
        )
