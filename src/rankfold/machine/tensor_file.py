"""Tensors in a file, to be read one by one: what passes leave behind, and memory has no room for.

Other than what ``Offload`` maps, nothing of it counts as memory of the process. The file has no
name: nothing is left behind, however a process ends.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from rankfold.errors import InputError


@dataclass(frozen=True)
class Kept:
    """Where a tensor lies in the file, and how it looks.

    Attributes:
        start: First byte.
        size: Number of bytes.
        dtype: Its type.
        shape: Its shape.
        strides: Its strides, in values.
        device: Where it was, and will be again.
    """

    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: torch.device


class TensorFile:
    """A file of tensors; places that are given free are used again.

    Args:
        folder: On a disk; it exists and can be written.

    Raises:
        InputError: It can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._end = 0
        self._free: dict[int, list[int]] = defaultdict(list)
        try:
            self._file = io.FileIO(_nameless(folder), "r+b", closefd=True)
        except OSError as error:
            raise self._refusal(error) from error

    def __enter__(self) -> TensorFile:
        """The file, which is closed and gone at the end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self._end

    def put(self, values: Tensor) -> Kept:
        """Write a tensor.

        Raises:
            InputError: The disk is full.
        """
        values = values.detach()
        # Read with the same strides, products with it are the same to the last bit.
        strides = torch.empty_like(values, device="meta").stride()
        flat = torch.empty_strided(values.shape, strides, dtype=values.dtype).copy_(values)
        raw = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy()
        places = self._free[raw.nbytes]
        start = places.pop() if places else self._end
        self._end = max(self._end, start + raw.nbytes)
        left, at = memoryview(raw.data), start
        try:
            self._file.seek(at)
            while left:
                left = left[self._write(left) :]
        except OSError as error:
            raise self._refusal(error) from error
        return Kept(start, raw.nbytes, values.dtype, tuple(values.shape), strides, values.device)

    def get(self, kept: Kept) -> Tensor:
        """Read a tensor."""
        raw = torch.empty(kept.size, dtype=torch.uint8)
        left = memoryview(raw.numpy().data)
        self._file.seek(kept.start)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise OSError(f"a file in {self._folder} ends before {kept}")
            left = left[count:]
        return raw.view(kept.dtype).as_strided(kept.shape, kept.strides).to(kept.device)

    def free(self, kept: Kept) -> None:
        """Give its place to tensors to come."""
        self._free[kept.size].append(kept.start)

    def _write(self, values: memoryview) -> int:
        return self._file.write(values)

    def _refusal(self, error: OSError) -> InputError:
        return InputError(
            f"a file of tensors in the folder {self._folder} can't be written: "
            f"{os.strerror(error.errno) if error.errno else error}; expected a folder on a disk "
            "with room for what goes into each block of the model, of all calibration examples. "
            'Name another one (offload_folder="DIR"), or use fewer examples (limit=).'
        )


def _nameless(folder: Path) -> int:
    """A new file in a folder, without a name any more: its descriptor."""
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".rankfold-")
    Path(name).unlink()
    return descriptor
