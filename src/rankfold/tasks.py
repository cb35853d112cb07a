"""What a model's loss is: recognised from the model and the data where it can be, named, or given.

Every task returns one loss per example and the number of terms in it (tokens of a sequence, 1 for
an image). The loss of a data set is the mean over terms.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.agreement import Embedding as Embedding
from rankfold.agreement import Teacher as Teacher
from rankfold.agreement import unit_embeddings as unit_embeddings
from rankfold.data import Batch, Part, describe
from rankfold.errors import InputError
from rankfold.losses import (
    IGNORED,
    call,
    check_labels,
    labels_of,
    logits_of,
    one_term,
    output_of,
    token_losses,
    with_labels,
)
from rankfold.losses import BatchLoss as BatchLoss
from rankfold.losses import Task as Task
from rankfold.modes import evaluation_mode
from rankfold.progress import Progress, SilentProgress

LossFunction: TypeAlias = Callable[[nn.Module, Batch], Tensor]

TaskName: TypeAlias = Literal[
    "causal-lm", "masked-lm", "classification", "token-classification", "seq2seq", "embedding",
    "regression", "teacher",
]  # fmt: skip
TASKS: tuple[TaskName, ...] = get_args(TaskName)


class CausalLM:
    """Next-token prediction: cross-entropy of each token given those before it."""

    name = "causal-lm"
    unit = "nats per token"
    agreement = False

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is ``(n, length)`` token ids, or a mapping with ``input_ids``."""
        inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        labels = cast("Tensor", inputs.pop("labels", inputs["input_ids"]))
        mask = inputs.get("attention_mask")
        if mask is not None:
            labels = labels.masked_fill(mask == 0, IGNORED)
        logits = logits_of(call(model, inputs, wrapped=isinstance(batch, Mapping)))
        return token_losses(logits[:, :-1], labels[:, 1:])


class TokenLabels:
    """A label for each token, or for some (-100 marks the others): cross-entropy in its place."""

    unit = "nats per token"
    agreement = False

    def __init__(self, name: TaskName) -> None:
        """``masked-lm``, where the labels are the hidden tokens, or ``token-classification``."""
        self.name: str = name

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is a mapping with ``labels`` ``(n, length)``."""
        inputs, labels = with_labels(self.name, batch, dimensions=2)
        return token_losses(logits_of(call(model, inputs, wrapped=True)), labels)


class Seq2Seq:
    """A text or other sequence to a text: cross-entropy of each target token."""

    name = "seq2seq"
    unit = "nats per token"
    agreement = False

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is a mapping with ``labels`` ``(n, length)``; -100 marks what is no target.

        Without ``decoder_input_ids`` the model makes them from the labels, as in its training.
        """
        inputs, labels = with_labels(self.name, batch, dimensions=2)
        if "decoder_input_ids" not in inputs:
            inputs = {**inputs, "labels": labels}
        return token_losses(logits_of(call(model, inputs, wrapped=True)), labels)


class Classification:
    """One label per example: cross-entropy of the logits."""

    name = "classification"
    unit = "nats per example"
    agreement = False

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is ``(inputs, labels)``, or a mapping with ``labels``."""
        inputs, labels = with_labels(self.name, batch, dimensions=1)
        logits = logits_of(output_of(model, inputs))
        if labels.is_floating_point():
            raise InputError(
                f"the labels are {str(labels.dtype).removeprefix('torch.')}; expected whole "
                "numbers, the class of each example. For values use task regression."
            )
        check_labels(labels, logits.shape[-1])
        losses = functional.cross_entropy(logits.float(), labels.long(), reduction="none")
        correct = (logits.argmax(-1) == labels).to(losses.dtype)
        return BatchLoss(losses, torch.ones_like(labels), logits, correct)


class Regression:
    """Values per example: mean squared error."""

    name = "regression"
    unit = "mean squared error"
    agreement = False

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is ``(inputs, values)``, or a mapping with ``labels``; values ``(n, ...)``."""
        inputs, labels = with_labels(self.name, batch, dimensions=None)
        values = logits_of(output_of(model, inputs)).float()
        wanted = labels.float()
        if values.numel() != wanted.numel() or len(values) != len(wanted):
            raise InputError(
                f"the model gave values {tuple(values.shape)} for labels {tuple(wanted.shape)}; "
                "expected as many values an example as labels."
            )
        scale = math.sqrt(values[0].numel())
        squared = values.flatten(1) / scale if values.dim() > 1 else values[:, None]
        target = wanted.reshape(len(wanted), -1) / scale
        losses = (squared - target).square().sum(1)
        return BatchLoss(losses, one_term(losses), squared=squared)


class UserLoss:
    """A user's callable ``loss(model, batch)`` that gives one loss per example."""

    name = "custom"
    unit = "units of the given loss"
    agreement = False

    def __init__(self, function: LossFunction, what: str = "loss function") -> None:
        """Use ``function``; messages call it ``what``."""
        self.function, self.what = function, what

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """One loss per example, each one term."""
        losses: object = self.function(model, batch)  # a user's function returns what it likes
        if not torch.is_tensor(losses) or losses.dim() != 1:
            shape = tuple(losses.shape) if torch.is_tensor(losses) else type(losses).__name__
            raise InputError(
                f"the {self.what} returned {shape}; expected a 1-D tensor with one value per "
                "example (reduction='none')."
            )
        return BatchLoss(losses, torch.ones_like(losses, dtype=torch.int64))


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


def recognise_task(
    part: Part,
    loss: LossFunction | None,
    name: str | None = None,
    originals: Sequence[nn.Module] = (),
    hint: str | None = None,
) -> Task:
    """The task: the user's loss or name if given, else what model and data show.

    Args:
        part: Examples; one batch of them is looked at.
        loss: The user's own loss, or None.
        name: One of ``TASKS``, or None.
        originals: The original model, for the tasks that compare with it; see ``Teacher``.
        hint: What the model is made for, as far as it says so.

    Raises:
        InputError: No such task, a task and a loss, or nothing is recognised.
    """
    if loss is not None and name is not None:
        raise InputError(f"both loss= and the task {name!r} are given; expected one of them.")
    if loss is not None:
        return UserLoss(loss)
    if name is not None and name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        suggestion = f" Did you mean {near[0]}?" if near else ""
        raise InputError(
            f"the task is {name!r}; expected one of {', '.join(TASKS)}.{suggestion} For another "
            "one pass loss=, a function of the model and a batch."
        )
    batch = part.collate(part.examples[:1])
    found = name or _recognised(batch, hint)
    if found is None:
        raise InputError(
            "the loss can't be recognised from the model and the data: expected token ids, a "
            "mapping with input_ids, or (input, integer label) pairs. Name the task, one of "
            f"{', '.join(TASKS)} (teacher needs no labels), or pass loss=, a function of the "
            "model and a batch that returns one loss per example."
        )
    if found in ("teacher", "embedding"):
        if not originals:
            raise InputError(
                f"the task {found} compares with the original model, which is not at hand here: "
                "lossless and compact have it, to verify it is given as the original."
            )
        kind = Embedding if found == "embedding" else Teacher
        moved = on_device(batch, originals[0])
        with running(moved):
            return kind(originals, moved)
    tasks: dict[str, Callable[[], Task]] = {
        "causal-lm": CausalLM,
        "masked-lm": lambda: TokenLabels("masked-lm"),
        "token-classification": lambda: TokenLabels("token-classification"),
        "classification": Classification,
        "seq2seq": Seq2Seq,
        "regression": Regression,
    }
    return tasks[found]()


def _recognised(batch: Batch, hint: str | None) -> str | None:
    """The task that a batch's labels and the model's purpose allow; labels decide where they do."""
    labels = labels_of(batch)
    if hint == "embedding" or (labels is None and hint in ("embedding", "causal-lm")):
        return hint
    if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
        return "classification"
    if labels is not None and labels.is_floating_point():
        return "regression" if hint in (None, "regression") else None
    if labels is not None and labels.dim() == 2:
        if hint in ("masked-lm", "token-classification", "seq2seq", "causal-lm"):
            return hint
        return "causal-lm" if isinstance(batch, Mapping) and "input_ids" in batch else None
    if labels is None and hint in (None, "causal-lm"):
        if isinstance(batch, Mapping) and "input_ids" in batch:
            return "causal-lm"
        if torch.is_tensor(batch) and batch.dim() == 2 and not batch.is_floating_point():
            return "causal-lm"
    return None


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
    batches = part.batches(batch_size)
    results: list[BatchLoss] = []
    with evaluation_mode(model):
        for examples in progress.track(batches, stage, len(batches)):
            batch = on_device(part.collate(examples), model)
            result = task.batch_loss(model, batch)
            results.append(BatchLoss(result.losses, result.terms, None, result.correct))
    losses = torch.cat([r.losses for r in results]).double().cpu()
    if finite and not bool(torch.isfinite(losses).all()):
        bad = int((~torch.isfinite(losses)).nonzero()[0])
        raise InputError(
            f"the loss of {part.name.replace('_', '-')} example {bad} is {float(losses[bad])}; "
            "expected finite losses. Check the model's weights and this example."
        )
    hits = [r.correct for r in results if r.correct is not None]
    terms = torch.cat([r.terms for r in results]).double().cpu()
    if float(terms.sum()) == 0:
        raise InputError(f"the {part.name} part has no label to predict: all are masked (-100).")
    return Evaluation(losses, terms, torch.cat(hits).double().cpu() if hits else None)


@contextmanager
def running(batch: Batch) -> Iterator[None]:
    """While the model runs on its first example: what it raises names the data.

    Raises:
        InputError: The model can't run on the batch.
    """
    try:
        yield
    except (InputError, torch.cuda.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise InputError(
            f"the model can't run on the data: its first calibration example, "
            f"{describe(batch)}, gave {type(error).__name__}: {error}. Check that the data "
            "belongs to this model."
        ) from error


def on_device(batch: Batch, model: nn.Module) -> Batch:
    """The batch with its tensors on the model's device, floating ones in the model's dtype."""
    parameters = list(model.parameters())
    if not parameters:
        return batch
    # Weights may be stored in int8 beside their scales; inputs are of the type computed with.
    parameter = next((p for p in parameters if p.is_floating_point()), parameters[0])

    def move(value: Any) -> Any:
        if torch.is_tensor(value):
            dtype = parameter.dtype if value.is_floating_point() else value.dtype
            return value.to(parameter.device, dtype)
        if isinstance(value, Mapping):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return tuple(move(item) for item in value)
        return value

    return move(batch)
