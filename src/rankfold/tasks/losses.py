"""What every loss is made of: outputs of a model, labels of a batch, losses of each example."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.data.example import describe
from rankfold.data.parts import Batch
from rankfold.errors import InputError
from rankfold.model.layer_matrix import kept_dtype
from rankfold.tasks.last_token import last_token_output, reads_last_token
from rankfold.tasks.names import TASKS as TASKS
from rankfold.tasks.names import TEXT as TEXT
from rankfold.tasks.names import TaskName as TaskName

IGNORED = -100  # the label that torch's cross-entropy leaves out


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
            "expected logits (examples, tokens, classes) for labels (examples, tokens): a model "
            "that gives one row an example is of the task classification. Check the task."
        )
    labels = whole_labels(labels)
    kept = labels != IGNORED
    check_classes(logits)
    check_labels(labels[kept], logits.shape[-1])
    flat = logits[kept]  # (terms, classes)
    nll = functional.cross_entropy(exact(flat), labels[kept], reduction="none")
    hits = (flat.argmax(-1) == labels[kept]).to(nll.dtype)
    return loss_of_terms(nll, flat, hits, kept)


def exact(values: Tensor) -> Tensor:
    """Values as losses are computed of them: in float32, or float64 where they are float64."""
    return values.to(kept_dtype(values))


def whole_labels(labels: Tensor) -> Tensor:
    """Labels as int64, which holds every class and ``IGNORED``.

    Raises:
        InputError: They are no whole numbers.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise InputError(
            f"the labels are {str(labels.dtype).removeprefix('torch.')}; expected whole numbers, "
            "the class of each example or token. For values use task regression."
        )
    return labels.long()


def loss_of_terms(each: Tensor, logits: Tensor, hits: Tensor, kept: Tensor) -> BatchLoss:
    """Losses of terms as the means over the examples that they belong to.

    Args:
        each: ``(terms,)`` loss of each term.
        logits: ``(terms, classes)``.
        hits: ``(terms,)`` 1 where the term is predicted right, else 0.
        kept: ``(n,)`` or ``(n, length)`` bool, True where there is a term.
    """
    rows = kept.nonzero()[:, 0]
    terms = kept.flatten(1).sum(1) if kept.dim() > 1 else kept.long()

    def mean(values: Tensor) -> Tensor:
        return values.new_zeros(len(kept)).index_add(0, rows, values) / terms.clamp(min=1)

    return BatchLoss(mean(each), terms, logits, mean(hits))


def divergence(found: Tensor, original: Tensor) -> Tensor:
    """``KL(original || found)`` of the predictions of each term, ``(terms,)`` nats.

    Args:
        found: ``(terms, classes)`` logits.
        original: ``(terms, classes)`` logits.
    """
    log_found, log_original = (exact(logits).log_softmax(-1) for logits in (found, original))
    each = functional.kl_div(log_found, log_original, log_target=True, reduction="none")
    return each.sum(-1)


def field_of(output: Any, name: str) -> Tensor | None:
    """A tensor of a model's output by name, None where there is none."""
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if torch.is_tensor(value) else None


def values_of(output: Any) -> Tensor:
    """The output as one tensor ``(n, ...)``: embeddings by name, last hidden states, or the first.

    Raises:
        InputError: There is no floating tensor in it.
    """
    if torch.is_tensor(output):
        return output
    if isinstance(output, Mapping):
        named = [v for k, v in output.items() if k.endswith("_embeds") and torch.is_tensor(v)]
        if named:  # several towers, such as of images and texts: each counts alike
            return torch.cat([functional.normalize(exact(v), dim=-1) for v in named], dim=-1)
        hidden = field_of(output, "last_hidden_state")
        if hidden is not None:
            return hidden
    items = output.values() if isinstance(output, Mapping) else output
    if isinstance(items, tuple | list) or isinstance(output, Mapping):
        for item in items:
            if torch.is_tensor(item) and item.is_floating_point():
                return item
    raise InputError(
        f"the model returned {type(output).__name__}; expected a tensor or an object with one. "
        "In Python pass loss=, a function of the model and a batch."
    )


def one_term(losses: Tensor) -> Tensor:
    """One term for each example."""
    return torch.ones_like(losses, dtype=torch.int64)


def without_labels(batch: Batch) -> Any:
    """What of a batch the model is given."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in ("labels", "label")}
    if isinstance(batch, tuple | list) and len(batch) in (1, 2):
        return batch[0]
    return batch


def with_labels(task: str, batch: Batch, dimensions: int | None) -> tuple[Any, Tensor]:
    """Inputs and labels of a batch.

    Raises:
        InputError: There are no labels, or of another shape.
    """
    inputs = without_labels(batch)
    labels = labels_of(batch)
    if labels is None:
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


def labels_of(batch: Batch) -> Tensor | None:
    """The labels of a batch: of a mapping, or the second of a pair; None where there are none."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels", batch.get("label"))
    else:
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    return labels if torch.is_tensor(labels) else None


def output_of(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a mapping, token ids, or whatever else it takes."""
    if isinstance(inputs, Mapping):
        return _called(model, inputs, wrapped=True)
    if torch.is_tensor(inputs) and not inputs.is_floating_point():
        return _called(model, {"input_ids": inputs}, wrapped=False)
    return model(inputs)


def _called(model: nn.Module, inputs: Mapping[str, Tensor], wrapped: bool) -> object:
    if reads_last_token(model):
        return last_token_output(model, inputs, lambda given: call(model, given, wrapped))
    return call(model, inputs, wrapped)


def call(model: nn.Module, inputs: Mapping[str, Tensor], wrapped: bool) -> object:
    """Call a model with named inputs, or with the ids alone where it knows no names."""
    parameters = inspect.signature(model.forward).parameters
    if not wrapped and "input_ids" not in parameters:
        return model(inputs["input_ids"])
    extra = {"use_cache": False} if "use_cache" in parameters else {}
    return model(**inputs, **extra)


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output.

    Raises:
        InputError: There are none.
    """
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    if not torch.is_tensor(logits):
        raise InputError(
            f"the model returned {type(output).__name__}; expected a tensor of logits or an object "
            "with .logits. In Python pass loss=, a function of the model and a batch."
        )
    return logits


def check_classes(logits: Tensor) -> None:
    """Refuse logits of a single class, of which the cross-entropy is always 0.

    Raises:
        InputError: As said.
    """
    if logits.shape[-1] < 2:
        raise InputError(
            "the model gives one logit, and the cross-entropy of one class is always 0: it decides "
            "between yes and no, or gives a value. In Python pass loss=, a function of the model "
            "and a batch such as binary_cross_entropy_with_logits(..., reduction='none'), or name "
            "the task regression, for the squared error."
        )


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are no place among the classes.

    Raises:
        InputError: Names the first such label.
    """
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        bad = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise InputError(
            f"label {bad} is outside the model's {classes} logits (expected 0..{classes - 1}). "
            "Give labels that are numbers of the model's classes."
        )
