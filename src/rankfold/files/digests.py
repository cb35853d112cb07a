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

CHUNK = 1 << 20  # bytes that are read at once


def file_digest(file: Path) -> str:
    """SHA-256 over the bytes of a file of limited size.

    Raises:
        InputError: It is too long, no file, or can't be read.
    """
    return digest_of_bytes(read_bytes(file))


def stream_digest(file: Path) -> str:
    """SHA-256 over the bytes of a file of any size, which is never whole in memory.

    Raises:
        OSError: It can't be read.
    """
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of_bytes(content: bytes) -> str:
    """SHA-256 over bytes."""
    return hashlib.sha256(content).hexdigest()


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
