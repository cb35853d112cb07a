"""What sizes count: parameters of the whole model, of its factorized layers, bytes, FLOPs."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor, nn

# The names that safetensors gives to types, in the order in which it writes tensors.
_TYPE_NAMES = {
    "torch.int64": "I64",
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.int32": "I32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
_TYPE_ORDER = {name: place for place, name in enumerate(_TYPE_NAMES)}


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


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Exact length of the safetensors file of these tensors, header included."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    ordered = sorted(
        tensors.items(), key=lambda item: (_TYPE_ORDER.get(str(item[1].dtype), -1), item[0])
    )
    for name, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPE_NAMES.get(str(tensor.dtype), str(tensor.dtype)),
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padded = -(-len(text) // 8) * 8
    return 8 + padded + offset
