"""What ``rankfold doctor`` finds: what a report of a fault needs to say."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import msgspec
import torch

from rankfold.certificate.earlier_uses import VARIABLE, record_file
from rankfold.machine.offload import LIMITS, available_memory

CORE = ("rankfold", "torch", "numpy", "scipy", "safetensors", "msgspec", "typer")
FOR_DEVELOPERS = ("dev", "benchmarks")  # extras that no command asks for
_NEEDED = re.compile(r"(?P<package>[\w.-]+).*?;.*extra == ['\"](?P<extra>[\w-]+)['\"]")


class Threads(msgspec.Struct, kw_only=True):
    """Processors, and the threads that torch computes with."""

    processors: int
    usable_processors: int
    torch_threads: int
    torch_interop_threads: int
    omp_num_threads: str | None
    instructions: str


class Memory(msgspec.Struct, kw_only=True):
    """Bytes; None where the system does not say."""

    total_bytes: int | None
    available_bytes: int | None
    container_limit_bytes: int | None


class Device(msgspec.Struct, kw_only=True):
    """One device; its name is what ``device=`` takes."""

    name: str
    description: str
    total_bytes: int | None
    usable: bool


class Extra(msgspec.Struct, kw_only=True):
    """Optional packages that belong together: their versions, None for those that are missing."""

    packages: dict[str, str | None]
    install: str | None


class Openings(msgspec.Struct, kw_only=True):
    """Where openings of held-out data are recorded; None where that is turned off, or no place."""

    file: str | None
    exists: bool
    trouble: str | None


class Facts(msgspec.Struct, kw_only=True):
    """What was found."""

    python: str
    executable: str
    platform: str
    versions: dict[str, str | None]
    threads: Threads
    memory: Memory
    devices: list[Device]
    extras: dict[str, Extra]
    openings: Openings


def facts() -> Facts:
    """All of them."""
    return Facts(
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        versions={name: _version(name) for name in CORE},
        threads=_threads(),
        memory=_memory(),
        devices=list(_devices()),
        extras=_extras(),
        openings=_openings(),
    )


def fact_lines(found: Facts) -> Iterator[str]:
    """The same for a person."""
    versions = (f"{name} {text or 'is missing'}" for name, text in found.versions.items())
    yield f"versions: {', '.join(versions)}"
    yield f"Python {found.python}: {found.executable}"
    yield f"system: {found.platform}"
    threads = found.threads
    omp = threads.omp_num_threads
    yield (
        f"threads: {threads.torch_threads} of torch, {threads.usable_processors} of "
        f"{threads.processors} processors usable, {threads.instructions}"
        + ("" if omp is None else f", OMP_NUM_THREADS={omp}")
    )
    memory = found.memory
    yield (
        f"memory: {_gigabytes(memory.total_bytes)}, of which "
        f"{_gigabytes(memory.available_bytes)} are available; container limit: "
        + ("none" if (limit := memory.container_limit_bytes) is None else _gigabytes(limit))
    )
    for device in found.devices:
        size = "" if device.total_bytes is None else f", {_gigabytes(device.total_bytes)}"
        yield f"device {device.name}: {device.description}{size}"
    for name, extra in found.extras.items():
        has = (f"{package} {text}" for package, text in extra.packages.items() if text)
        lacks = [package for package, text in extra.packages.items() if text is None]
        line = f"extra {name}: {', '.join(has) or 'nothing installed'}"
        yield line + (f"; missing {', '.join(lacks)}: {extra.install}" if lacks else "")
    yield _openings_line(found.openings)


def _openings_line(openings: Openings) -> str:
    if openings.trouble is not None:
        return f"record of openings: none: {openings.trouble}"
    if openings.file is None:
        return f"record of openings: turned off by {VARIABLE}"
    return f"record of openings: {openings.file}" + ("" if openings.exists else " (not there yet)")


def _gigabytes(size: int | None) -> str:
    return "an unknown amount" if size is None else f"{size / 1e9:.1f} GB"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _threads() -> Threads:
    processors = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else processors
    return Threads(
        processors=processors,
        usable_processors=usable,
        torch_threads=torch.get_num_threads(),
        torch_interop_threads=torch.get_num_interop_threads(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        instructions=torch.backends.cpu.get_cpu_capability(),
    )


def _memory() -> Memory:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no such call
        total = None
    return Memory(
        total_bytes=total,
        available_bytes=available_memory(),
        container_limit_bytes=_container_limit(total),
    )


def _container_limit(total: int | None) -> int | None:
    """Bytes; version 1 of control groups writes a number above all memory where there is none."""
    found = [file.read_text().strip() for file in LIMITS if file.exists()]
    limits = [int(text) for text in found if text != "max"]
    return min((one for one in limits if total is None or one < total), default=None)


def _devices() -> Iterator[Device]:
    description = platform.processor() or platform.machine()
    yield Device(name="cpu", description=description, total_bytes=None, usable=True)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        yield Device(
            name=f"cuda:{index}",
            description=properties.name,
            total_bytes=properties.total_memory,
            usable=True,
        )
    if torch.backends.mps.is_available():
        description = "has no float64, which the Grams and spectra need"
        yield Device(name="mps", description=description, total_bytes=None, usable=False)


def _extras() -> dict[str, Extra]:
    """By name, as the metadata of rankfold says; those for developers are left out."""
    found: dict[str, dict[str, str | None]] = {
        name: {}
        for name in metadata("rankfold").get_all("Provides-Extra") or []
        if name not in FOR_DEVELOPERS
    }
    for line in requires("rankfold") or []:
        match = _NEEDED.fullmatch(line)
        if match is not None and match["extra"] in found:
            found[match["extra"]][match["package"]] = _version(match["package"])
    return {
        name: Extra(
            packages=packages,
            install=f"pip install 'rankfold[{name}]'" if None in packages.values() else None,
        )
        for name, packages in found.items()
    }


def _openings() -> Openings:
    try:
        file = record_file()
    except OSError as error:
        return Openings(file=None, exists=False, trouble=str(error))
    exists = file is not None and Path(file).exists()
    return Openings(file=None if file is None else str(file), exists=exists, trouble=None)
