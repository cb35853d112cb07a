"""Where the large tensors of a run lie: in memory, or in files that are mapped into it.

Statistics, gradient steps and spectra of all layers take some 30 bytes for each parameter of these
layers, several times what the model itself takes, and most of the time one layer's are in use. In
files the system writes out what it has no memory for, and no result differs in a bit.

A file has no name any more once it is mapped: nothing is left behind, however a process ends.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rankfold.errors import InputError

SMALL = 1 << 18  # bytes up to which a tensor stays in memory
# Of what a container may take: control groups of Linux, version 2 and 1.
LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
IN_MEMORY = 40  # bytes a parameter that a run takes without a folder (README, limits)


@dataclass(frozen=True)
class Offload:
    """A folder for large tensors.

    Attributes:
        folder: It exists and can be written; None keeps all tensors in memory.

    Raises:
        InputError: It is no such folder.
    """

    folder: Path | None = None

    def __post_init__(self) -> None:
        """Try it out before any work is done."""
        if self.folder is None:
            return
        if not self.folder.is_dir():
            raise InputError(
                f"the offload folder {self.folder} is no folder; expected one on a disk with some "
                "30 free bytes for each parameter of the layers that can be factorized."
            )
        self._mapped(1, torch.float32)

    def zeros(self, *shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Zeros to be changed in place.

        Raises:
            InputError: The folder is full.
        """
        if not self._takes(torch.Size(shape).numel(), dtype):
            return torch.zeros(*shape, dtype=dtype, device=device)
        return self._mapped(torch.Size(shape).numel(), dtype).view(shape)

    def kept(self, values: Tensor) -> Tensor:
        """The values for as long as they are needed, with their strides.

        Raises:
            InputError: The folder is full.
        """
        if not self._takes(values.numel(), values.dtype):
            return values
        # Of other strides, products with it might differ in the last bit.
        strides = torch.empty_like(values).stride()
        there = self._mapped(values.numel(), values.dtype).as_strided(values.shape, strides)
        return there.copy_(values)

    def _takes(self, numel: int, dtype: torch.dtype) -> bool:
        return self.folder is not None and numel * dtype.itemsize > SMALL

    def _mapped(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeros ``(numel,)`` in a file of their own."""
        size = numel * dtype.itemsize
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".rankfold-") as file:
                _reserve(file.fileno(), size)
                return torch.from_file(file.name, shared=True, size=numel, dtype=dtype)
        except OSError as error:
            raise InputError(
                f"a file of {size:,} bytes can't be made in the offload folder {self.folder}: "
                f"{error.strerror}; expected a folder that can be written, with some 30 free bytes "
                "for each parameter of the layers that can be factorized."
            ) from error


def advice(parameters: int, offload: Offload) -> str | None:
    """What to tell a user whose memory may not suffice on the CPU, or None."""
    needed, available = IN_MEMORY * parameters, available_memory()
    if offload.folder is not None or available is None or needed <= available:
        return None
    return (
        f"a model of {parameters:,} parameters may need some {needed / 1e9:.1f} GB, of which "
        f'{available / 1e9:.1f} GB are available; offload_folder="DIR" keeps most of it in files'
    )


def available_memory() -> int | None:
    """Bytes that processes can get without swapping, by what Linux says; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    amounts = dict(line.split(":", 1) for line in lines)
    available = 1024 * int(amounts["MemAvailable"].split()[0])
    found = (file.read_text().strip() for file in LIMITS if file.exists())
    return min([available, *(int(limit) for limit in found if limit != "max")])


def check_offload(offload: Offload, device: str) -> None:
    """Refuse to offload what a GPU holds.

    Raises:
        InputError: As said.
    """
    if offload.folder is not None and device != "cpu":
        raise InputError(
            f"the model is on {device}, whose memory no file can stand for; expected a model on "
            "the CPU. Move it there, or leave the offload folder out."
        )


def _reserve(file: int, size: int) -> None:
    """Make a file so long, on the disk, too: where a mapped file finds no space a process dies."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # macOS
        os.truncate(file, size)
