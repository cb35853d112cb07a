"""Tensors of a safetensors file that may be damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankfold.errors import InputError
from rankfold.model.sizes import model_parameters, stored_tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        InputError: It can't be read.
    """
    if not file.is_file():  # a pipe or device would never end
        raise InputError(f"{file} can't be read: there is no such file.")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, MemoryError, SafetensorError) as error:
        raise InputError(f"{file} can't be read: {error}") from error


METADATA = {"format": "pt"}

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


def model_sizes(model: nn.Module) -> dict[str, int]:
    """Parameters of the whole model, tied ones once, and bytes of its ``model.safetensors``."""
    tensors, _ = stored_tensors(model)
    return {"parameters": model_parameters(model), "bytes": safetensors_bytes(tensors, METADATA)}
