"""Losses that are made of labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.data.example import describe
from rankfold.data.parts import Batch
from rankfold.errors import InputError
from rankfold.tasks.losses import (
    IGNORED,
    BatchLoss,
    TaskName,
    call,
    check_classes,
    check_labels,
    exact,
    logits_of,
    one_term,
    output_of,
    token_losses,
    whole_labels,
    with_labels,
)

LOSS = "loss function"
LossFunction: TypeAlias = Callable[[nn.Module, Batch], Tensor]


class CausalLM:
    """Next-token prediction: cross-entropy of each token given those before it."""

    name = "causal-lm"
    unit = "nats per token"
    agreement = False

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is ``(n, length)`` token ids, or a mapping with ``input_ids``."""
        inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        labels = whole_labels(tokens_of(batch, inputs.pop("labels", inputs.get("input_ids"))))
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape != labels.shape and "labels" not in batch:
            raise InputError(
                f"the attention_mask is {describe(mask)} for input_ids {describe(labels)}: it "
                "doesn't say which tokens count. Give labels, -100 where a token doesn't."
            )
        logits = logits_of(call(model, inputs, wrapped=isinstance(batch, Mapping)))
        return token_losses(logits[:, :-1], next_labels(labels, mask))


def next_labels(labels: Tensor, mask: Tensor | None) -> Tensor:
    """What each position but the last is to predict, ``(n, length - 1)``.

    Padding predicts nothing and isn't predicted: behind padding on the left a text's first token
    is as little predicted as without.

    Args:
        labels: ``(n, length)``; -100 where there is none.
        mask: The model's attention mask; one of another shape says nothing of tokens.
    """
    if mask is None or mask.shape != labels.shape:
        return labels[:, 1:]
    hidden = mask == 0
    return labels[:, 1:].masked_fill(hidden[:, 1:] | hidden[:, :-1], IGNORED)


def tokens_of(batch: Batch, found: object, task: str = "causal-lm") -> Tensor:
    """What a batch gives to be predicted or read, a token after the other.

    Raises:
        InputError: It gives no tokens.
    """
    given = isinstance(batch, Mapping) and "labels" in batch
    if torch.is_tensor(found) and (given or not found.is_floating_point()):
        return found
    raise InputError(
        f"the task {task} needs token ids, and the data give {describe(batch)}; expected whole "
        "numbers (examples, tokens), or mappings with input_ids. Check the data, or name another "
        "task."
    )


class TokenLabels:
    """A label for each token, or for some (-100 marks the others): cross-entropy in its place."""

    unit = "nats per token"
    agreement = False

    def __init__(self, name: TaskName) -> None:
        """``masked-lm``, where the labels are the hidden tokens, or ``token-classification``."""
        self.name: str = name

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is a mapping with ``labels`` ``(n, length)``, or ``(ids, labels)``."""
        inputs, labels = with_labels(self.name, batch, dimensions=2)
        return token_losses(logits_of(output_of(model, inputs)), labels)


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
        labels = whole_labels(labels)
        if torch.is_tensor(inputs):
            inputs = {"input_ids": tokens_of(batch, inputs, self.name)}
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
        labels = whole_labels(labels)
        if logits.dim() != 2 or len(logits) != len(labels):
            raise InputError(
                f"the model gave {describe(logits)} for {len(labels)} labels; expected logits "
                "(examples, classes). For one value an example use task regression."
            )
        check_classes(logits)
        check_labels(labels, logits.shape[-1])
        losses = functional.cross_entropy(exact(logits), labels, reduction="none")
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
        wanted = _values(labels)
        values = exact(logits_of(output_of(model, inputs))).to(wanted.dtype)
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


def _values(labels: Tensor) -> Tensor:
    """The labels of a regression in float32, or in float64 where float32 would round one."""
    values = labels.float()
    same = values.to(labels.dtype) == labels
    return values if bool((same | labels.isnan()).all()) else labels.double()


class UserLoss:
    """A user's callable ``loss(model, batch)`` that gives one loss per example."""

    name = "custom"
    unit = "units of the given loss"
    agreement = False

    def __init__(self, function: LossFunction, what: str = LOSS) -> None:
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
        if self.what == LOSS and not losses.is_floating_point():
            raise InputError(
                f"the {self.what} returned {describe(losses)}; expected floating values, which "
                "have a gradient."
            )
        return BatchLoss(losses, torch.ones_like(losses, dtype=torch.int64))
