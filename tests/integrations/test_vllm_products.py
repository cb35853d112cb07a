"""The products of fused factorized layers are those of the dense matrices, cut in any way."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.forms.blocks.modules import ColumnBlocksLinear, RowBlocksLinear
from rankfold.forms.embedding.modules import LowRankHead
from rankfold.forms.low_rank.modules import LowRankLinear
from rankfold.integrations.vllm.products import FORMS, ByRows, Part, Products, scores, shapes


class Plain(nn.Module):
    """A product as PyTorch computes it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self.weight)


INPUTS = 13
MODULES = {
    "pair": LowRankLinear,
    "pivoted": LowRankLinear,
    "row-blocks": RowBlocksLinear,
    "column-blocks": ColumnBlocksLinear,
}
# A form, its ranks, and its outputs.
PARTS = {
    "dense": ("dense", (), 6),
    "pair": ("pair", (4,), 9),
    "pivoted": ("pivoted", (5,), 11),
    "pivoted of full rank": ("pivoted", (8,), 8),
    "row-blocks": ("row-blocks", (3, 2), 10),
    "row-blocks, one of full rank": ("row-blocks", (5, 2), 9),
    "column-blocks": ("column-blocks", (2, 4), 7),
    "column-blocks, one of full rank": ("column-blocks", (7, 3), 8),
}


def made(name: str, seed: int = 0) -> tuple[Part, Tensor]:
    """A part with random tensors, and its dense matrix by the module of its form."""
    form, ranks, out = PARTS[name]
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for tensor, shape in shapes(form, ranks, out, INPUTS).items():
        if tensor == "order":
            tensors[tensor] = torch.randperm(*shape, generator=generator).to(torch.int32)
        else:
            tensors[tensor] = torch.randn(*shape, generator=generator, dtype=torch.float64)
    names, part = FORMS[form]
    assert set(names) == set(tensors)
    if form == "dense":
        return part(**tensors), tensors["weight"]
    module = MODULES[form](**{**tensors, "bias": None})
    return part(**tensors), module.dense_matrix()


def computed(parts: list[Part], rows: Tensor, bias: Tensor | None = None) -> Tensor:
    return Products(parts, Plain)(rows, bias)


ALONE_AND_TOGETHER = [*((n,) for n in PARTS), *itertools.permutations(PARTS, 2), tuple(PARTS)]


@pytest.mark.parametrize("names", ALONE_AND_TOGETHER)
def test_fused_parts_are_the_dense_product(names: tuple[str, ...]) -> None:
    made_parts = [made(name, seed) for seed, name in enumerate(names)]
    weight = torch.cat([matrix for _, matrix in made_parts])
    rows = torch.randn(2, 3, INPUTS, dtype=torch.float64)
    bias = torch.randn(len(weight), dtype=torch.float64)
    for given in (None, bias):
        found = computed([part for part, _ in made_parts], rows, given)
        torch.testing.assert_close(found, functional.linear(rows, weight, given))


@pytest.mark.parametrize("name", PARTS)
def test_outputs_of_processes_joined(name: str) -> None:
    part, weight = made(name)
    rows = torch.randn(4, INPUTS, dtype=torch.float64)
    for kept in (torch.arange(len(weight)).chunk(3), [torch.tensor([0]), torch.tensor([5, 1, 5])]):
        for here in kept:
            found = computed([part.of(here, None)], rows)
            torch.testing.assert_close(found, rows @ weight[here].T)


@pytest.mark.parametrize("name", PARTS)
def test_inputs_of_processes_summed(name: str) -> None:
    part, weight = made(name)
    rows = torch.randn(4, INPUTS, dtype=torch.float64)
    cuts = [slice(0, 4), slice(4, 9), slice(9, INPUTS)]
    found = [computed([part.of(None, cut)], rows[:, cut]) for cut in cuts]
    torch.testing.assert_close(sum(found), rows @ weight.T)
    for cut, one in zip(cuts, found, strict=True):
        torch.testing.assert_close(one, rows[:, cut] @ weight[:, cut].T)


def test_a_process_holds_no_more_than_it_needs() -> None:
    part, _ = made("row-blocks")
    first_block = torch.argsort(part.order)[[0, 1, 5]]
    cut = part.of(first_block, None)
    assert isinstance(cut, ByRows)
    assert len(cut.first) == 3 and [m.shape for _, m in cut.seconds] == [(1, 3)]


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
def test_heads_of_factorized_embeddings(storage: str) -> None:
    words, dim, rank = 17, 12, 5
    weight = torch.randn(words, rank, dtype=torch.float64)
    order = torch.randperm(dim) if storage == "pivoted" else None
    mix = torch.randn(dim if order is None else dim - rank, rank, dtype=torch.float64)
    head = LowRankHead(nn.Parameter(weight), nn.Parameter(mix), order)
    rows = torch.randn(3, dim, dtype=torch.float64)
    found = computed([scores(weight, mix, order)], rows)
    torch.testing.assert_close(found, head(rows))


def test_stacked_parts_take_one_product() -> None:
    parts = [made(name)[0] for name in ("pivoted", "dense", "pair")]
    products = Products(parts, Plain)
    assert products.stacked is not None and len(products.seconds) == 2
    weights = [m.weight for m in products.modules() if isinstance(m, Plain)]
    assert sum(w.numel() for w in weights) == INPUTS * (5 + 6 + 4) + 6 * 5 + 9 * 4


def test_products_compile_without_a_break() -> None:
    products = Products([made(name)[0] for name in PARTS], Plain)
    rows = torch.randn(2, INPUTS, dtype=torch.float64)
    compiled = torch.compile(products, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(rows), products(rows))
