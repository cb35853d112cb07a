"""From the hidden states of a text to one embedding, as sentence-transformers computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from rankfold.tasks.losses import exact

# Of (n, length, features) and a mask (n, length) of the same type to (n, features).
PoolingMode: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Step: TypeAlias = Callable[[Tensor], Tensor]  # of (n, features)


def _weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    return (hidden * weights[..., None]).sum(1)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return _weighted(hidden, mask) / mask.sum(1, keepdim=True).clamp(min=1)


def _mean_by_root(hidden: Tensor, mask: Tensor) -> Tensor:
    return _weighted(hidden, mask) / mask.sum(1, keepdim=True).clamp(min=1).sqrt()


def _later_more(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean, each token weighted by its position, from 1 (Muennighoff 2022, SGPT)."""
    weights = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=mask.dtype)
    return _weighted(hidden, weights) / weights.sum(1, keepdim=True).clamp(min=1)


def _largest(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask[..., None] == 0, -1e9).amax(1)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[:, 0]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    """The last token that the mask leaves, on whichever side the padding is."""
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * (mask != 0)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


# In the order in which sentence-transformers joins several of them.
MODES: Mapping[str, PoolingMode] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _later_more,
    "lasttoken": _last,
}
ACTIVATIONS: Mapping[str, Step] = {
    "Identity": lambda values: values,
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": functional.gelu,
    "Sigmoid": torch.sigmoid,
    "SiLU": functional.silu,
}


@dataclass(frozen=True)
class Normalized:
    """The step that makes an embedding's length 1."""

    def __str__(self) -> str:
        return "normalize"

    def __call__(self, values: Tensor) -> Tensor:
        """``(n, features)`` to the same."""
        return functional.normalize(values, dim=-1)


@dataclass(frozen=True, eq=False)
class DenseStep:
    """A linear map of an embedding, and an activation.

    Attributes:
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
        activation: One of ``ACTIVATIONS``.
    """

    weight: Tensor
    bias: Tensor | None
    activation: str

    def __str__(self) -> str:
        out, in_ = self.weight.shape
        return f"dense {in_} to {out}, {self.activation}"

    def __call__(self, values: Tensor) -> Tensor:
        """``(n, in)`` to ``(n, out)``."""
        weight = self.weight.to(values)
        bias = None if self.bias is None else self.bias.to(values)
        return ACTIVATIONS[self.activation](functional.linear(values, weight, bias))


@dataclass(frozen=True)
class Pooling:
    """How hidden states become an embedding.

    Attributes:
        modes: Some of ``MODES``; what each gives is joined.
        steps: What is done to that, one after the other.
    """

    modes: Sequence[str] = ("mean",)
    steps: Sequence[Step] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The same in words, to be recorded."""
        return ("+".join(self.modes), *map(str, self.steps))

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embeddings, in float32 or float64.

        Args:
            hidden: ``(n, length, features)``.
            mask: ``(n, length)``, 0 where a token is padding.
        """
        hidden = exact(hidden)  # half precision can't count a few hundred tokens
        weights = mask.to(hidden.dtype)
        found = torch.cat([MODES[mode](hidden, weights) for mode in self.modes], dim=1)
        for step in self.steps:
            found = step(found)
        return found


MEAN = Pooling()  # as most sentence encoders are trained
