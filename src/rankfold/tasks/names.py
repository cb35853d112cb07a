"""The words for tasks. Nothing here imports torch, which takes seconds."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

TaskName: TypeAlias = Literal[
    "causal-lm", "masked-lm", "classification", "token-classification", "seq2seq", "embedding",
    "regression", "teacher",
]  # fmt: skip
TASKS: tuple[TaskName, ...] = get_args(TaskName)
TEXT: tuple[TaskName, ...] = ("causal-lm", "masked-lm", "seq2seq")  # examples are pieces of text
