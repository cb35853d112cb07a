"""Traced programs of a model: written, run from their file, and compared with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold.errors import InputError
from rankfold.export.example_inputs import BATCH, Given, example_inputs
from rankfold.export.names import SUMMARIES, ProgramKind
from rankfold.export.onnx import check_onnx, has_onnxruntime, run_onnx, write_onnx
from rankfold.export.targets import OpenedArtifact, Option, Written
from rankfold.export.torch_export import (
    largest_difference,
    output_names,
    run,
    run_pt2,
    tensors_of,
    trace,
    write_pt2,
)
from rankfold.integrations import transformers as hf

# Largest difference of outputs, as a share of the largest one, that counts as equal: other
# libraries sum in another order, and in half precision round after each step.
EQUAL = 1e-4
EQUAL_IN_HALF_PRECISION = 5e-2
HALVES = (torch.float16, torch.bfloat16)
BATCHES = (1, 3)  # that it is compared on: others than it was traced with
LONGER = (-3, 5)  # tokens, likewise


@dataclass(frozen=True)
class Program:
    """A program that was written.

    Attributes:
        inputs: Type and shape of each, an axis of any length by its name.
        outputs: Their names.
        difference: Largest difference of an output from the model's, as a share of the largest
            output; None where nothing could run the file.
    """

    inputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    outputs: tuple[str, ...]
    difference: float | None

    @property
    def any_length(self) -> tuple[str, ...]:
        """Names of the axes of any length."""
        names = (s for _, shape in self.inputs.values() for s in shape if isinstance(s, str))
        return tuple(dict.fromkeys(names))

    def described(self) -> dict[str, Any]:
        """The same for a JSON file."""
        return {
            "inputs": {n: {"dtype": d, "shape": s} for n, (d, s) in self.inputs.items()},
            "outputs": self.outputs,
            "largest_relative_difference": self.difference,
        }


@dataclass(frozen=True)
class TracedProgram:
    """The export targets ``onnx`` and ``pt2``."""

    name: ProgramKind

    @property
    def summary(self) -> str:
        """See ``Target``."""
        return SUMMARIES[self.name]

    @property
    def options(self) -> tuple[Option, ...]:
        """See ``Target``."""
        return ("inputs", "dtype")

    @property
    def files(self) -> str:
        """See ``Target``; the weights of a large ONNX model are in ``model.onnx.data``."""
        return f"model.{self.name}*"

    def write(self, opened: OpenedArtifact, draft: Path) -> Written:
        """Write the program and, of a transformers model, its configuration; see ``Target``."""
        model = opened.model
        if opened.of_transformers:
            hf.write_configuration_alone(model, draft, opened.folder, hf.IN_A_PROGRAM)
        program = write_program(model, draft / f"model.{self.name}", self.name, opened.inputs)
        return Written(model, program.described(), program.difference, program.any_length)


def write_program(model: nn.Module, file: Path, kind: ProgramKind, given: Given | None) -> Program:
    """Trace a model, write the program, run what was written, and compare.

    Args:
        model: It is left as tracing needs it: its parts may compute in another way.
        file: Where to.
        kind: ``onnx`` or ``pt2``.
        given: The user's inputs, or None; as ``rankfold.export`` takes them.

    Raises:
        InputError: The inputs aren't known, the model can't be traced or run, or its program
            computes something else.
    """
    dtypes = {p.dtype for p in model.parameters()}
    if kind == "onnx":
        check_onnx()
        if torch.bfloat16 in dtypes:
            raise InputError(
                "the model is bfloat16, which onnxruntime doesn't compute with on a CPU. Give "
                'dtype="float32" or dtype="float16".'
            )
    inputs = example_inputs(model, given)
    longer = (0, 0) if inputs.given else LONGER
    batches = [inputs.drawn_again(n, m, seed=n) for n, m in zip(BATCHES, longer, strict=True)]
    expected = [run(model, batch) for batch in batches]
    names = output_names(expected[0])
    traced = trace(model, inputs.drawn_again(BATCH, 0, seed=0), plain=kind == "onnx")
    found = None
    if kind == "onnx":
        write_onnx(traced, names, file)
        if has_onnxruntime():
            found = run_onnx(file, batches)
    else:
        write_pt2(traced, file)
        found = run_pt2(file, batches)
    difference = None
    if found is not None:
        pairs = zip(found, map(tensors_of, expected), strict=True)
        difference = max(largest_difference(one, other) for one, other in pairs)
        allowed = EQUAL_IN_HALF_PRECISION if dtypes & {*HALVES} else EQUAL
        if not difference <= allowed:
            raise InputError(
                f"the {kind} file doesn't compute what the model does: its outputs differ by "
                f"{difference:.2g} of the largest, {allowed:g} is allowed. It was not kept; use "
                'to="dense" or to="pairs".'
            )
    described = {
        name: (
            str(tensor.dtype).removeprefix("torch."),
            tuple(traced.axes[name].get(axis, side) for axis, side in enumerate(tensor.shape)),
        )
        for name, tensor in traced.inputs.tensors.items()
    }
    return Program(described, names, difference)
