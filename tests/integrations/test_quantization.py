"""torchao's int8 on the factors of a factorized model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from benchmarks.int8 import in_int8, quantize_rows, stored_bytes
from rankfold.forms.blocks.modules import ColumnBlocksLinear, RowBlocksLinear
from rankfold.forms.low_rank.modules import LowRankLinear
from tests.every_form import FEATURES, EveryForm
from tests.tiny_language_model import TEXT, tiny_llama

# Libraries that torchao looks for, and enums that torch takes otherwise since: nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")

ROOT = Path(__file__).parents[2]
LINEAR = r"re:.*_proj\.(left|right|shared|first|second|weight)"


@pytest.fixture(scope="module")
def parts() -> tuple[nn.Module, rankfold.Result, Tensor]:
    model, tokenizer = tiny_llama()
    tokens = torch.tensor(tokenizer(TEXT, verbose=False)["input_ids"])
    windows = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    data = rankfold.Data(list(windows[:60]), list(windows[60:80]), list(windows[80:140]))
    return model, rankfold.lossless(model, data, size=0.8), windows[200:260]


def int8(model: nn.Module) -> nn.Module:
    """By the lines of the documentation."""
    assert LINEAR in (ROOT / "docs" / "how-to" / "int8.md").read_text()
    twin = copy.deepcopy(model)
    config = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    quantization.quantize_(twin, quantization.FqnToConfig({LINEAR: config}), filter_fn=None)
    return twin


def loss(model: Any, windows: Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=windows, labels=windows).loss)


def test_factorized_and_int8_is_the_smallest_and_close(
    parts: tuple[nn.Module, rankfold.Result, Tensor],
) -> None:
    model, result, windows = parts
    both = int8(result.model)
    layers = [m for m in both.modules() if isinstance(m, LowRankLinear)]
    assert layers
    for layer in layers:
        for _, factor in layer.named_parameters():
            assert isinstance(factor, quantization.Int8Tensor)
    assert abs(loss(both, windows) - loss(result.model, windows)) < 0.01
    sizes = [stored_bytes(m) for m in (model, result.model, int8(model), both)]
    assert [stored_bytes(in_int8(m)) for m in (model, result.model)] == sizes[2:]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_bytes_count_what_is_stored() -> None:
    layer = nn.Sequential(nn.Linear(10, 4))
    assert stored_bytes(layer) == 4 * (40 + 4)
    layer.append(layer[0])  # shared: stored once
    assert stored_bytes(layer) == 4 * (40 + 4)
    config = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    quantization.quantize_(layer, config)
    # Values, scales, zero points, bias.
    assert stored_bytes(layer) == 40 + 4 * 4 + 4 + 4 * 4


def test_rows_of_a_conv_are_stored_in_int8() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3)
    images = torch.randn(2, 3, 6, 6)
    before = conv(images)
    holder = nn.Sequential(conv)
    quantize_rows(holder)
    assert stored_bytes(holder) == 8 * 27 + 4 * 8 + 4 * 8
    torch.testing.assert_close(holder(images), before, atol=0.02, rtol=0.02)


def test_blocks_are_stored_in_int8() -> None:
    model = EveryForm().eval()
    blocks = nn.Sequential(*model.linears[2:4])
    values = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(0))
    twin = in_int8(blocks)
    for layer, kind in zip(twin, (RowBlocksLinear, ColumnBlocksLinear), strict=True):
        assert isinstance(layer, kind)
        for factor in (layer.shared, layer.first, layer.second):
            assert isinstance(factor, quantization.Int8Tensor)
    with torch.no_grad():
        found, expected = twin(values), blocks(values)
    assert float((found - expected).norm() / expected.norm()) < 0.03
    assert stored_bytes(twin) < 0.35 * stored_bytes(blocks)
