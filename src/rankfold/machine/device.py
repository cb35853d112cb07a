"""Where a model runs."""

from __future__ import annotations

import torch
from torch import nn

from rankfold.errors import MODEL, InputError, check_kind

OUT_OF_MEMORY = (
    "the GPU's memory is too small for this; expected some 40 bytes a parameter beside what a "
    "batch takes. Ask for smaller batches (batch_size=), leave layers out (exclude=), or run it on "
    'the CPU (device="cpu"; offload_folder="DIR", where its memory is too small as well).'
)


def check_device(name: str) -> torch.device:
    """The device of a name: ``cpu``, ``cuda`` or ``cuda:1``.

    Others have no float64, which the Grams and spectra need.

    Raises:
        InputError: It is none of these, or PyTorch doesn't see it.
    """
    expected = "expected cpu, cuda, or one of several GPUs as cuda:1"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"the device is {name!r}; {expected}.") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"the device is {name!r}, which has no float64; {expected}.")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= seen:
        found = f"{seen} GPU" + "s" * (seen != 1) if seen else "no GPU"
        raise InputError(
            f"the device is {name!r}, but PyTorch {torch.__version__} sees {found}; {expected}. "
            'Use device="cpu", or a build of PyTorch for your GPU and its driver.'
        )
    return device


def unused_gpu(device: torch.device) -> str | None:
    """What to tell a user whose GPU stays idle, or None."""
    if device.type != "cpu" or not torch.cuda.is_available():
        return None
    return f'running on the CPU; device="cuda" would use the {torch.cuda.get_device_name(0)}'


def device_of(model: nn.Module) -> str:
    """Name of the device that a model's first parameter is on.

    Raises:
        InputError: It is no model.
    """
    check_kind("the model", model, nn.Module, MODEL)
    parameter = next(model.parameters(), None)
    return "cpu" if parameter is None else str(parameter.device)
