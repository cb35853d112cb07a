"""What a model's loss is: recognised from the model and the data where it can be, named, or given.

Every task returns one loss per example and the number of terms in it (tokens of a sequence, 1 for
an image). The loss of a data set is the mean over terms.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.data import Batch, Part, describe
from rankfold.errors import InputError
from rankfold.modes import evaluation_mode
from rankfold.progress import Progress, SilentProgress

LossFunction: TypeAlias = Callable[[nn.Module, Batch], Tensor]
IGNORED = -100  # the label that torch's cross-entropy leaves out

TaskName: TypeAlias = Literal[
    "causal-lm", "masked-lm", "classification", "token-classification", "seq2seq", "embedding",
    "regression", "teacher",
]  # fmt: skip
TASKS: tuple[TaskName, ...] = get_args(TaskName)


@dataclass(frozen=True)
class BatchLoss:
    """Losses of one batch, differentiable.

    Attributes:
        losses: ``(n,)`` mean loss of each example's terms.
        terms: ``(n,)`` number of terms of each example.
        logits: ``(terms, classes)`` of all terms, or None where the loss is no cross-entropy.
        correct: ``(n,)`` share of each example's terms predicted right, or None.
        squared: Values whose squared distance from what they should be is the sum over examples of
            ``losses * terms``, or None where the loss is no squared error.
    """

    losses: Tensor
    terms: Tensor
    logits: Tensor | None = None
    correct: Tensor | None = None
    squared: Tensor | None = None


class Task(Protocol):
    """A way to compute losses.

    Attributes:
        name: One of ``TASKS``, or ``custom``.
        unit: Of the loss.
        agreement: Whether the loss is the distance from the original model's own outputs: then it
            is 0 for the original, and no step can lower it.
    """

    name: str
    unit: str
    agreement: bool

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """Losses of a batch that is already on the model's device."""
        ...


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
        logits = _logits(_call(model, inputs, wrapped=isinstance(batch, Mapping)))
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
        inputs, labels = _with_labels(self.name, batch, dimensions=2)
        return token_losses(_logits(_call(model, inputs, wrapped=True)), labels)


class Seq2Seq:
    """A text or other sequence to a text: cross-entropy of each target token."""

    name = "seq2seq"
    unit = "nats per token"
    agreement = False

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is a mapping with ``labels`` ``(n, length)``; -100 marks what is no target.

        Without ``decoder_input_ids`` the model makes them from the labels, as in its training.
        """
        inputs, labels = _with_labels(self.name, batch, dimensions=2)
        if "decoder_input_ids" not in inputs:
            inputs = {**inputs, "labels": labels}
        return token_losses(_logits(_call(model, inputs, wrapped=True)), labels)


def token_losses(logits: Tensor, labels: Tensor) -> BatchLoss:
    """Cross-entropy of labelled tokens.

    Args:
        logits: ``(n, length, classes)``.
        labels: ``(n, length)``; -100 where there is none.

    Raises:
        InputError: The shapes don't match, or a label is outside the logits.
    """
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise InputError(
            f"the model gave logits {tuple(logits.shape)} for labels {tuple(labels.shape)}; "
            "expected logits (examples, tokens, classes) for labels (examples, tokens). Check "
            "that the task is the model's."
        )
    kept = labels != IGNORED
    _check_labels(labels[kept], logits.shape[-1])
    flat = logits[kept]  # (terms, classes)
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
    agreement = False

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is ``(inputs, labels)``, or a mapping with ``labels``."""
        inputs, labels = _with_labels(self.name, batch, dimensions=1)
        logits = _logits(_output(model, inputs))
        if labels.is_floating_point():
            raise InputError(
                f"the labels are {str(labels.dtype).removeprefix('torch.')}; expected whole "
                "numbers, the class of each example. For values use task regression."
            )
        _check_labels(labels, logits.shape[-1])
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
        inputs, labels = _with_labels(self.name, batch, dimensions=None)
        values = _logits(_output(model, inputs)).float()
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
        return BatchLoss(losses, _ones(losses), squared=squared)


class Teacher:
    """Agreement with the original model: how far the outputs are from its own. No labels.

    Where the model gives logits, the Kullback-Leibler divergence of its predictions from the
    original's, in nats per term; else the squared distance of the outputs as a share of the
    original's squared norm.

    Args:
        originals: The original model, first in the form in which it is called, and others that are
            the same function: their outputs are at distance 0 without calling the first.
        batch: One to see what the model gives: logits where it says so, or where the labels beside
            the inputs are classes.
    """

    name = "teacher"
    agreement = True

    def __init__(self, originals: Sequence[nn.Module], batch: Batch) -> None:
        """As said."""
        self.originals = originals
        labels = _labels_of(batch)
        classes = labels is not None and labels.dim() == 1 and not labels.is_floating_point()
        output = self._original(_without_labels(batch), _output)
        self.logits = _field(output, "logits") is not None or (classes and torch.is_tensor(output))
        self.unit = (
            "nats of divergence from the original"
            if self.logits
            else "squared distance from the original, as a share"
        )

    def _original(self, inputs: Any, output: Callable[[nn.Module, Any], Any]) -> Any:
        with evaluation_mode(self.originals[0]):
            return output(self.originals[0], inputs)

    def _both(
        self, model: nn.Module, inputs: Any, output: Callable[[nn.Module, Any], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Outputs of a model and of the original, which is not called where the model is it."""
        same = any(model is original for original in self.originals)
        wanted = None if same else self._original(inputs, output)
        found = output(model, inputs)
        return found, found.detach() if wanted is None else wanted

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is what the model takes; labels beside it are not looked at."""
        inputs = _without_labels(batch)
        mask = _field(inputs, "attention_mask")
        if self.logits:
            found, wanted = self._both(model, inputs, lambda m, x: _logits(_output(m, x)))
            return _divergence(found, wanted, mask)
        found, wanted = self._both(model, inputs, lambda m, x: _values(_output(m, x)).float())
        return _relative_distance(found, wanted, mask)


class Embedding(Teacher):
    """Agreement of sentence embeddings with the original's: squared distance of unit vectors.

    The embedding is what the model calls ``sentence_embedding``; else the mean of the last hidden
    states over the tokens, as sentence encoders are trained; else the output itself.
    """

    name = "embedding"

    def __init__(self, originals: Sequence[nn.Module], batch: Batch) -> None:
        """As ``Teacher``."""
        super().__init__(originals, batch)
        self.unit = "squared distance of unit embeddings from the original"

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is what the model takes; labels beside it are not looked at."""
        found, wanted = self._both(model, _without_labels(batch), unit_embeddings)
        losses = (found - wanted).square().sum(1)
        return BatchLoss(losses, _ones(losses), squared=found)


def unit_embeddings(model: nn.Module, inputs: Any) -> Tensor:
    """Embeddings of a model, ``(n, features)`` float32 of length 1; see ``Embedding``."""
    output = _output(model, inputs)
    found, hidden = _field(output, "sentence_embedding"), _field(output, "last_hidden_state")
    if found is None and hidden is not None and hidden.dim() == 3:
        mask = _field(inputs, "attention_mask")
        if mask is None or mask.shape != hidden.shape[:2]:  # images have no mask of their patches
            mask = hidden.new_ones(hidden.shape[:2])
        weights = mask.to(hidden.dtype)
        found = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
    found = _values(output) if found is None else found
    return functional.normalize(found.float().flatten(1), dim=-1)


def _divergence(found: Tensor, original: Tensor, mask: Tensor | None) -> BatchLoss:
    """``KL(original || found)`` of each term; tokens that ``mask`` hides are none."""
    kept = torch.ones(found.shape[:-1], dtype=torch.bool, device=found.device)
    if mask is not None and mask.shape == kept.shape:
        kept = mask != 0
    log_found, log_original = (t[kept].float().log_softmax(-1) for t in (found, original))
    each = (log_original.exp() * (log_original - log_found)).sum(-1)  # (terms,)
    rows, terms = kept.nonzero()[:, 0], kept.flatten(1).sum(1) if kept.dim() > 1 else kept.long()
    losses = each.new_zeros(len(found)).index_add(0, rows, each) / terms.clamp(min=1)
    hits = (log_found.argmax(-1) == log_original.argmax(-1)).to(each.dtype)
    correct = hits.new_zeros(len(found)).index_add(0, rows, hits) / terms.clamp(min=1)
    return BatchLoss(losses, terms, found[kept], correct)


def _relative_distance(found: Tensor, original: Tensor, mask: Tensor | None) -> BatchLoss:
    if mask is not None and mask.shape == found.shape[:2] and found.dim() == 3:
        found, original = (t * mask[..., None].to(t.dtype) for t in (found, original))
    found, original = found.flatten(1), original.flatten(1)
    norms = original.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    squared = found / norms
    losses = (squared - original / norms).square().sum(1)
    return BatchLoss(losses, _ones(losses), squared=squared)


def _field(output: Any, name: str) -> Tensor | None:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if torch.is_tensor(value) else None


def _values(output: Any) -> Tensor:
    """The output as one tensor ``(n, ...)``: embeddings by name, last hidden states, or the first.

    Raises:
        InputError: There is no floating tensor in it.
    """
    if torch.is_tensor(output):
        return output
    if isinstance(output, Mapping):
        named = [v for k, v in output.items() if k.endswith("_embeds") and torch.is_tensor(v)]
        if named:  # several towers, such as of images and texts: each counts alike
            return torch.cat([functional.normalize(v.float(), dim=-1) for v in named], dim=-1)
        hidden = _field(output, "last_hidden_state")
        if hidden is not None:
            return hidden
    items = output.values() if isinstance(output, Mapping) else output
    if isinstance(items, tuple | list) or isinstance(output, Mapping):
        for item in items:
            if torch.is_tensor(item) and item.is_floating_point():
                return item
    raise InputError(
        f"the model returned {type(output).__name__}; expected a tensor or an object with one. "
        "Pass loss=, a function of the model and a batch."
    )


def _ones(losses: Tensor) -> Tensor:
    return torch.ones_like(losses, dtype=torch.int64)


def _without_labels(batch: Batch) -> Any:
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in ("labels", "label")}
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0]
    return batch


def _with_labels(task: str, batch: Batch, dimensions: int | None) -> tuple[Any, Tensor]:
    """Inputs and labels of a batch.

    Raises:
        InputError: There are no labels, or of another shape.
    """
    inputs = _without_labels(batch)
    if isinstance(batch, Mapping):
        labels = batch.get("labels", batch.get("label"))
    else:
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    if not torch.is_tensor(labels):
        found = describe(batch)
        raise InputError(
            f"the task {task} needs labels, and the data give {found}; expected (input, label) "
            "pairs or mappings with labels. Without labels use task teacher."
        )
    if dimensions is not None and labels.dim() != dimensions:
        expected = "one label an example" if dimensions == 1 else "one label a token"
        raise InputError(
            f"the task {task} expects {expected}; the labels of a batch are "
            f"{describe(labels)}. Check the data, or name another task."
        )
    return inputs, labels


def _output(model: nn.Module, inputs: Any) -> Any:
    return _call(model, inputs, wrapped=True) if isinstance(inputs, Mapping) else (
        _call(model, {"input_ids": inputs}, wrapped=False)
        if torch.is_tensor(inputs) and not inputs.is_floating_point()
        else model(inputs)
    )  # fmt: skip


class UserLoss:
    """A user's callable ``loss(model, batch)`` that gives one loss per example."""

    name = "custom"
    unit = "units of the given loss"
    agreement = False

    def __init__(self, function: LossFunction) -> None:
        """Use ``function``."""
        self.function = function

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """One loss per example, each one term."""
        losses: object = self.function(model, batch)  # a user's function returns what it likes
        if not torch.is_tensor(losses) or losses.dim() != 1:
            shape = tuple(losses.shape) if torch.is_tensor(losses) else type(losses).__name__
            raise InputError(
                f"the loss function returned {shape}; expected a 1-D tensor with one loss per "
                "example (reduction='none')."
            )
        return BatchLoss(losses, torch.ones_like(losses, dtype=torch.int64))


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
                f"the task {found} compares with the original model, which is not at hand here; "
                "it belongs to lossless and compact."
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


def _labels_of(batch: Batch) -> Tensor | None:
    if isinstance(batch, Mapping):
        labels = batch.get("labels", batch.get("label"))
    else:
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    return labels if torch.is_tensor(labels) else None


def _recognised(batch: Batch, hint: str | None) -> str | None:
    """The task that a batch's labels and the model's purpose allow; labels decide where they do."""
    labels = _labels_of(batch)
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


@contextmanager
def running(batch: Batch) -> Iterator[None]:
    """While the model runs on its first example: what it raises names the data.

    Raises:
        InputError: The model can't run on the batch.
    """
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise InputError(
            f"the model can't run on the data: its first calibration example, "
            f"{describe(batch)}, gave {type(error).__name__}: {error}. Check that the data "
            "belongs to this model."
        ) from error


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
