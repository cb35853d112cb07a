"""Changes of the outputs of factorized layers, multiplied into their factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankfold.forms.blocks.modules import (
    BlocksConv2d,
    ColumnBlocksLinear,
    RowBlocksLinear,
    block_sizes,
)
from rankfold.forms.conv.modules import empty_conv
from rankfold.forms.factors import truncate
from rankfold.forms.layer import FactorizedLayer
from rankfold.forms.low_rank.fit import low_rank_module
from rankfold.forms.output_change import OutputChange
from rankfold.maths.spectrum import whitened_spectrum


def low_rank(layer: nn.Linear | nn.Conv2d, rank: int, form: str) -> FactorizedLayer:
    spectrum = whitened_spectrum(layer.weight.detach().flatten(1).double(), None, None)
    return low_rank_module(layer, truncate(spectrum, rank, form))  # type: ignore[arg-type]


def row_blocks(bias: bool = True) -> RowBlocksLinear:
    order = torch.randperm(23)
    n1, n2 = block_sizes(23)
    return RowBlocksLinear(
        torch.randn(7, 9),
        torch.randn(n1 - 4, 4),
        torch.randn(n2 - 3, 3),
        order,
        torch.randn(23) if bias else None,
    )


def column_blocks(out: int) -> ColumnBlocksLinear:
    n1, n2 = block_sizes(23)
    return ColumnBlocksLinear(
        torch.randn(out, 7),
        torch.randn(4, n1 - 4),
        torch.randn(3, n2 - 3),
        torch.randperm(23),
        torch.randn(out),
    )


def conv(form: str, ranks: tuple[int, ...], pivoted: bool = True) -> FactorizedLayer:
    layer = nn.Conv2d(6, 10, (3, 5), stride=(1, 2), padding=(1, 2))
    made = empty_conv(layer, form, ranks, pivoted)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    if pivoted:
        for name, order in list(made.named_buffers()):
            setattr(made, name, torch.randperm(len(order), dtype=torch.int32))
    return made


CASES = {
    "pivoted": lambda: low_rank(nn.Linear(9, 12), 5, "pivoted"),
    "pair": lambda: low_rank(nn.Linear(9, 12), 5, "pair"),
    "no bias": lambda: low_rank(nn.Linear(9, 12, bias=False), 5, "pivoted"),
    "full rank": lambda: low_rank(nn.Linear(9, 6), 6, "pivoted"),
    "conv": lambda: low_rank(nn.Conv2d(6, 12, 3, padding=1), 5, "pivoted"),
    "conv pair": lambda: low_rank(nn.Conv2d(6, 12, 3, padding=1), 5, "pair"),
    "row blocks": row_blocks,
    "row blocks, no bias": lambda: row_blocks(False),
    "column blocks": lambda: column_blocks(9),
    "column blocks, few outputs": lambda: column_blocks(5),
    "blocks of a 1x1 conv": lambda: BlocksConv2d(row_blocks(), nn.Conv2d(9, 23, 1)),
    "vertical": lambda: conv("vertical", (7,)),
    "horizontal, not pivoted": lambda: conv("horizontal", (4,), pivoted=False),
    "tucker": lambda: conv("tucker", (3, 4)),
    "tucker, not pivoted": lambda: conv("tucker", (3, 4), pivoted=False),
    "tucker, all outputs": lambda: conv("tucker", (3, 10)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_changed_layer_computes_the_changed_outputs(case: str) -> None:
    torch.manual_seed(0)
    module = CASES[case]().double()
    before = {name: values.clone() for name, values in module.state_dict().items()}
    is_conv = hasattr(module, "kernel_size")
    inputs = (
        torch.randn(2, 6, 8, 8)
        if case not in ("blocks of a 1x1 conv",)
        else torch.randn(2, 9, 4, 4)
    )
    if not is_conv:
        inputs = torch.randn(2, 3, module.in_features)
    inputs = inputs.double()
    groups = module.output_groups()
    out = sum(len(group.rows) for group in groups)
    change = OutputChange(
        groups,
        [torch.randn(len(g.rows), len(g.pivots)).double() for g in groups],
        None if module.bias is None else torch.randn(out).double(),
    )
    outputs = module(inputs)
    last = outputs.movedim(-3, -1) if is_conv else outputs
    expected = change.of_outputs(last, module.bias)
    expected = expected.movedim(-1, -3) if is_conv else expected
    changed = module.with_output_change(change)
    assert torch.allclose(changed(inputs), expected, atol=1e-9)
    # Of the same form: files and sizes stay what they were.
    assert {n: v.shape for n, v in changed.state_dict().items()} == {
        n: v.shape for n, v in before.items()
    }
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_all_outputs_are_combinations_of_the_pivots(case: str) -> None:
    torch.manual_seed(0)
    module = CASES[case]().double()
    weight = module.to_dense().weight.detach().flatten(1)
    rows = torch.cat([group.rows for group in module.output_groups()])
    assert sorted(rows.tolist()) == list(range(len(weight)))
    for group in module.output_groups():
        found = torch.linalg.lstsq(weight[group.pivots].T, weight[group.rows].T, driver="gelsd")
        assert torch.allclose(
            weight[group.pivots].T @ found.solution, weight[group.rows].T, atol=1e-9
        )
