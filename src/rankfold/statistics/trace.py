"""One example through a model: which layers it calls, and how much they compute."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.data.parts import Part
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.model.layer_matrix import (
    call_input,
)
from rankfold.tasks.evaluation import on_device, running
from rankfold.tasks.losses import Task


@dataclass(frozen=True)
class Trace:
    """What one example's forward pass shows.

    Attributes:
        rows: For every module with a weight that was called: the rows that its matrix multiplies,
            of an embedding those that are looked up.
        flops: Floating-point operations (2 a multiply-add) of all weighted modules, one example.
        image_sizes: Height and width of the input of every call of a Conv2d.
    """

    rows: dict[str, int]
    flops: dict[str, int]
    image_sizes: dict[str, list[tuple[int, int]]]


def trace(model: nn.Module, task: Task, part: Part, given: nn.Module | None = None) -> Trace:
    """Run one calibration example forward and see which modules are called, on how many rows.

    Args:
        model: The model, unpacked.
        task: Gives the loss.
        part: The examples.
        given: The model as the user gave it, to say whose an error is.

    Raises:
        InputError: The model can't run on it.
    """
    rows: dict[str, int] = {}
    flops: dict[str, int] = {}
    image_sizes: dict[str, list[tuple[int, int]]] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is None or weight.dim() < 2 or weight.numel() == 0:
                continue

            def count(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: Any,
                name: str = name,
                weight: Tensor = weight,
            ) -> None:
                if not torch.is_tensor(output):
                    return
                if isinstance(module, nn.Embedding):  # rows are fetched, nothing is computed
                    rows[name] = rows.get(name, 0) + output.numel() // weight.shape[1]
                else:
                    if isinstance(module, nn.Conv2d):
                        height, width = call_input(args, kwargs).shape[-2:]
                        image_sizes.setdefault(name, []).append((height, width))
                    calls = output.numel() // weight.shape[0]
                    rows[name] = rows.get(name, 0) + calls
                    flops[name] = flops.get(name, 0) + 2 * calls * weight.numel()

            stack.callback(
                module.register_forward_hook(count, prepend=True, with_kwargs=True).remove
            )
        batch = on_device(part.collate(part.examples[:1]), model)
        as_given = None if given in (None, model) else partial(_runs_alone, given, task, batch)
        with evaluation_mode(model), running(batch, as_given, whose=getattr(task, "what", None)):
            task.batch_loss(model, batch)
    return Trace(rows, flops, image_sizes)


def _runs_alone(given: nn.Module | None, task: Task, batch: Any) -> None:
    if given is not None:
        with evaluation_mode(given):
            task.batch_loss(given, batch)
