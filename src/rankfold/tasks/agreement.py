"""Agreement with the original model: losses that need no labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.data.example import content_digest
from rankfold.data.parts import Batch
from rankfold.errors import InputError
from rankfold.model.evaluation_mode import evaluation_mode
from rankfold.tasks.losses import (
    BatchLoss,
    divergence,
    exact,
    field_of,
    labels_of,
    logits_of,
    loss_of_terms,
    one_term,
    output_of,
    values_of,
    without_labels,
)
from rankfold.tasks.pooling import MEAN, Pooling

# Most bytes of the original's outputs that are kept: each plan is compared with the same ones.
KEPT_BYTES = 2**26


class Teacher:
    """Agreement with the original model: how far the outputs are from its own. No labels.

    Where the model gives logits of classes, the Kullback-Leibler divergence of its predictions from
    the original's, in nats per term; else the squared distance of the outputs as a share of the
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
        self._kept: dict[str, Tensor] = {}
        labels = labels_of(batch)
        classes = labels is not None and labels.dim() == 1 and not labels.is_floating_point()
        output = self._original(without_labels(batch), output_of)
        logits = field_of(output, "logits")
        if logits is None and classes and torch.is_tensor(output):
            logits = output
        self.logits = logits is not None and _are_classes(originals[0], logits)
        self.unit = (
            "nats of divergence from the original"
            if self.logits
            else "squared distance from the original, as a share"
        )

    def _original(self, inputs: Any, output: Callable[[nn.Module, Any], Any]) -> Any:
        with evaluation_mode(self.originals[0]):
            return output(self.originals[0], inputs)

    def _wanted(self, inputs: Any, output: Callable[[nn.Module, Any], Tensor]) -> Tensor:
        """The original's output, computed once for the same batch."""
        try:
            key = content_digest(inputs)
        except InputError:  # what only the model understands
            return cast("Tensor", self._original(inputs, output))
        found = self._kept.get(key)
        if found is None:
            found = cast("Tensor", self._original(inputs, output))
            if sum(kept.nbytes for kept in [*self._kept.values(), found]) <= KEPT_BYTES:
                self._kept[key] = found
        return found

    def _both(
        self, model: nn.Module, inputs: Any, output: Callable[[nn.Module, Any], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Outputs of a model and of the original, which is not called where the model is it."""
        same = any(model is original for original in self.originals)
        wanted = None if same else self._wanted(inputs, output)
        found = output(model, inputs)
        return found, found.detach() if wanted is None else wanted

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is what the model takes; labels beside it are not looked at."""
        inputs = without_labels(batch)
        mask = field_of(inputs, "attention_mask")
        if self.logits:
            found, wanted = self._both(model, inputs, lambda m, x: logits_of(output_of(m, x)))
            return _divergence(found, wanted, mask)
        found, wanted = self._both(model, inputs, lambda m, x: exact(_values(output_of(m, x))))
        return _relative_distance(found, wanted, mask)


class Embedding(Teacher):
    """Agreement of sentence embeddings with the original's: squared distance of unit vectors.

    The embedding is what the model calls ``sentence_embedding``; else the last hidden states as
    its folder says that they are pooled, or their mean over the tokens, as most sentence encoders
    are trained; else the output itself.

    Args:
        originals: As of ``Teacher``.
        batch: Likewise.
        pooling: Of the model's folder, None where it says none.

    Attributes:
        pooling: Of the hidden states, None where the model gives no such states.
    """

    name = "embedding"

    def __init__(
        self, originals: Sequence[nn.Module], batch: Batch, pooling: Pooling | None = None
    ) -> None:
        """As said."""
        super().__init__(originals, batch)
        output = self._original(without_labels(batch), output_of)
        self.pooling = None if hidden_states(output) is None else pooling or MEAN
        self.unit = "squared distance of unit embeddings from the original"

    def batch_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """``batch`` is what the model takes; labels beside it are not looked at."""
        pooling = self.pooling or MEAN
        found, wanted = self._both(
            model, without_labels(batch), lambda m, x: unit_embeddings(m, x, pooling)
        )
        losses = (found - wanted).square().sum(1)
        return BatchLoss(losses, one_term(losses), squared=found)


def hidden_states(output: Any) -> Tensor | None:
    """``(n, length, features)`` that are to be pooled; None where an output is an embedding."""
    hidden = field_of(output, "last_hidden_state")
    pooled = field_of(output, "sentence_embedding") is not None
    return None if pooled or hidden is None or hidden.dim() != 3 else hidden


def unit_embeddings(model: nn.Module, inputs: Any, pooling: Pooling = MEAN) -> Tensor:
    """Embeddings of a model, ``(n, features)`` of length 1; see ``Embedding``."""
    output = output_of(model, inputs)
    found, hidden = field_of(output, "sentence_embedding"), hidden_states(output)
    if hidden is not None:
        mask = field_of(inputs, "attention_mask")
        if mask is None or mask.shape != hidden.shape[:2]:  # images have no mask of their patches
            mask = hidden.new_ones(hidden.shape[:2])
        found = pooling(hidden, mask)
    found = values_of(output) if found is None else found
    return functional.normalize(exact(found).flatten(1), dim=-1)


def _are_classes(model: nn.Module, logits: Tensor) -> bool:
    """Whether logits share one probability: not of one class, of values, or of labels each apart.

    A softmax of these hides how they differ: of one logit it is always 1.
    """
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    apart = kind in ("regression", "multi_label_classification")
    return logits.shape[-1] > 1 and not apart


def _values(output: Any) -> Tensor:
    """The logits as values, where there are some, else as ``values_of``."""
    logits = field_of(output, "logits")
    return values_of(output) if logits is None else logits


def _divergence(found: Tensor, original: Tensor, mask: Tensor | None) -> BatchLoss:
    """``KL(original || found)`` of each term; tokens that ``mask`` hides are none."""
    kept = torch.ones(found.shape[:-1], dtype=torch.bool, device=found.device)
    if mask is not None and mask.shape == kept.shape:
        kept = mask != 0
    found, original = found[kept], original[kept]
    each = divergence(found, original)
    hits = (found.argmax(-1) == original.argmax(-1)).to(each.dtype)
    return loss_of_terms(each, found, hits, kept)


def _relative_distance(found: Tensor, original: Tensor, mask: Tensor | None) -> BatchLoss:
    if mask is not None and mask.shape == found.shape[:2] and found.dim() == 3:
        found, original = (t * mask[..., None].to(t.dtype) for t in (found, original))
    found, original = found.flatten(1), original.flatten(1)
    norms = original.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    squared = found / norms
    losses = (squared - original / norms).square().sum(1)
    return BatchLoss(losses, one_term(losses), squared=squared)
