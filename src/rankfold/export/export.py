"""Factorized models for tools that know nothing of rankfold.

``dense`` is the original architecture under its original names, factors multiplied out: as large as
the original, opened as the original is. ``pairs`` keeps the saving: each factorized layer becomes
two (or three) stock ``nn.Linear`` or ``nn.Conv2d`` in an ``nn.Sequential``. ``onnx`` and ``pt2``
are traced programs that keep the factors; each is run again from its file, and refused where its
outputs differ from the model's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rankfold.artifact.load import load, own_class
from rankfold.artifact.manifest import library_versions, read_manifest
from rankfold.artifact.recorded import recorded_inputs
from rankfold.data.input_settings import InputSettings, refuse_other
from rankfold.errors import MODEL, InputError, check_kind, path_of
from rankfold.export.dense import Dense
from rankfold.export.example_inputs import HOW, Given
from rankfold.export.names import DTYPES
from rankfold.export.pairs import Pairs
from rankfold.export.targets import EXPORT_FILE, OpenedArtifact, check_options, target_of
from rankfold.export.targets import TARGETS as TARGETS  # also looked for here
from rankfold.export.targets import register_target as register_target
from rankfold.export.traced import TracedProgram
from rankfold.files.folder import check_output, folder_in_one_step
from rankfold.files.listed import file_names
from rankfold.files.shards import weights_size
from rankfold.files.unchanged import Unchanged
from rankfold.integrations import transformers as hf
from rankfold.model.sizes import model_parameters
from rankfold.model.unpack import unwrapped

for _target in (Dense(), Pairs(), TracedProgram("onnx"), TracedProgram("pt2")):
    register_target(_target)


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
    to: str
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
    to: str,
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
        inputs: Of ``onnx`` and ``pt2``, where neither configuration nor artifact tells what the
            model is called with: a batch, a tensor or a mapping of the parameters of ``forward``;
            or the shape of one input, ``(3, 224, 224)``, or ``(length,)`` of tokens.
        dtype: Of ``onnx`` and ``pt2``: one of ``DTYPES``; None for the artifact's own.

    Raises:
        InputError: Not an artifact, or not of this model; it has no such form or program; ``out``
            can't be written.
    """
    target = target_of(to)
    check_options(target, {"inputs": inputs, "dtype": dtype})
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected {', '.join(DTYPES)}.")
    source, out = path_of("the folder", folder), path_of("out", out)
    check_output(out, overwrite, EXPORT_FILE, reads=[source])
    unchanged = Unchanged({"the artifact": lambda: hf.files_read(source)})
    inputs = _shaped(source, inputs) if "inputs" in target.options else None
    opened = _opened(source, model, inputs, dtype, "inputs" in target.options)
    parameters = model_parameters(opened.model)  # before it may be changed
    with folder_in_one_step(out, overwrite) as draft:
        written = target.write(opened, draft)
        if opened.of_transformers:
            hf.copy_processing_files(source, draft)
        about = {"to": to, "class": opened.manifest["model"]["class"]}
        about |= {"input_settings": recorded_inputs(source).as_dict(), **written.told}
        _write_about(draft, about)
        unchanged.check()
    return Exported(
        folder=out,
        to=to,
        parameters=model_parameters(written.model),
        bytes=sum(file.stat().st_size for file in out.glob(target.files)),
        factorized_parameters=parameters,
        factorized_bytes=weights_size(source),
        difference=written.difference,
        dynamic=written.dynamic,
    )


def _write_about(draft: Path, about: Mapping[str, object]) -> None:
    """Write down what an export is, who made it, and which files are its own."""
    made = {"made_by": "rankfold", "versions": library_versions()}
    whole = {**made, **about, "files": file_names(draft, EXPORT_FILE)}
    text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    # Names of files that are no text have lone surrogates, which JSON escapes alike.
    (draft / EXPORT_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")


def _shaped(folder: Path, inputs: Given | None) -> Given | None:
    """The inputs as given; where none are, the shape of the images that an artifact was made with.

    Raises:
        InputError: Another shape of images was given.
    """
    recorded = recorded_inputs(folder)
    if inputs is None or recorded.shape is None:
        return recorded.shape if inputs is None else inputs
    shapes = [tuple(inputs.shape[1:])] if torch.is_tensor(inputs) else [inputs]
    for shape in shapes:
        if not isinstance(shape, Mapping) and len(shape) == len(recorded.shape):
            refuse_other(recorded, InputSettings(shape=tuple(shape)), folder)
    return inputs


def _opened(
    folder: Path,
    model: nn.Module | None,
    inputs: Given | None,
    dtype: str | None,
    traced: bool,
) -> OpenedArtifact:
    """The artifact with its model loaded, in the dtype asked for."""
    manifest = read_manifest(folder)
    if model is not None:
        check_kind("the model", model, nn.Module, MODEL)
    own = None if model is None else unwrapped(model)
    kind, source = manifest["model"]["kind"], manifest["model"].get("source")
    if own is None and traced and inputs is None and kind == "module" and source is None:
        raise InputError(f"{own_class(folder, manifest)} {HOW}.")  # both at once
    factorized = load(folder, model=copy.deepcopy(own))
    if dtype is not None:
        factorized = factorized.to(getattr(torch, dtype))
    return OpenedArtifact(folder, manifest, factorized, own, inputs)
