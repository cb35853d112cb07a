"""What sizes count: parameters of the whole model, of its factorized layers, bytes, FLOPs."""

from __future__ import annotations

from torch import Tensor, nn


def model_parameters(model: nn.Module) -> int:
    """Parameters of the whole model; one shared by several modules counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file of the model holds: each tensor once, and the other names of shared ones.

    Returns:
        ``(tensors by name, {other name: name})``; parameters and persistent buffers.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach()
    return tensors, aliases
