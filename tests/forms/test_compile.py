"""torch.compile takes factorized models in one graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.model.unpack import unpack
from tests.every_form import IMAGE, EveryForm
from tests.export.test_export import Packed
from tests.small_models import seeded, tiny_llama, token_data


class Unpacked(nn.Module):
    """A grouped conv, a conv along one axis and attention, written as plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = unpack(Packed()).model

    def forward(self, values: Tensor) -> Tensor:
        return self.inner(values)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")  # of torch's own compiler, about itself
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_every_form_without_graph_breaks(backend: str) -> None:
    model = EveryForm().eval()
    images = torch.randn(2, *IMAGE)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(images), model(images))
    gradients = [
        torch.autograd.grad(run(images).sum(), list(model.parameters()))
        for run in (compiled, model)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore")
def test_unpacked_layers_without_graph_breaks() -> None:
    model, values = seeded(2, Unpacked).eval(), torch.randn(2, 8, 6)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(values), model(values))


@pytest.mark.filterwarnings("ignore")
def test_a_language_model_without_graph_breaks() -> None:
    model = rankfold.lossless(tiny_llama(), token_data(), size=0.7, objective="activation").model
    ids = torch.arange(20).view(2, 10)
    found = torch._dynamo.explain(lambda ids: model(ids, use_cache=False).logits)(ids)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
