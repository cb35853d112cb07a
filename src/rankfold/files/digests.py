"""SHA-256 digests of files, tensors and values of JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rankfold.files.json_file import read_bytes
from rankfold.model.sizes import stored_tensors


def file_digest(file: Path) -> str:
    """SHA-256 over the bytes of a file."""
    return hashlib.sha256(read_bytes(file)).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """``tensors_digest`` of what a file of the model holds."""
    return tensors_digest(stored_tensors(model)[0])


def json_digest(value: object) -> str:
    """SHA-256 of a value of JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
