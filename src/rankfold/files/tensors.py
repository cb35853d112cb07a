"""Tensors of a safetensors file that may be damaged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankfold.errors import InputError, note
from rankfold.model.sizes import model_parameters, stored_tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        InputError: It can't be read.
    """
    with _reading(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def read_each(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file one after the other, in the order of their names.

    Raises:
        InputError: It can't be read.
    """
    with _reading(file) as opened:
        for name in sorted(opened.keys()):
            yield name, opened.get_tensor(name)


def read_names(file: Path) -> list[str]:
    """The names of all tensors of a safetensors file.

    Raises:
        InputError: It can't be read.
    """
    with _reading(file) as opened:
        return list(opened.keys())


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    if not file.is_file():  # a pipe or device would never end
        raise InputError(f"{file} can't be read: there is no such file.")
    try:
        # Read, not mapped: a mapped file that another process writes changes the tensors, and one
        # that is cut ends this process.
        with safe_open(file, framework="pt", backend="pread") as opened:
            note(*opened.keys())
            yield opened
    except (OSError, MemoryError, SafetensorError) as error:
        raise InputError(f"{file} can't be read: {error}") from error


# Modules that hold a model, or a layer of it, in a wrapper of torch: compiled, sharded,
# checkpointed. No module of a model is called so.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_DATA_PARALLEL = "module."  # before all names of a model that was saved in such a wrapper


def without_wrappers(
    names: Iterable[str], where: str, wanted: Iterable[str] = ()
) -> dict[str, str]:
    """For each name of a tensor, its name in the model itself.

    Args:
        names: As a file has them, perhaps saved in wrappers around the model or its layers.
        where: The file, for messages.
        wanted: The model's names, where they are known; its own may have wrappers, too.

    Raises:
        InputError: Two names become one.
    """
    names, wanted = list(names), list(wanted)
    if set(names) <= set(wanted):
        return {name: name for name in names}
    here = {_without(name): name for name in wanted}
    inner = [_without(name) for name in names]
    if not any(name.startswith(_DATA_PARALLEL) for name in here):
        while inner and all(name.startswith(_DATA_PARALLEL) for name in inner):
            inner = [name.removeprefix(_DATA_PARALLEL) for name in inner]
    found = {name: here.get(own, own) for name, own in zip(names, inner, strict=True)}
    first: dict[str, str] = {}
    for name, own in found.items():
        if own in first:
            raise InputError(
                f"{where} holds {first[own]} and {name}, which are one and the same {own} without "
                "the wrappers around the model. Save the model once, without its wrappers."
            )
        first[own] = name
    return found


def _without(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


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
