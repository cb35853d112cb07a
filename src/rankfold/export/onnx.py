"""Traced models as ONNX files, and what onnxruntime computes with them."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import InputError, require
from rankfold.export.example_inputs import ExampleInputs
from rankfold.export.torch_export import Traced

EXTRA = "onnx"
LARGEST_CONSTANT = 64  # bytes that the exporter may compute once and store


def check_onnx() -> None:
    """Refuse before any work is done.

    Raises:
        InputError: A package is missing.
    """
    for package in ("onnx", "onnxscript"):
        require(package, EXTRA)


def write_onnx(traced: Traced, outputs: Sequence[str], file: Path) -> None:
    """Write a program as one ONNX file; above 1.5 GB its weights lie beside it, in ``.data``.

    The weights in the file are those of the model, each once: the exporter would otherwise
    multiply what is made of weights alone, such as identity rows put into a pivoted factor.

    Args:
        traced: Of float32 or float16.
        outputs: Names of its outputs.
        file: Where to.

    Raises:
        InputError: An operation of the model has no ONNX form, or a package is missing.
    """
    check_onnx()
    optimizer = require("onnxscript.optimizer", EXTRA)
    inputs = traced.inputs
    with _quiet():
        try:
            made: Any = torch.onnx.export(
                traced.program,
                inputs.args,
                kwargs=inputs.kwargs,
                dynamo=True,
                optimize=False,
                verbose=False,
                output_names=outputs,
                dynamic_shapes={name: dict(axes) for name, axes in traced.axes.items()},
            )
        except Exception as error:
            cause = str(error).strip().splitlines()[-1].removesuffix(".")
            raise InputError(
                f"torch's exporter can't write this model as ONNX: {cause}. "
                'Use to="pt2" or to="dense".'
            ) from error
        weights = set(made.model.graph.initializers)
        optimizer.optimize_ir(
            made.model,
            output_size_limit=LARGEST_CONSTANT,
            should_fold=lambda node: False if _uses(node, weights) else None,
        )
        graph = made.model.graph
        values = (*graph.inputs, *graph.outputs, *graph.initializers.values())
        for part in (made.model, graph, *graph.all_nodes(), *values):
            part.metadata_props.clear()  # what the exporter notes for its own developers
        made.save(file)


def has_onnxruntime() -> bool:
    """Whether what was written can be run."""
    return importlib.util.find_spec("onnxruntime") is not None


def run_onnx(file: Path, batches: Sequence[ExampleInputs]) -> list[list[Tensor]]:
    """What onnxruntime computes of each batch, on the CPU.

    Raises:
        InputError: onnxruntime can't run the file, or isn't installed.
    """
    onnxruntime = require("onnxruntime", EXTRA)
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return [_run(session, batch) for batch in batches]
    except Exception as error:  # onnxruntime's own errors share no other base
        raise InputError(f"onnxruntime can't run the exported model: {error}") from error


def _run(session: Any, batch: ExampleInputs) -> list[Tensor]:
    given = {name: tensor.numpy() for name, tensor in batch.tensors.items()}
    # What the model doesn't use is no input of the graph.
    taken = {value.name for value in session.get_inputs()}
    outputs = session.run(None, {name: value for name, value in given.items() if name in taken})
    return [torch.from_numpy(output) for output in outputs]


def _uses(node: Any, weights: set[str]) -> bool:
    return any(value is not None and value.name in weights for value in node.inputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that it doesn't need here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
