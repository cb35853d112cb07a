"""Where the large tensors of a run lie: in memory, or in files that are mapped into it.

Statistics, gradient steps and spectra of all layers take some 30 bytes for each parameter of these
layers, several times what the model itself takes, and most of the time one layer's are in use. In
files the system writes out what it has no memory for, and no result differs in a bit.

A file has no name any more once it is mapped: nothing is left behind, however a process ends.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from rankfold.errors import InputError, of_another_kind, visible
from rankfold.machine.launched import beside

SMALL = 1 << 18  # bytes up to which a tensor stays in memory
# Of what a container may take: control groups of Linux, version 2 and 1.
LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
OWN_GROUPS = Path("/proc/self/cgroup")
UNITS = {"KB": 1000, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_AMOUNT = re.compile(rf"(?P<number>\d+(\.\d+)?)\s*(?P<unit>{'|'.join(UNITS)})", re.IGNORECASE)
LEAST = 2  # copies of the weights that pass through memory, itself included
LARGEST = 16  # bytes that a run needs for each value of a model's largest tensor, in any case
PROGRAM = 600_000_000  # bytes of Python, torch and what a pass of one batch holds, about
UNKNOWN = 1 << 62  # bytes, where the system doesn't say how many there are
IN_MEMORY = 40  # bytes a parameter that a run takes without a folder (README, limits)


@dataclass(frozen=True)
class Offload:
    """A folder for large tensors, and how much memory a run may take.

    Attributes:
        folder: It exists and can be written; None keeps all tensors in memory.
        memory: Bytes, the model's own included, where the statistics of all layers at once may
            not have room (``with_room``); None where they have.
        blocks: Names of the blocks that statistics are then collected of one after the other;
            empty for those that are found.
        weights: Whether the model's weights lie in files, too (``machine.weights``). Then copies of
            the model share its weights that don't change.

    Raises:
        InputError: It is no such folder.
    """

    folder: Path | None = None
    memory: int | None = None
    blocks: tuple[str, ...] = ()
    weights: bool = False

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

    def left_beside(self, model: nn.Module) -> int:
        """Bytes of the memory that a run may take beside a model; many where all has room."""
        memory = UNKNOWN if self.memory is None else self.memory
        if self.weights:
            return max(memory - PROGRAM, memory // 2)
        return max(0, memory - sum(p.numel() * p.element_size() for p in model.parameters()))

    def zeros(self, *shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Zeros to be changed in place.

        Raises:
            InputError: The folder is full.
        """
        if not self.takes(torch.Size(shape).numel(), dtype):
            return torch.zeros(*shape, dtype=dtype, device=device)
        return self._mapped(torch.Size(shape).numel(), dtype).view(shape)

    def kept(self, values: Tensor) -> Tensor:
        """The values for as long as they are needed, with their strides.

        Raises:
            InputError: The folder is full.
        """
        if not self.takes(values.numel(), values.dtype):
            return values
        strides = _strides(values)
        there = self._mapped(values.numel(), values.dtype).as_strided(values.shape, strides)
        return there.copy_(values)

    def copy(self, values: Tensor) -> Tensor:
        """A copy of the values, to be changed in place, with their strides.

        Raises:
            InputError: The folder is full.
        """
        there = self.kept(values)
        return values.clone() if there is values else there

    def private(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The values in a file, mapped twice, with their strides.

        Returns:
            A tensor whose changes stay in memory, and the values in the file, which have none.

        Raises:
            InputError: The folder is full, or there is none.
        """
        strides, size = _strides(values), values.numel()
        with self._new_file(size * values.dtype.itemsize) as name:
            kept = torch.from_file(name, shared=True, size=size, dtype=values.dtype)
            own = torch.from_file(name, shared=False, size=size, dtype=values.dtype)
        kept = kept.as_strided(values.shape, strides).copy_(values)
        return own.as_strided(values.shape, strides), kept

    def in_files(self, module: nn.Module) -> nn.Module:
        """A new module, its large tensors in files; as it is where weights lie in memory."""
        if self.weights:
            for tensor in module.parameters():
                tensor.data = self.kept(tensor.data)
        return module

    def takes(self, numel: int, dtype: torch.dtype) -> bool:
        """Whether a tensor of so many values lies in a file."""
        return self.folder is not None and numel * dtype.itemsize > SMALL

    def _mapped(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeros ``(numel,)`` in a file of their own."""
        with self._new_file(numel * dtype.itemsize) as name:
            return torch.from_file(name, shared=True, size=numel, dtype=dtype)

    @contextmanager
    def _new_file(self, size: int) -> Iterator[str]:
        """A file of zeros, which has a name as long as this lasts."""
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".rankfold-") as file:
                _reserve(file.fileno(), size)
                yield file.name
        except OSError as error:
            raise InputError(
                f"a file of {size:,} bytes can't be made in the offload folder {self.folder}: "
                f"{error.strerror}; expected a folder that can be written, with some 30 free bytes "
                "for each parameter of the layers that can be factorized."
            ) from error


def _strides(values: Tensor) -> tuple[int, ...]:
    """Those of a dense copy: with others, products with it might differ in the last bit."""
    return torch.empty_like(values, device="meta").stride()


def with_room(offload: Offload, memory: int | None, model: nn.Module) -> Offload:
    """The offload with a limit of memory where all layers' statistics at once are too much for it.

    Then what is kept of all layers lies in files: in its folder, or in the system's one for
    temporary files.

    Args:
        offload: As asked for.
        memory: Bytes that the run may take; by default what the machine has left, beside what the
            model has taken already.
        model: On the CPU; on a GPU all stays as it is.

    Raises:
        InputError: The limit is too small for any run, or the model is on a GPU.
    """
    # Those that have no shape yet are refused by name where the layers are looked at.
    there = [p for p in model.parameters() if not isinstance(p, UninitializedParameter)]
    needed = IN_MEMORY * sum(p.numel() for p in there)
    of_model = sum(p.numel() * p.element_size() for p in there)
    on_cpu = all(p.device.type == "cpu" for p in there)
    if memory is not None and not on_cpu:
        raise InputError(
            "memory is given, but the model is on a GPU, whose memory no file can stand for; "
            "expected a model on the CPU. Move it there, or leave memory out."
        )
    asked = memory
    if memory is None and (available := available_memory()) is not None:
        memory = available // beside() + (0 if offload.weights else of_model)
    weights = on_cpu and (offload.weights or weights_in_files(of_model, memory))
    least = LARGEST * max((p.numel() for p in there), default=0)
    if asked is not None and asked < least:
        raise InputError(
            f"memory is {gigabytes(asked)}, but a run needs {LARGEST} bytes for each value of the "
            f"model's largest tensor in any case; expected {gigabytes(least)} or more."
        )
    if not (weights or (on_cpu and (offload.blocks or (memory is not None and needed > memory)))):
        return offload
    folder = offload.folder or Path(tempfile.gettempdir())
    memory = UNKNOWN if memory is None else memory
    return replace(offload, folder=folder, memory=memory, weights=weights)


def weights_in_files(of_model: int, memory: int | None) -> bool:
    """Whether memory has no room for a model's weights of so many bytes, and a copy of them."""
    return memory is not None and memory < LEAST * of_model


def memory_of(value: object) -> int:
    """Bytes of memory, as ``amount_of`` reads them."""
    return amount_of("memory", value)


def amount_of(what: str, value: object) -> int:
    """Bytes of a text such as ``8GB``, ``1.5 GB`` or ``900MB``, or of a whole number.

    Args:
        what: The argument, for messages.
        value: As given.

    Raises:
        InputError: It is none of these.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _AMOUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    found = round(float(match["number"]) * UNITS[match["unit"].upper()]) if match else 0
    if found < 1:
        raise InputError(
            f"{what} is {visible(str(value))!r}; expected an amount with its unit, such as 8GB or "
            f"900MB ({', '.join(UNITS)}), or a whole number of bytes."
        )
    return found


def names_of(blocks: object) -> tuple[str, ...]:
    """Names of blocks, as given.

    Raises:
        InputError: They are no names.
    """
    given = [blocks] if isinstance(blocks, str) else blocks
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
        raise of_another_kind("blocks", blocks, "a list of names of the model's modules")
    return tuple(given)


def gigabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def advice(parameters: int, offload: Offload) -> str | None:
    """What to tell a user where memory is short, or None."""
    if offload.memory is None:
        return None
    needed = IN_MEMORY * parameters
    there = "no limit is set"
    if offload.memory < UNKNOWN:
        there = f"{gigabytes(offload.memory)} are there"
    kept = "the weights lie in files, too, of" if offload.weights else "and kept in"
    return (
        f"a model of {parameters:,} parameters may need some {gigabytes(needed)} at once, and "
        f"{there}: statistics are collected in parts, {kept} {offload.folder}"
    )


def available_memory() -> int | None:
    """Bytes that processes can get without swapping, by what Linux says; None elsewhere.

    The limit of a container counts, and that of the control group that this process is in.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    amounts = dict(line.split(":", 1) for line in lines)
    available = 1024 * int(amounts["MemAvailable"].split()[0])
    found = (file.read_text().strip() for file in (*LIMITS, *_own_limits()) if file.exists())
    return min([available, *(int(limit) for limit in found if limit != "max")])


def _own_limits() -> Iterator[Path]:
    """The files with the limits of this process' control groups, the outer ones too."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, name = line.split(":", 2)
        if not kinds or "memory" in kinds.split(","):  # version 2 names no kinds
            for group, top in product((Path(name), *Path(name).parents), LIMITS):
                yield top.parent / str(group).lstrip("/") / top.name


def check_offload(offload: Offload, device: str) -> None:
    """Refuse to offload what a GPU holds.

    Raises:
        InputError: As said.
    """
    if offload.blocks and device != "cpu":
        raise InputError(
            f"blocks are given, but the model is on {device}; expected a model on the CPU, which "
            "is collected block by block. Move it there, or leave blocks out."
        )
    if offload.weights and device != "cpu":
        raise InputError(
            f"model_offload is given, but the model is on {device}, whose memory no file can stand "
            "for; expected a model on the CPU. Move it there, or leave model_offload out."
        )
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
