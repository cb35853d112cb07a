"""Whether a model gives the same twice: original and factorized are compared on the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.data.example import content_digest
from rankfold.data.parts import Batch, Part
from rankfold.errors import InputError
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.tasks.evaluation import on_device, running
from rankfold.tasks.losses import Task, output_of, without_labels

LOOKED_AT = 8  # examples
RUNS = 3  # of the same batch
ROUNDING, ROUNDING_HALF = 1e-5, 1e-2  # relative differences that sums in another order have


def refuse_random(model: nn.Module, task: Task, part: Part) -> None:
    """Compute the loss of one batch twice, and refuse what is another one each time.

    Args:
        model: The original, in any mode.
        task: Gives the loss.
        part: A batch of its examples is looked at.

    Raises:
        InputError: Names what draws: the collate function, a module, or the loss.
    """
    examples, given = one_batch(part)
    batch = on_device(given, model)
    looked_at = f"a batch of {len(examples)} examples of the {part.name.replace('_', '-')} part"
    whose = getattr(task, "what", None)
    with evaluation_mode(model), running(batch, what=looked_at, whose=whose):
        first, *others = (values_of_batch(model, task, batch) for _ in range(RUNS))
        rounding = rounding_of(model)
        second = next((one for one in others if not alike(first, one, rounding)), None)
        if second is None:
            return
        name = _that_draws(model, batch, rounding)
    if name is None and alike(first, second, rounding, rounding):
        return  # losses near 0 are differences of large numbers
    raise InputError(_message(task, name))


def one_batch(part: Part) -> tuple[list[Any], Batch]:
    """Some examples from all over a part, and the batch that is made of them.

    Raises:
        InputError: The collate function makes another one each time.
    """
    examples = max(part.spread(LOOKED_AT).batches(), key=len)
    batches = [part.collate(examples) for _ in range(RUNS)]
    if len({*map(_digest, batches)}) > 1:
        raise InputError(
            f"the collate function makes another batch of the same examples of the "
            f"{part.name.replace('_', '-')} part each time: it draws at "
            "random, as one that hides words or augments images. Original and factorized model "
            "are compared on the same: draw once, before, and give examples that are drawn already."
        )
    return examples, batches[0]


def _digest(batch: Batch) -> str | None:
    """None of a batch that holds other things than tensors: its losses are compared alone."""
    try:
        return content_digest(batch)
    except InputError:
        return None


def values_of_batch(model: nn.Module, task: Task, batch: Batch) -> list[Tensor]:
    """Losses and their numbers of terms; of a task of agreement, where they are 0, the outputs."""
    if task.agreement:
        return [*_tensors(output_of(model, without_labels(batch)))]
    found = task.batch_loss(model, batch)
    return [found.losses, found.terms]


def rounding_of(model: nn.Module) -> float:
    """Of results of a model, relative to the largest of them."""
    types = {parameter.dtype for parameter in model.parameters()}
    return ROUNDING_HALF if types & {torch.float16, torch.bfloat16} else ROUNDING


def alike(first: list[Tensor], second: list[Tensor], rounding: float, least: float = 0.0) -> bool:
    """Whether tensors are equal but for rounding, and for differences of ``least``."""
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return False
    for one, other in zip(first, second, strict=True):
        largest = float(one.detach().double().abs().nan_to_num().max()) if one.numel() else 0.0
        within = max(least, rounding * largest)
        if not torch.allclose(one.double(), other.double(), rtol=0, atol=within, equal_nan=True):
            return False
    return True


def _tensors(value: Any) -> Iterator[Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _kept(value: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in _tensors(value)]


def _that_draws(model: nn.Module, batch: Batch, rounding: float) -> str | None:
    """The first module that gives two outputs for one input, innermost first, with its class."""
    passes: list[list[tuple[str, list[Tensor], list[Tensor]]]] = []
    found: str | None = None
    with ExitStack() as stack:
        for name, module in model.named_modules():

            def saw(
                module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name
            ) -> None:
                given, made = map(_kept, ((args, kwargs), output))
                kind = type(module).__name__
                shown = f"the module {name} ({kind})" if name else f"the model ({kind})"
                passes[-1].append((shown, given, made))

            stack.callback(module.register_forward_hook(saw, with_kwargs=True).remove)
        for _ in range(2):
            passes.append([])
            output_of(model, without_labels(batch))
    for (name, given, made), (_, given_then, made_then) in zip(*passes, strict=False):
        same_given = alike(given, given_then, rounding)
        if found is None and same_given and not alike(made, made_then, rounding):
            found = name
    return found


def _message(task: Task, name: str | None) -> str:
    what = "outputs" if task.agreement else "losses"
    advice = (
        f"{name} gives two outputs for one input. A dropout that is called as a function needs "
        "training=self.training; noise belongs into training alone"
        if name is not None
        else "the model gives the same twice, so it is the loss function (loss=) that draws. Let "
        "it give the same for the same"
    )
    return (
        f"the model's {what} for the same examples are others each time, in evaluation mode: "
        f"{advice}. Original and factorized model are compared on the same."
    )
