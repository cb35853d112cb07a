"""The curvature of embedding matrices against sums over tokens written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional

from rankfold.data.parts import Part, as_part
from rankfold.maths.linalg import Damping, damped, marginal_product
from rankfold.maths.spectrum import whitened_spectrum
from rankfold.search.layer_curves import embedding_curve, embedding_spectrum
from rankfold.statistics.embeddings import (
    EmbeddingRecorder,
    EmbeddingStatistics,
    UseStatistics,
    expected_squares,
    word_shares,
)
from rankfold.statistics.recorder import collect_statistics
from rankfold.tasks.supervised import CausalLM
from tests.cases import SEEDS, gram, normal
from tests.forms.test_embedding_modules import Tied, matrix_of
from tests.small_models import flags, same_state, state

close = torch.testing.assert_close
WORDS, DIM = 11, 5


def windows(count: int = 6, words: int = 8) -> Part:
    """Windows of tokens, the last words of the vocabulary never among them."""
    generator = torch.Generator().manual_seed(3)
    return as_part(
        "calibration",
        list(
            torch.cat(
                [
                    torch.randint(words, (count, 7), generator=generator),
                    torch.arange(8, 1, -1)[None],
                ]
            )
        ),
    )


def statistics(model: nn.Module, part: Part, curvature: str) -> EmbeddingStatistics:
    recorder = EmbeddingRecorder({"embed": matrix_of(model)})
    found = collect_statistics(
        model, CausalLM(), part, {}, curvature=curvature, embeddings=recorder, seed=1
    )
    assert found == {}
    return recorder.statistics()["embed"]


@pytest.mark.parametrize("curvature", ["empirical", "sampled"])
def test_statistics_are_those_of_the_sums_over_tokens(curvature: str) -> None:
    model, part = Tied(WORDS, DIM).eval(), windows()
    before, flags_before = state(model), flags(model)
    found = statistics(model, part, curvature)
    assert same_state(model, before) and flags(model) == flags_before

    # One sum of (words x words) Kronecker (dim x dim), token by token, at labels or without any.
    head = torch.zeros(WORDS, DIM, DIM, dtype=torch.float64)
    first, chances = torch.zeros(WORDS, DIM).double(), torch.zeros(WORDS).double()
    terms = 0
    for window in part.examples:
        hidden = torch.tanh(model.embed.weight[window]).detach()
        p = model.head(hidden).softmax(-1).detach()
        for h, q in zip(hidden[:-1], (p * (1 - p))[:-1], strict=True):
            head += torch.einsum("w,a,b->wab", q, h, h)
            first += torch.outer(q, h)
            chances += q
            terms += 1
    use = found.uses["head"]
    shares, total = chances / chances.sum(), chances.sum() / terms
    close(use.words, shares, atol=1e-9, rtol=1e-6)
    means = first / chances[:, None]
    close(use.means, total.sqrt() * means, atol=1e-9, rtol=1e-6)
    scatters = head / chances[:, None, None] - torch.einsum("wa,wb->wab", means, means)
    within = torch.einsum("w,wab->ab", shares, scatters)
    close(use.gram, total * within, atol=1e-9, rtol=1e-6)

    lookup = found.uses["embed"]
    assert lookup.means is None and float(lookup.words.sum()) == pytest.approx(1)
    assert bool((lookup.words[8:] > 0).all())  # never seen, and not thrown away
    if curvature == "empirical":
        table = torch.zeros(WORDS, DIM, DIM, dtype=torch.float64)
        counts = torch.zeros(WORDS, dtype=torch.int64)
        for window in part.examples:
            rows = model.embed(window).detach().requires_grad_()
            logits = model.head(torch.tanh(rows))[:-1]
            loss = functional.cross_entropy(logits, window[1:], reduction="sum")
            (slopes,) = torch.autograd.grad(loss, rows)
            for word, g in zip(window, slopes, strict=True):
                table[word] += torch.outer(g, g)
                counts[word] += 1
        energies = table.diagonal(dim1=1, dim2=2).sum(1)
        close(lookup.words, word_shares(energies, counts), atol=1e-6, rtol=1e-5)
        close(lookup.gram, table.sum(0) / terms, atol=1e-6, rtol=1e-5)


def test_any_other_loss_of_the_outputs_gives_the_squares_of_its_gradients() -> None:
    scores = normal(1, 4, 6)
    labels = torch.tensor([0, 3, 3, 5])
    p = scores.softmax(-1)
    slopes = p - functional.one_hot(labels, 6)
    slopes[2] = 0  # no term of the loss
    expected = p * (1 - p)
    expected[2] = 0
    close(expected_squares(scores, slopes), expected)
    for other in (slopes * 0.5, slopes + 0.1, normal(2, 4, 6)):
        close(expected_squares(scores, other), other.square())
    # Averaged over labels drawn from p, the squares are p (1 - p).
    each = torch.stack([(p[0] - functional.one_hot(torch.tensor(k), 6)).square() for k in range(6)])
    close((p[0][:, None] * each).sum(0), p[0] * (1 - p[0]))


def test_words_not_seen_share_what_words_seen_once_have() -> None:
    counts = torch.tensor([4, 1, 0, 1, 0])
    energies = torch.tensor([6.0, 1.0, 0.0, 3.0, 0.0], dtype=torch.float64)
    close(
        word_shares(energies, counts),
        torch.tensor([0.36, 0.06, 0.2, 0.18, 0.2], dtype=torch.float64),
    )
    close(word_shares(energies[:2], counts[:2]), energies[:2] / 7)
    most = word_shares(energies[[1, 2, 3]], counts[[1, 2, 3]])  # all seen once: half, not all
    close(most, torch.tensor([0.125, 0.5, 0.375], dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_diagonal_grams_do_what_the_dense_ones_do(seed: int) -> None:
    weight, words, m = normal(seed, 9, 4), normal(seed + 1, 9).square(), gram(seed + 2, 4)
    dense = torch.diag(words)
    close(damped(words, 0.3), damped(dense, 0.3).diagonal())
    for tall in (True, False):
        pairs = ((m, words), (m, dense)) if tall else ((words, m), (dense, m))
        w = weight if tall else weight.T
        first, second = (whitened_spectrum(w, *pair) for pair in pairs)
        close(first.singular_values, second.singular_values, atol=1e-6, rtol=1e-6)
        close(first.truncated(2), second.truncated(2), atol=1e-6, rtol=1e-6)
        close(first.changes_under(*pairs[0]), first.changes_under(*pairs[1]))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_the_marginal_product_has_the_partial_traces_of_the_sum(seed: int) -> None:
    terms = [(normal(seed + i, 3).square(), gram(seed + 7 + i, 2)) for i in range(3)]
    total = sum(torch.kron(torch.diag(d), m) for d, m in terms).view(3, 2, 3, 2)
    product = torch.kron(*(torch.diag(x) if x.dim() == 1 else x for x in marginal_product(terms)))
    for axes in ("abac->bc", "abcb->ac"):
        close(torch.einsum(axes, product.view(3, 2, 3, 2)), torch.einsum(axes, total))
    one = marginal_product(terms[:1])
    close(torch.kron(torch.diag(one[0]), one[1]), torch.kron(torch.diag(terms[0][0]), terms[0][1]))


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_a_rank_costs_the_sum_of_what_it_costs_each_use(seed: int) -> None:
    weight = normal(seed, 9, 4)
    uses = {
        str(i): UseStatistics(
            normal(seed + i, 9).square(),
            gram(seed + 5 + i, 4),
            normal(seed + 9 + i, 9, 4) if i else None,
        )
        for i in range(3)
    }
    found = EmbeddingStatistics(uses)
    spectrum = embedding_spectrum(weight, found, Damping(0.2, 0.1))
    curve = embedding_curve(spectrum, found, torch.arange(1, 5), 100)
    for rank in range(1, 5):
        delta = (spectrum.truncated(rank) - weight).flatten()
        hessian = sum(torch.kron(torch.diag(u.words), u.gram) for u in uses.values())
        for use in list(uses.values())[1:]:
            blocks = use.words[:, None, None] * torch.einsum("wa,wb->wab", use.means, use.means)
            hessian = hessian + torch.block_diag(*blocks)
        close(curve.changes[rank - 1], 0.5 * delta @ hessian @ delta, atol=1e-8, rtol=1e-6)


def test_a_matrix_that_no_gradient_reaches_has_no_uses() -> None:
    class Apart(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).detach() + self.bias

    model = Apart(WORDS, DIM).eval()
    assert statistics(model, windows(), "empirical").uses == {}
