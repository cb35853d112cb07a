"""What the export targets are, in words. Nothing here imports torch, which takes seconds."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

ProgramKind: TypeAlias = Literal["onnx", "pt2"]
PROGRAMS: tuple[ProgramKind, ...] = get_args(ProgramKind)

SUMMARIES = {
    "dense": "the original architecture, factors multiplied out",
    "pairs": "two stock layers for each factorized one",
    "onnx": "for onnxruntime",
    "pt2": "a program of torch.export",
}

DTYPES = ("float32", "float16", "bfloat16")  # that a program's weights may have
