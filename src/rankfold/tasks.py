"""What a model's loss is: recognised for causal language models and classifiers, else given.

Every task returns one loss per example and the number of log-likelihood terms in it (tokens of a
sequence, 1 for an image). The loss of a data set is the mean over terms.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.data import Batch, Part
from rankfold.errors import InputError
from rankfold.modes import evaluation_mode
from rankfold.progress import Progress, SilentProgress

LossFunction: TypeAlias = Callable[[nn.Module, Batch], Tensor]
IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclass(frozen=True)
class BatchLoss:
    """Losses of one batch, differentiable.

    Attributes:
        losses: ``(n,)`` mean loss of each example's terms.
        terms: ``(n,)`` number of terms of each example.
        logits: ``(terms, classes)`` of all terms, or None where the loss is the user's own.
        correct: ``(n,)`` share of each example's terms predicted right, or None.
    """

    losses: Tensor
    terms: Tensor
    logits: Tensor | None = None
    correct: Tensor | None = None


class Task(Protocol):
    """A way to compute losses."""

    name: str
    unit: str

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """Losses of a batch that is already on the model's device."""
        ...


class CausalLM:
    """Next-token prediction: cross-entropy of each token given those before it."""

    name = "causal-lm"
    unit = "nats per token"

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is ``(n, length)`` token ids, or a mapping with ``input_ids``."""
        inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        labels = cast("Tensor", inputs.pop("labels", inputs["input_ids"]))
        mask = inputs.get("attention_mask")
        if mask is not None:
            labels = labels.masked_fill(mask == 0, IGNORED)
        logits = _logits(_call(model, inputs, wrapped=isinstance(batch, Mapping)))
        logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels != IGNORED
        _check_labels(labels[kept], logits.shape[-1])
        flat = logits[kept]  # (terms, vocabulary)
        nll = functional.cross_entropy(flat.float(), labels[kept], reduction="none")
        rows = kept.nonzero()[:, 0]
        terms = kept.sum(1)
        losses = nll.new_zeros(len(labels)).index_add(0, rows, nll) / terms.clamp(min=1)
        hits = (flat.argmax(-1) == labels[kept]).to(nll.dtype)
        correct = hits.new_zeros(len(labels)).index_add(0, rows, hits) / terms.clamp(min=1)
        return BatchLoss(losses, terms, flat, correct)


class Classification:
    """One label per example: cross-entropy of the logits."""

    name = "classification"
    unit = "nats per example"

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is ``(inputs, labels)``, or a mapping with ``labels``."""
        if isinstance(batch, Mapping):
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            labels = cast("Tensor", batch["labels"])
            logits = _logits(_call(model, inputs, wrapped=True))
        else:
            values, labels = batch
            logits = _logits(model(values))
        _check_labels(labels, logits.shape[-1])
        losses = functional.cross_entropy(logits.float(), labels.long(), reduction="none")
        correct = (logits.argmax(-1) == labels).to(losses.dtype)
        return BatchLoss(losses, torch.ones_like(labels), logits, correct)


class UserLoss:
    """A user's callable ``loss(model, batch)`` that gives one loss per example."""

    name = "custom"
    unit = "units of the given loss"

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


def recognise_task(part: Part, loss: LossFunction | None) -> Task:
    """The task of a data set: the user's loss if given, else read off one batch.

    Raises:
        InputError: The batch looks like neither token ids nor inputs with labels.
    """
    if loss is not None:
        return UserLoss(loss)
    batch = part.collate(part.examples[:1])
    if isinstance(batch, Mapping) and "input_ids" in batch:
        labels = batch.get("labels")
        return Classification() if labels is not None and labels.dim() == 1 else CausalLM()
    if isinstance(batch, Mapping) and "labels" in batch and batch["labels"].dim() == 1:
        return Classification()
    if torch.is_tensor(batch) and batch.dim() == 2 and not batch.is_floating_point():
        return CausalLM()
    if isinstance(batch, tuple | list) and len(batch) == 2 and torch.is_tensor(batch[1]):
        labels = batch[1]
        if labels.dim() == 1 and not labels.is_floating_point():
            return Classification()
    raise InputError(
        "the loss can't be recognised from the data: expected token ids, a mapping with "
        "input_ids, or (input, integer label) pairs. Pass loss=, a function of the model and a "
        "batch that returns one loss per example."
    )


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

    @property
    def accuracy(self) -> float | None:
        """Share of all terms predicted right, or None."""
        if self.correct is None:
            return None
        return float((self.correct * self.terms).sum() / self.terms.sum())


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


def on_device(batch: Batch, model: nn.Module) -> Batch:
    """The batch with its tensors on the model's device, floating ones in the model's dtype."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return batch

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


def _call(model: nn.Module, inputs: Mapping[str, Tensor], wrapped: bool) -> object:
    parameters = inspect.signature(model.forward).parameters
    if not wrapped and "input_ids" not in parameters:
        return model(inputs["input_ids"])
    extra = {"use_cache": False} if "use_cache" in parameters else {}
    return model(**inputs, **extra)


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    if not torch.is_tensor(logits):
        raise InputError(
            f"the model returned {type(output).__name__}; expected a tensor of logits or an object "
            "with .logits. Pass loss=, a function of the model and a batch."
        )
    return logits


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        bad = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise InputError(
            f"label {bad} is outside the model's {classes} logits (expected 0..{classes - 1}). "
            "Check that the data belongs to this model."
        )
