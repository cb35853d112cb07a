"""The curvature of the loss in an embedding matrix E ``(words, dim)``, from hooks on its uses.

Each use gives a Gram over the dimensions for each word, summed over rows (tokens):

- a lookup of word w with the gradient g at its output adds ``g g^T`` to that of w;
- a head, ``y = E h``, adds ``q_w h h^T`` to that of every word, q the expected squares of the
  gradient at y. For a cross-entropy of y itself the expectation over labels drawn from the
  predictions p is ``q = p (1 - p)``, known without drawing: a word that no label names has its
  curvature, too. For any other loss q is the square of the gradient that came.

As many Grams as words are too many. For a lookup they are replaced by the one product ``D x M`` of
their traces and their sum. For a head that would be far too optimistic: where a word is likely, h
points its way, and so at the error of its row. There M is the scatter of h around the mean of each
word, and these means are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.machine import processes
from rankfold.maths.linalg import Damping, damped
from rankfold.maths.spectrum import Spectrum
from rankfold.model.find_layers import EmbeddingMatrix
from rankfold.model.layer_matrix import BLOCK_VALUES, call_input, kept_dtype

# Of the curvature in a lookup, at most this share is taken for that of words that were not seen.
MOST_UNSEEN = 0.5
# A word that the data hardly showed may yet be met: when directions are chosen, each word gets at
# least this share of the mean curvature of all words beside its own.
LEAST_WORD_DAMPING = 1.0
# How far a row of gradients may be from ``p - e_label``, as bfloat16 rounds it, to be that of a
# cross-entropy.
ONE_HOT = 0.03


@dataclass(frozen=True)
class UseStatistics:
    """One use of an embedding matrix, and its model of the mean loss.

    For a perturbation with the rows Delta_w it is
    ``1/2 sum_w D_w (Delta_w M Delta_w^T + (Delta_w m_w)^2)``.

    Attributes:
        words: ``(words,)`` float64, D; its sum is 1.
        gram: M, ``(dim, dim)`` float64.
        means: m, ``(words, dim)``; None for a lookup.
    """

    words: Tensor
    gram: Tensor
    means: Tensor | None = None

    def damped(self, damping: Damping) -> tuple[Tensor, Tensor]:
        """D and M, damped as the Grams of inputs and of gradients that they are."""
        of_words, of_gram = damping if self.means is None else reversed(damping)
        return damped(self.words, max(of_words, LEAST_WORD_DAMPING)), damped(self.gram, of_gram)

    def changes(self, spectrum: Spectrum) -> Tensor:
        """Predicted loss change of every rank 0..r of the matrix's spectrum, ``(r + 1,)``."""
        changes = spectrum.changes_under(self.gram, self.words)
        if self.means is None:
            return changes
        return changes + spectrum.changes_along(self.means, self.words)


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
    """Running sums of one use: a lookup counts words, a head adds up what it sees for each."""

    energies: Tensor
    gram: Tensor
    counts: Tensor | None
    means: Tensor | None

    def statistics(self, terms: float) -> UseStatistics | None:
        """Sums to means over this many terms of the loss; None where nothing was seen."""
        total = self.energies.sum()
        if float(total) == 0:
            return None
        gram = self.gram / terms
        if self.counts is not None:
            return UseStatistics(word_shares(self.energies, self.counts), gram)
        assert self.means is not None
        words = self.energies / total
        # Scaled, so that D sums to 1 for a head as it does for a lookup.
        scales = (total / terms).sqrt() / self.energies.where(self.energies > 0, torch.inf)
        means = self.means * scales[:, None].to(self.means.dtype)
        return UseStatistics(words, gram - scatter(means, words), means)


def _nothing(use: str, matrix: EmbeddingMatrix, like: Tensor) -> _Sums:
    """Sums of a use before it has seen anything, for values like these."""
    (words, dim), zeros = matrix.weight.shape, partial(torch.zeros, device=like.device)
    looks_up = use in matrix.lookups
    return _Sums(
        energies=zeros(words, dtype=torch.float64),
        gram=zeros(dim, dim, dtype=torch.float64),
        counts=zeros(words, dtype=torch.int64) if looks_up else None,
        means=None if looks_up else zeros(words, dim, dtype=kept_dtype(like)),
    )


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
                    handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def statistics(self) -> dict[str, EmbeddingStatistics]:
        """Sums to means."""
        found = {use: sums.statistics(self.terms) for use, sums in self._sums.items()}
        return {
            name: EmbeddingStatistics(
                {use: seen for use in matrix.uses if (seen := found.get(use)) is not None}
            )
            for name, matrix in self.embeddings.items()
        }

    def add_up(self) -> None:
        """Give all processes of a run the sums of all."""
        reached = processes.gathered([*self._sums], "uses of embeddings")
        matrix_of = {use: matrix for matrix in self.embeddings.values() for use in matrix.uses}
        for use in dict.fromkeys(chain.from_iterable(reached)):
            matrix = matrix_of[use]
            if use not in self._sums:
                self._sums[use] = _nothing(use, matrix, matrix.weight)
            added = [value for value in vars(self._sums[use]).values() if value is not None]
            processes.add_up(added, f"sums of {use}")

    def tensors(self) -> dict[str, Tensor]:
        """The sums, by use and by what they are."""
        return {
            f"{use} {name}": value
            for use, sums in self._sums.items()
            for name, value in vars(sums).items()
            if value is not None
        }

    def fill(self, tensors: Mapping[str, Tensor], terms: float) -> None:
        """Take sums from elsewhere.

        Args:
            tensors: From ``tensors``.
            terms: Of the loss.

        Raises:
            KeyError: One is missing, or of another shape; says which.
        """
        self.terms = terms
        for matrix in self.embeddings.values():
            words, dim = matrix.weight.shape
            shapes = {"energies": (words,), "counts": (words,), "means": (words, dim)}
            for use in matrix.uses:
                of_use = "counts" if use in matrix.lookups else "means"
                if f"{use} energies" not in tensors:
                    continue  # the data never reached it
                for name in ("energies", "gram", of_use):
                    value = tensors.get(f"{use} {name}")
                    if value is None or value.shape != shapes.get(name, (dim, dim)):
                        raise KeyError(f"{use} {name}")
                found = {name: tensors.get(f"{use} {name}") for name in ("counts", "means")}
                energies, gram = tensors[f"{use} energies"], tensors[f"{use} gram"]
                self._sums[use] = _Sums(energies, gram, found["counts"], found["means"])

    def _saw_call(
        self,
        name: str,
        matrix: EmbeddingMatrix,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        if not output.requires_grad:
            return
        if name not in self._sums:
            self._sums[name] = _nothing(name, matrix, output)
        inputs = call_input(args, kwargs).detach()
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
        assert sums.counts is not None
        sums.counts += torch.bincount(found, minlength=len(sums.counts))
        sums.gram += rows.T @ rows

    def _saw_scores(self, name: str, inputs: Tensor, outputs: Tensor, gradient: Tensor) -> None:
        if not self.listening:
            return
        sums = self._sums[name]
        assert sums.means is not None
        block = max(1, BLOCK_VALUES // outputs.shape[-1])
        values = (_rows(tensor).split(block) for tensor in (inputs, outputs, gradient))
        for hidden, scores, slopes in zip(*values, strict=True):
            squares = expected_squares(scores, slopes)
            sums.energies += squares.sum(0).double()
            sums.means += squares.T @ hidden
            sums.gram += (hidden * squares.sum(1, keepdim=True)).T @ hidden


def scatter(rows: Tensor, weights: Tensor) -> Tensor:
    """``sum_i w_i r_i r_i^T`` of rows ``(n, dim)`` and weights ``(n,)``: ``(dim, dim)`` float64."""
    dim = rows.shape[1]
    total = torch.zeros(dim, dim, dtype=torch.float64, device=rows.device)
    block = max(1, BLOCK_VALUES // dim)
    for some, scales in zip(rows.split(block), weights.split(block), strict=True):
        double = some.double()
        total += (double.T * scales) @ double
    return total


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
    values = values.to(kept_dtype(values))
    return values.reshape(-1, values.shape[-1])
