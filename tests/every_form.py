"""A model that holds every kind of factorized layer, pivoted and not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankfold.forms.blocks.modules import BlocksConv2d, ColumnBlocksLinear, RowBlocksLinear
from rankfold.forms.conv.modules import SpatialConv2d, TuckerConv2d
from rankfold.forms.low_rank.modules import LowRankConv2d, LowRankLinear

CHANNELS, RANK, FEATURES, LINEAR_RANK = 48, 10, 256, 20
IMAGE = (CHANNELS, 12, 12)


class EveryForm(nn.Module):
    """Images to five numbers, by ten convs and five Linear."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def factor(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) / torch.Size(shape[1:]).numel() ** 0.5

        def order(rows: int) -> Tensor:
            return torch.randperm(rows, generator=generator)

        def bias(rows: int) -> Tensor:
            return factor(1, rows)[0]

        like = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        c, k = CHANNELS, RANK
        self.convs = nn.ModuleList(
            [
                LowRankConv2d(factor(c, k), factor(k, c, 3, 3), like, bias(c)),
                LowRankConv2d(factor(c - k, k), factor(k, c, 3, 3), like, bias(c), order(c)),
                SpatialConv2d(factor(k, c, 3, 1), factor(3 * c, k), like, bias(c)),
                SpatialConv2d(
                    factor(k, c, 3, 1), factor(3 * c - k, k), like, bias(c), order(3 * c)
                ),
                SpatialConv2d(factor(k, c, 1, 3), factor(3 * c - k, k), like, None, order(3 * c)),
                TuckerConv2d(
                    factor(c, k), factor(k + 1, k, 3, 3), factor(c, k + 1), like, bias(c)
                ),
                TuckerConv2d(
                    factor(c - k, k), factor(k + 1, k, 3, 3), factor(c - k - 1, k + 1), like,
                    bias(c), order(c), order(c),
                ),
                TuckerConv2d(
                    None, factor(k, c, 3, 3), factor(c - k, k), like, None, None, order(c)
                ),
                BlocksConv2d(
                    RowBlocksLinear(
                        factor(k + 5, c), factor(2 * c - k, k), factor(2 * c - 5, 5), order(4 * c),
                        bias(4 * c),
                    ),
                    nn.Conv2d(c, 4 * c, 1),
                ),
                BlocksConv2d(
                    ColumnBlocksLinear(
                        factor(c, k + 5), factor(k, 2 * c - k), factor(5, 2 * c - 5), order(4 * c),
                        None,
                    ),
                    nn.Conv2d(4 * c, c, 1, stride=2),
                ),
            ]
        )  # fmt: skip
        n, r = FEATURES, LINEAR_RANK
        self.linears = nn.ModuleList(
            [
                LowRankLinear(factor(n, r), factor(r, c), bias(n)),
                LowRankLinear(factor(n - r, r), factor(r, n), bias(n), order(n)),
                RowBlocksLinear(
                    factor(r + 5, n), factor(n - r, r), factor(n - 5, 5), order(2 * n), bias(2 * n)
                ),
                ColumnBlocksLinear(
                    factor(n, r + 5), factor(r, n - r), factor(5, n - 5), order(2 * n), None
                ),
                LowRankLinear(factor(3, 2), factor(2, n), None, order(5)),
            ]
        )

    def forward(self, images: Tensor) -> Tensor:
        for conv in self.convs:
            images = torch.tanh(conv(images))
        values = images.mean((2, 3))
        for linear in self.linears:
            values = linear(torch.tanh(values).to(linear.weight.dtype))
        return values


def stored_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())
