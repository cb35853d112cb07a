"""Losses of a model on a part of the data, example by example."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rankfold.data.example import describe
from rankfold.data.parts import Batch, Part
from rankfold.errors import InputError, check_kind, of_another_kind
from rankfold.machine import processes
from rankfold.machine.memory import memory_ran_out
from rankfold.machine.progress import Progress, SilentProgress
from rankfold.machine.weights import in_files
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.tasks.in_step import once_for_many
from rankfold.tasks.losses import BatchLoss, Task
from rankfold.tasks.supervised import (
    LossFunction,
    UserLoss,
)


@dataclass(frozen=True)
class Metric:
    """A user's metric of which more is better, certified beside the loss.

    Attributes:
        name: How the report calls it.
        function: ``function(model, batch)`` giving one value from 0 to 1 per example.
        margin: How much of its mean may be lost, as a share; None only reports it.
    """

    name: str
    function: LossFunction
    margin: float | None = None


def check_functions(loss: object, metrics: object) -> None:
    """Refuse a loss that can't be called, and metrics that are no list of ``Metric``.

    Raises:
        InputError: As said.
    """
    if loss is not None and not callable(loss):
        expected = "a function of the model and a batch that gives one loss per example"
        raise of_another_kind("loss", loss, expected)
    check_kind("metrics", metrics, (list, tuple), "a list of rankfold.Metric")
    for metric in cast("Sequence[object]", metrics):
        check_kind("an entry of metrics", metric, Metric, "a rankfold.Metric")
        function = cast("Any", metric).function
        if not callable(function):
            expected = "a function of the model and a batch"
            raise of_another_kind("the function of a metric", function, expected)


def metric_values(
    metric: Metric,
    model: nn.Module,
    part: Part,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """``(n,)`` float64 values of a metric on a part; not checked for their range.

    Raises:
        InputError: The function doesn't give one value per example.
    """
    stage = f"{metric.name} on {part.name.replace('_', '-')} data"
    task = UserLoss(metric.function, what=f"metric {metric.name}")
    return evaluate(
        model, task, part, batch_size=batch_size, progress=progress, stage=stage, finite=False
    ).losses


@dataclass(frozen=True)
class Evaluation:
    """A model's losses on a data set.

    Attributes:
        losses: ``(n,)`` float64 mean loss of each example's terms.
        terms: ``(n,)`` float64 number of terms of each example.
        correct: ``(n,)`` float64 share of terms predicted right, or None.
    """

    losses: Tensor
    terms: Tensor
    correct: Tensor | None

    @property
    def mean(self) -> float:
        """Mean loss over all terms."""
        return float((self.losses * self.terms).sum() / self.terms.sum())

    def of(self, places: Sequence[int]) -> Evaluation:
        """Of the examples with these numbers, in this order."""
        correct = None if self.correct is None else self.correct[places]
        return Evaluation(self.losses[places], self.terms[places], correct)

    def first(self, count: int) -> Evaluation:
        """Of the first examples only."""
        correct = None if self.correct is None else self.correct[:count]
        return Evaluation(self.losses[:count], self.terms[:count], correct)

    @property
    def accuracy(self) -> float | None:
        """Share of all terms predicted right, or None."""
        if self.correct is None:
            return None
        return float((self.correct * self.terms).sum() / self.terms.sum())


def joined(found: Sequence[Evaluation]) -> Evaluation:
    """The evaluations of consecutive examples as one."""
    correct = [e.correct for e in found if e.correct is not None]
    return Evaluation(
        torch.cat([e.losses for e in found]),
        torch.cat([e.terms for e in found]),
        torch.cat(correct) if correct else None,
    )


def evaluate(
    model: nn.Module,
    task: Task,
    part: Part,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
    stage: str = "evaluate",
    finite: bool = True,
) -> Evaluation:
    """The model's losses on every example of a part, without gradients.

    Args:
        model: The model.
        task: Gives the loss.
        part: The examples.
        batch_size: Examples a batch.
        progress: Shows the batches.
        stage: What the progress calls this.
        finite: Refuse losses that are not finite; False for trials that may destroy the model.

    Raises:
        InputError: A loss is NaN or infinite.
    """
    progress = progress or SilentProgress()
    if batch_size is not None:
        check_kind("batch_size", batch_size, Integral, "a whole number of 1 or more")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected 1 or more.")
    batches = processes.mine(part.batches(batch_size))
    with evaluation_mode(model):
        runs = [partial(_batch_loss, model, task, part, examples) for examples in batches]
        passes = once_for_many(model, runs, _same) if in_files(model) else (run() for run in runs)
        results = list(progress.track(passes, stage, len(batches)))
    results = processes.in_order(processes.gathered(results, stage))
    losses = torch.cat([r.losses for r in results]).double().cpu()
    if finite and not bool(torch.isfinite(losses).all()):
        bad = int((~torch.isfinite(losses)).nonzero()[0])
        raise InputError(
            f"the loss of {part.name.replace('_', '-')} example {part.number(bad)} is "
            f"{float(losses[bad])}; "
            "expected finite losses. Check the model's weights and this example."
        )
    hits = [r.correct for r in results if r.correct is not None]
    terms = torch.cat([r.terms for r in results]).double().cpu()
    if float(terms.sum()) == 0:
        raise InputError(f"the {part.name} part has no label to predict: all are masked (-100).")
    return Evaluation(losses, terms, torch.cat(hits).double().cpu() if hits else None)


def _batch_loss(model: nn.Module, task: Task, part: Part, examples: list[Any]) -> BatchLoss:
    """Losses of one batch, without logits."""
    batch = on_device(part.collate(examples), model)
    of_part = f"a batch of the {part.name.replace('_', '-')} part"
    with running(batch, what=of_part, whose=getattr(task, "what", None)):
        result = task.batch_loss(model, batch)
    if len(result.losses) != len(examples):
        raise InputError(
            f"{of_part} has {len(examples)} examples, and {len(result.losses)} losses came "
            "back; expected one an example. The collate function makes a batch of all "
            "examples that it is given, and a loss function gives a value for each "
            "(reduction='none')."
        )
    return BatchLoss(result.losses, result.terms, None, result.correct)


def _same(first: BatchLoss, second: BatchLoss) -> bool:
    """Whether two passes gave the same losses, to the bit."""
    return torch.equal(
        first.losses.nan_to_num(torch.inf), second.losses.nan_to_num(torch.inf)
    ) and torch.equal(first.terms, second.terms)


def check_fast_path(model: nn.Module, task: Task, part: Part) -> None:
    """Refuse a model whose loss is another one where torch's fast path runs.

    There ``nn.TransformerEncoder`` gives zeros at positions that a padding mask hides. Otherwise,
    and once its layers are factorized, it gives values that mean nothing, and the model reads them.

    Raises:
        InputError: As said; both losses are named.
    """
    if not any(getattr(module, "use_nested_tensor", False) for module in model.modules()):
        return
    batch = on_device(part.collate(part.batches()[0]), model)
    with evaluation_mode(model):
        slow = task.batch_loss(model, batch).losses
        torch.backends.mha.set_fastpath_enabled(True)
        fast = task.batch_loss(model, batch).losses
    rounding = torch.finfo(slow.dtype).eps ** 0.5
    if not torch.allclose(fast, slow, rtol=rounding, atol=rounding, equal_nan=True):
        raise InputError(
            f"the model's loss is {float(fast.mean()):.4f} with torch's fast path and "
            f"{float(slow.mean()):.4f} without it, on the same examples: it reads what "
            "nn.TransformerEncoder gives at positions that src_key_padding_mask hides, zeros or "
            "values that mean nothing. Leave these positions out of what comes after the encoder, "
            "or make it with enable_nested_tensor=False."
        )


@contextmanager
def running(
    batch: Batch,
    as_given: Callable[[], object] | None = None,
    what: str = "its first calibration example",
    whose: str | None = None,
) -> Iterator[None]:
    """While the model runs on examples: what it raises names them and the error.

    Args:
        batch: The examples.
        as_given: Runs the model as the user gave it. Where that goes well, the error is not the
            user's.
        what: Which examples these are.
        whose: The user's function that runs the model, if one does: the error may be its own.

    Raises:
        InputError: The model can't run on the batch.
    """
    try:
        yield
    except (InputError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        if memory_ran_out(error):
            raise
        what = f"{what}, {describe(batch)}, gave {_raised(error)}"
        if as_given is not None and _runs(as_given):
            raise InputError(
                "the model runs on the data, but not with its layers written as Linear and conv: "
                f"{what}. That is a fault of rankfold, not of the model or the data: please report "
                "it. The layer that raised it may be left out with exclude=."
            ) from error
        if whose is not None:
            raise InputError(
                f"the {whose} can't be computed: {what}. It is called with a model and a batch and "
                "gives one value per example; calling it so in Python shows where."
            ) from error
        raise InputError(
            f"the model can't run on the data: {what}. Calling the model on one example in Python "
            "shows where: its inputs, their shapes and types are as the model's forward wants them?"
        ) from error


def _raised(error: Exception) -> str:
    """What was raised, and in which line of the model's own code, if it has any."""
    others = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
    frames = reversed(traceback.extract_tb(error.__traceback__))
    frame = next((f for f in frames if not f.filename.startswith(others)), None)
    where = "" if frame is None else f" ({Path(frame.filename).name}, line {frame.lineno})"
    return f"{type(error).__name__}: {error}{where}"


def _runs(function: Callable[[], object]) -> bool:
    try:
        function()
    except Exception:
        return False
    return True


# Names of what is compared with, hidden by or computed to positions with: no values of the model's.
_KEPT = re.compile(
    r"(^|_)(labels?|targets?|future|masks?)(_|$)"
    r"|(^|_)(positions?|position_ids|coords?|coordinates|times?|timestamps?|bbox|boxes)$"
)


def on_device(batch: Batch, model: nn.Module) -> Batch:
    """The batch with its tensors on the model's device, floating inputs in the model's dtype.

    Labels, targets, masks and positions keep their own dtype: what stands in a mapping under such
    a name, and all but the first of a tuple or list.
    """
    parameters = list(model.parameters())
    if not parameters:
        return batch
    # Weights may be stored in int8 beside their scales; inputs are of the type computed with.
    parameter = next((p for p in parameters if p.is_floating_point()), parameters[0])
    device, dtype = parameter.device, parameter.dtype

    def move(value: Any, kept: bool) -> Any:
        if torch.is_tensor(value):
            return value.to(device, dtype if value.is_floating_point() and not kept else None)
        if isinstance(value, PackedSequence):
            packed: Any = value  # the type of its method knows no device beside a dtype
            return packed.to(device, value.data.dtype if kept else dtype)
        if isinstance(value, Mapping):
            return {key: move(v, kept or bool(_KEPT.search(str(key)))) for key, v in value.items()}
        if isinstance(value, tuple | list):
            return _like(value, [move(item, kept) for item in value])
        return value

    if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        return _like(batch, [move(item, kept=place > 0) for place, item in enumerate(batch)])
    return move(batch, kept=False)


def _like(given: tuple[Any, ...] | list[Any], items: list[Any]) -> Any:
    """The items as what was given: a tuple, a list or a named tuple."""
    if isinstance(given, list):
        return items
    make = getattr(type(given), "_make", tuple)
    return make(items)
