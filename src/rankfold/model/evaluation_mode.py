"""Put a user's model into a state for a while, and give it back exactly as it was."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: nn.Module, trainable: Collection[Tensor] = ()) -> Iterator[None]:
    """Run with every module in eval mode and only ``trainable`` parameters requiring gradients.

    Every submodule's ``training`` flag and every parameter's ``requires_grad`` are restored on
    the way out, whatever happens. torch's fast path of its transformer layers is off: it goes past
    the layers, and gives zeros at hidden positions.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    wanted = {id(parameter) for parameter in trainable}
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in training:
            module.training = False
        for parameter in required:
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.set_grad_enabled(bool(wanted)):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
