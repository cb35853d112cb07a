"""The curvature of the loss in an embedding matrix E ``(words, dim)``, from hooks on its uses.

Each use gives a sum over rows (tokens) of a Kronecker product ``D_t x M_t``, D_t diagonal over the
words:

- a lookup of word w with the gradient g at its output: ``D_t = e_w e_w^T``, ``M_t = g g^T``;
- a head, ``y = E h``: ``D_t`` the expected squares of the gradient at y, ``M_t = h h^T``. For a
  cross-entropy of y itself the expectation over labels drawn from the predictions p is
  ``p (1 - p)``, known without drawing: a word that no label names has its curvature, too. For any
  other loss it is the square of the gradient that came.

A sum of products is replaced by the one product that has its partial traces: the share of each word
in the curvature, and the Gram over the dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rankfold.layer_matrix import BLOCK_VALUES
from rankfold.layers import EmbeddingMatrix
from rankfold.linalg import Damping, damped

# Of the curvature in a lookup, at most this share is taken for that of words that were not seen.
MOST_UNSEEN = 0.5
# How far a row of gradients may be from ``p - e_label`` to be that of a cross-entropy.
ONE_HOT = 1e-3


@dataclass(frozen=True)
class UseStatistics:
    """One use of an embedding matrix; ``1/2 tr(D E M E^T)`` is its model of the mean loss.

    Attributes:
        words: ``(words,)`` float64, the diagonal of D; its sum is 1.
        gram: M, ``(dim, dim)`` float64.
        looks_up: Whether the use is a lookup; otherwise a head.
    """

    words: Tensor
    gram: Tensor
    looks_up: bool

    def damped(self, damping: Damping) -> tuple[Tensor, Tensor]:
        """D and M, damped as the Grams of inputs and of gradients that they are."""
        if self.looks_up:
            return damped(self.words, damping.input), damped(self.gram, damping.output)
        return damped(self.words, damping.output), damped(self.gram, damping.input)


@dataclass(frozen=True)
class EmbeddingStatistics:
    """Statistics of all uses of an embedding matrix that the data reached.

    Attributes:
        uses: By name of the module; empty where none was reached.
    """

    uses: dict[str, UseStatistics]


def word_shares(energies: Tensor, counts: Tensor) -> Tensor:
    """Each word's share of the curvature in a lookup, words that were not seen included.

    What a new text has of words not seen before is what the text seen has of words seen once
    (Good 1953, Turing's estimate), here of their energy: that share is spread over all words that
    were not seen.

    Args:
        energies: ``(words,)`` float64 sums of squared gradient norms.
        counts: ``(words,)`` how often each word was looked up.

    Returns:
        ``(words,)`` float64, of sum 1.
    """
    shares = energies / energies.sum()
    unseen = counts == 0
    if not bool(unseen.any()):
        return shares
    once = shares[counts == 1].sum().clamp(max=MOST_UNSEEN)
    return torch.where(unseen, once / unseen.sum(), shares * (1 - once))


@dataclass
class _Sums:
    """Running sums of one use."""

    energies: Tensor
    counts: Tensor
    gram: Tensor
    looks_up: bool


class EmbeddingRecorder:
    """Owns the hooks on the uses of embedding matrices, and the sums that they feed.

    Attributes:
        listening: Whether gradients that arrive now belong to the curvature.
        terms: Of the loss, in all passes together; for the means.
    """

    def __init__(self, embeddings: Mapping[str, EmbeddingMatrix]) -> None:
        self.embeddings = embeddings
        self.listening = False
        self.terms = 1.0
        self._sums: dict[str, _Sums] = {}

    @property
    def weights(self) -> list[Tensor]:
        """The matrices; gradients must flow to them for the hooks to see any."""
        return [matrix.weight for matrix in self.embeddings.values()]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on, and off again whatever happens."""
        with ExitStack() as stack:
            for matrix in self.embeddings.values():
                for name, module in matrix.uses.items():
                    hook = partial(self._saw_call, name, matrix)
                    stack.callback(module.register_forward_hook(hook).remove)
            yield

    def statistics(self) -> dict[str, EmbeddingStatistics]:
        """Sums to means."""
        return {
            name: EmbeddingStatistics(
                {
                    use: UseStatistics(
                        word_shares(sums.energies, sums.counts)
                        if sums.looks_up
                        else sums.energies / sums.energies.sum(),
                        sums.gram / self.terms,
                        sums.looks_up,
                    )
                    for use in matrix.uses
                    if (sums := self._sums.get(use)) is not None and float(sums.energies.sum()) > 0
                }
            )
            for name, matrix in self.embeddings.items()
        }

    def _saw_call(
        self,
        name: str,
        matrix: EmbeddingMatrix,
        module: nn.Module,
        args: tuple[Tensor, ...],
        output: Tensor,
    ) -> None:
        if not output.requires_grad:
            return
        if name not in self._sums:
            (words, dim), device = matrix.weight.shape, output.device
            self._sums[name] = _Sums(
                torch.zeros(words, dtype=torch.float64, device=device),
                torch.zeros(words, dtype=torch.int64, device=device),
                torch.zeros(dim, dim, dtype=torch.float64, device=device),
                looks_up=name in matrix.lookups,
            )
        inputs = args[0].detach()
        if name in matrix.lookups:
            output.register_hook(partial(self._saw_lookup, name, inputs))
        else:
            output.register_hook(partial(self._saw_scores, name, inputs, output.detach()))

    def _saw_lookup(self, name: str, words: Tensor, gradient: Tensor) -> None:
        if not self.listening:
            return
        sums, rows = self._sums[name], _rows(gradient)
        found = words.flatten()
        sums.energies.index_add_(0, found, rows.square().sum(1).double())
        sums.counts += torch.bincount(found, minlength=len(sums.counts))
        sums.gram += rows.T @ rows

    def _saw_scores(self, name: str, inputs: Tensor, outputs: Tensor, gradient: Tensor) -> None:
        if not self.listening:
            return
        sums = self._sums[name]
        block = max(1, BLOCK_VALUES // outputs.shape[-1])
        values = (_rows(tensor).split(block) for tensor in (inputs, outputs, gradient))
        for hidden, scores, slopes in zip(*values, strict=True):
            squares = expected_squares(scores, slopes)
            sums.energies += (hidden.square().sum(1) @ squares).double()
            sums.gram += (hidden * squares.sum(1, keepdim=True)).T @ hidden


def expected_squares(scores: Tensor, slopes: Tensor) -> Tensor:
    """Expected squares of the gradient at a head's outputs.

    Args:
        scores: ``(rows, words)`` outputs.
        slopes: ``(rows, words)`` gradient at them; 0 in a row that no term of the loss depends on.

    Returns:
        ``(rows, words)``: ``p (1 - p)`` where every row of gradients is that of a cross-entropy at
        these outputs, the squares of the gradient where not.
    """
    p = scores.softmax(-1)
    labels = p - slopes  # a row with a 1 at its label, where this is a cross-entropy
    used = slopes.abs().amax(1) > 0
    one_hot = (labels.square().sum(1) - 1).abs() + (labels.amax(1) - 1).abs() < ONE_HOT
    if bool((one_hot | ~used).all()):
        return p * (1 - p) * used[:, None]
    return slopes.square()


def _rows(values: Tensor) -> Tensor:
    """``(rows, last dimension)``, float32 or float64."""
    values = values if values.dtype == torch.float64 else values.float()
    return values.reshape(-1, values.shape[-1])
