"""Weights of a model in private files: what isn't in use takes no memory.

Each large tensor lies in a file without a name, mapped so that changes stay in this process' memory
(``MAP_PRIVATE``). The system drops pages that aren't in use and reads them again when they are.
The file itself keeps the values as they were, whatever changes the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.weak import WeakIdKeyDictionary

from rankfold.machine.offload import Offload

# By parameter or buffer of a model in files, its values as they lie in its file.
_AS_IN_FILE = WeakIdKeyDictionary()


def as_in_file(tensor: Tensor) -> Tensor | None:
    """The values that lie in a tensor's own file; None where it has none."""
    found: Tensor | None = _AS_IN_FILE.get(tensor)
    return found


def in_files(model: nn.Module) -> bool:
    """Whether most of a model's bytes lie in files."""
    there = memory = 0
    for tensor in model.parameters():
        if isinstance(tensor, UninitializedParameter):
            continue
        size = tensor.numel() * tensor.element_size()
        if tensor in _AS_IN_FILE or _is_mapped(tensor):
            there += size
        else:
            memory += size
    return there > memory


def move_to_files(
    model: nn.Module, offload: Offload, known: Mapping[int, Tensor] | None = None
) -> None:
    """Let a model's large tensors lie in files, with the same values and strides.

    Those that share their memory with others stay where they are.

    Args:
        model: On the CPU.
        offload: Says where files lie.
        known: Of tensors that lie in a file already (``Offload.private``), by their address, the
            values in that file.

    Raises:
        InputError: The folder is full.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu" or tensor in _AS_IN_FILE:
            continue
        kept = (known or {}).get(tensor.data_ptr())
        if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
            _AS_IN_FILE[tensor] = kept
            continue
        alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        if alone and offload.takes(tensor.numel(), tensor.dtype):
            private, kept = offload.private(tensor.detach())
            tensor.data = private
            _AS_IN_FILE[tensor] = kept


def _is_mapped(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.untyped_storage().filename is not None
