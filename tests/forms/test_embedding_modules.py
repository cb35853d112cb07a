"""Low-rank lookups and heads: exact, and one matrix whoever uses it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from rankfold.forms.embedding.fit import low_rank_uses
from rankfold.forms.embedding.modules import LowRankEmbedding, LowRankHead, embedding_flops
from rankfold.forms.storage import STORAGES, Storage, factor_parameters
from rankfold.maths.spectrum import whitened_spectrum
from rankfold.model.find_layers import EmbeddingMatrix
from rankfold.model.replace import with_replaced
from tests.cases import SEEDS, normal

close = torch.testing.assert_close
each_form = pytest.mark.parametrize("form", STORAGES)


class Tied(nn.Module):
    """A lookup and a head with a bias that share their matrix; the bias stands twice, too."""

    def __init__(self, words: int = 11, dim: int = 5, seed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, dim, padding_idx=2, dtype=torch.float64)
        self.head = nn.Linear(dim, words, dtype=torch.float64)
        self.bias = self.head.bias
        with torch.no_grad():
            self.embed.weight.copy_(normal(seed, words, dim))
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def matrix_of(model: Tied) -> EmbeddingMatrix:
    return EmbeddingMatrix({"embed": model.embed}, {"head": model.head})


@each_form
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, words=st.integers(2, 12), dim=st.integers(2, 8), data=st.data())
def test_both_uses_compute_what_the_truncated_matrix_does(
    form: Storage, seed: int, words: int, dim: int, data: st.DataObject
) -> None:
    model = Tied(max(words, 3), dim, seed)
    matrix = matrix_of(model)
    spectrum = whitened_spectrum(model.embed.weight)
    rank = data.draw(st.integers(1, min(model.embed.weight.shape)))
    made = low_rank_uses(matrix, spectrum, rank, form)
    u, sigma, v = torch.linalg.svd(model.embed.weight.detach())
    best = (u[:, :rank] * sigma[:rank]) @ v[:rank]
    ids, hidden = torch.tensor([[0, 1], [2, 0]]), normal(seed, 2, 3, dim)
    expected = (functional.embedding(ids, best), functional.linear(hidden, best, model.head.bias))
    for module in (made, {n: m.to_dense() for n, m in made.items()},
                   {n: m.to_stock() for n, m in made.items()}):  # fmt: skip
        close(module["embed"](ids), expected[0], atol=1e-9, rtol=1e-9)
        close(module["head"](hidden), expected[1], atol=1e-9, rtol=1e-9)
    shape = tuple(model.embed.weight.shape)
    stored = {
        id(p): p.numel() for m in made.values() for n, p in m.named_parameters() if n != "bias"
    }
    assert sum(stored.values()) == factor_parameters(*shape, rank, form)
    assert made["embed"].rank == made["head"].rank == rank and made["head"].form == form


@each_form
def test_a_copy_with_the_stand_ins_shares_what_was_shared(form: Storage) -> None:
    model = Tied()
    spectrum = whitened_spectrum(model.embed.weight)
    made = low_rank_uses(matrix_of(model), spectrum, 3, form)
    twin = with_replaced(model, made)
    assert twin.embed.weight is twin.head.weight and twin.embed.mix is twin.head.mix
    assert twin.head.bias is twin.bias and twin.bias is not model.bias
    assert isinstance(twin.embed, LowRankEmbedding) and isinstance(twin.head, LowRankHead)
    assert twin.embed.padding_idx == 2
    again = with_replaced(twin, {})
    assert again.embed.weight is again.head.weight and again.embed.mix is again.head.mix
    close(again(torch.tensor([[1, 4]])), twin(torch.tensor([[1, 4]])))
    # A gradient reaches both factors from both uses.
    twin(torch.tensor([[1, 4]])).sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in (twin.embed.weight, twin.embed.mix))


def test_flops_count_what_each_use_multiplies() -> None:
    assert embedding_flops((100, 8), None, "pair", 7, 3) == 2 * 3 * 100 * 8
    assert embedding_flops((100, 8), 2, "pair", 7, 3) == 2 * (7 * 16 + 3 * (16 + 200))
    assert embedding_flops((100, 8), 2, "pivoted", 7, 3) == 2 * (7 * 12 + 3 * (12 + 200))
