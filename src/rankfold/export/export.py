"""Factorized models for tools that know nothing of rankfold.

``dense`` is the original architecture under its original names, factors multiplied out: as large as
the original, opened as the original is. ``pairs`` keeps the saving: each factorized layer becomes
two (or three) stock ``nn.Linear`` or ``nn.Conv2d`` in an ``nn.Sequential``. ``onnx`` and ``pt2``
are traced programs that keep the factors; each is run again from its file, and refused where its
outputs differ from the model's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from rankfold.artifact.load import load, skeleton
from rankfold.artifact.manifest import WEIGHTS_FILE, library_versions, read_manifest
from rankfold.errors import InputError
from rankfold.export.dense import (
    _write_dense,
    to_dense,
)
from rankfold.export.example_inputs import Given
from rankfold.export.pairs import (
    _write_pairs,
)
from rankfold.export.targets import EXPORT_FILE, _write_json
from rankfold.export.traced import PROGRAMS, Program, write_program
from rankfold.files.folder import check_output, folder_in_one_step
from rankfold.integrations import transformers as hf
from rankfold.model.sizes import model_parameters
from rankfold.model.unpack import unwrapped

Target: TypeAlias = Literal["dense", "pairs", "onnx", "pt2"]

TARGETS: tuple[Target, ...] = get_args(Target)

FILES: dict[Target, str] = {
    "dense": "*.safetensors",
    "pairs": "*.safetensors",
    "onnx": "model.onnx*",  # a large model's weights are in model.onnx.data
    "pt2": "model.pt2",
}

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        folder: Where.
        to: The form.
        parameters: Of the exported model, tied ones once.
        bytes: Of the files that hold its weights.
        factorized_parameters: Of the artifact.
        factorized_bytes: Of its safetensors file.
        difference: Of ``onnx`` and ``pt2``: the largest difference of an output from the model's,
            as a share of the largest output, over inputs of other sizes than those traced with.
            None where nothing could run the file.
        dynamic: Of ``onnx`` and ``pt2``: the axes of any length.
    """

    folder: Path
    to: Target
    parameters: int
    bytes: int
    factorized_parameters: int
    factorized_bytes: int
    difference: float | None = None
    dynamic: tuple[str, ...] = ()


def export(
    folder: str | Path,
    out: str | Path,
    *,
    to: Target,
    model: nn.Module | None = None,
    overwrite: bool = False,
    inputs: Given | None = None,
    dtype: str | None = None,
) -> Exported:
    """Write an artifact in a form that needs no rankfold to be opened.

    Args:
        folder: The artifact.
        out: Where to; appears complete or not at all.
        to: ``dense``, ``pairs``, ``onnx`` or ``pt2`` (a program of ``torch.export``).
        model: For a model of the user's own class, an instance of it; it stays as it is.
        overwrite: Replace an earlier export that stands there.
        inputs: Of ``onnx`` and ``pt2``, where the configuration doesn't tell what the model is
            called with: a batch, a tensor or a mapping of the parameters of ``forward``; or the
            shape of one input without the batch, ``(3, 224, 224)``, or ``(length,)`` of tokens.
        dtype: Of ``onnx`` and ``pt2``: ``float32``, ``float16`` or ``bfloat16``; None for the
            artifact's own.

    Raises:
        InputError: Not an artifact, or not of this model; a layer has no such form; the model
            can't be traced, or its program computes something else; ``out`` can't be written.
    """
    _check_options(to, inputs, dtype)
    source, target = Path(folder), Path(out)
    check_output(target, overwrite, EXPORT_FILE)
    manifest = read_manifest(source)
    transformers = manifest["model"]["kind"] == "transformers"
    if model is not None:
        model = unwrapped(model)
    factorized = load(source, model=copy.deepcopy(model))
    if dtype is not None:
        factorized = factorized.to(DTYPES[dtype])
    parameters = model_parameters(factorized)
    program: Program | None = None
    unpacked: list[str] = manifest["unpacked"]
    about = {
        "made_by": "rankfold",
        "versions": library_versions(),
        "to": to,
        "class": manifest["model"]["class"],
    }
    with folder_in_one_step(target) as draft:
        if to == "pairs":
            plain = _write_pairs(draft, factorized, unpacked, about, source, transformers)
        elif to == "onnx" or to == "pt2":
            plain = factorized
            if transformers:
                hf.write_configuration_alone(plain, draft, source, hf.IN_A_PROGRAM)
            program = write_program(plain, draft / f"model.{to}", to, inputs)
            _write_json(draft / EXPORT_FILE, {**about, **program.described()})
        else:
            empty = skeleton(source, manifest) if model is None else copy.deepcopy(model)
            plain = _write_dense(draft, to_dense(factorized), empty, unpacked, source)
            _write_json(draft / EXPORT_FILE, about)
        if transformers:
            hf.copy_processing_files(source, draft)
    return Exported(
        target,
        to,
        model_parameters(plain),
        sum(file.stat().st_size for file in target.glob(FILES[to])),
        parameters,
        (source / WEIGHTS_FILE).stat().st_size,
        program.difference if program else None,
        program.any_length if program else (),
    )


def _check_options(to: str, inputs: Given | None, dtype: str | None) -> None:
    if to not in TARGETS:
        raise InputError(f"to is {to!r}; expected {', '.join(TARGETS[:-1])} or {TARGETS[-1]}.")
    if to not in PROGRAMS and (inputs is not None or dtype is not None):
        option = "dtype" if inputs is None else "inputs"
        raise InputError(f"{option} goes with {' and '.join(PROGRAMS)}; {to} keeps what is stored.")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected {', '.join(DTYPES)}.")
