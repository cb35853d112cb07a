"""What an export is traced with: a shape, or the batch that a user's function gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rankfold.cli.open import called
from rankfold.data.sources import is_spec
from rankfold.errors import InputError
from rankfold.export.example_inputs import Given


def open_inputs(shape: str | None, spec: str | None) -> Given | None:
    """``--input-shape`` or ``--inputs`` of an export: a shape, or the batch that a function gives.

    Raises:
        InputError: Both, or one that means nothing.
    """
    if shape is not None and spec is not None:
        raise InputError("--input-shape and --inputs say the same; give one of them.")
    if shape is not None:
        if not all(side.isdecimal() for side in shape.split("x")):
            raise InputError(
                f"--input-shape is {shape!r}; expected numbers with x between them, 3x224x224."
            )
        return tuple(map(int, shape.split("x")))
    if spec is None:
        return None
    if not is_spec(spec):
        raise InputError(f"--inputs is {spec}; expected file.py:function.")
    batch = called(spec)
    if not (torch.is_tensor(batch) or isinstance(batch, Mapping)):
        raise InputError(
            f"{spec} gave a {type(batch).__name__}; expected a batch, a tensor or a mapping of "
            "tensors by the names of the model's inputs."
        )
    return batch
