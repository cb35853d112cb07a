"""Random matrices by seed, and the Linear and Conv2d layers that many tests go through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies
from torch import Tensor, nn

SEEDS = strategies.integers(0, 2**31)
SIDES = strategies.integers(1, 8)


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal float64 values, the same for the same seed and shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(seed: int, side: int, rank: int | None = None) -> Tensor:
    """A ``(side, side)`` Gram: singular of this ``rank`` below ``side``, else well-conditioned."""
    rows = normal(seed, side + 3 if rank is None or rank >= side else rank, side)
    return rows.T @ rows


def filled(layer: nn.Module, seed: int) -> nn.Module:
    """The layer with its parameters drawn from ``seed``."""
    with torch.no_grad():
        for place, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(seed + place, *parameter.shape))
    return layer


@dataclass(frozen=True)
class LinearCase:
    """A Linear, and the shape of what it is called with."""

    name: str
    in_features: int
    out_features: int
    inputs: tuple[int, ...]
    bias: bool = True

    def layer(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Linear:
        return filled(nn.Linear(self.in_features, self.out_features, self.bias, dtype=dtype), seed)

    def values(self, seed: int = 1) -> Tensor:
        return normal(seed, *self.inputs)


@dataclass(frozen=True)
class ConvCase:
    """A Conv2d from 3 channels to ``out``, and the shape of the images it is called with."""

    name: str
    kernel: int | tuple[int, int] = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    out: int = 5
    images: tuple[int, ...] = (2, 3, 9, 11)

    def layer(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
        return filled(nn.Conv2d(3, self.out, self.kernel, dtype=dtype, **self.options), seed)

    def values(self, seed: int = 1) -> Tensor:
        return normal(seed, *self.images)


LINEAR_CASES = (
    LinearCase("wide", 7, 4, (6, 7)),
    LinearCase("tall-no-bias", 4, 7, (6, 4), bias=False),
    LinearCase("square-sequences", 5, 5, (2, 3, 5)),
    LinearCase("one-vector", 6, 3, (6,)),
)

CONV_CASES = (
    ConvCase("plain"),
    ConvCase("no-bias", options={"bias": False, "padding": 1}),
    ConvCase("unbatched", options={"padding": 1}, images=(3, 9, 11)),
    ConvCase("1x1", kernel=1),
    ConvCase("1x1-stride", kernel=1, options={"stride": 2, "bias": False}),
    ConvCase("more-outputs-than-inputs", kernel=2, out=15),
    ConvCase("stride-2", options={"stride": 2, "padding": 1}),
    ConvCase("strides-differ", options={"stride": (1, 3), "padding": (2, 0)}),
    ConvCase("kernel-1x4", kernel=(1, 4), options={"padding": (0, 2)}),
    ConvCase("kernel-5x2", kernel=(5, 2), options={"stride": 2, "padding": (1, 1)}),
    ConvCase("dilation-2", options={"dilation": 2}),
    ConvCase("dilations-differ", kernel=(2, 3), options={"dilation": (3, 1), "padding": 2}),
    ConvCase("valid", options={"padding": "valid", "stride": 2}),
    ConvCase("same", options={"padding": "same"}),
    ConvCase("same-dilated", options={"padding": "same", "dilation": (1, 3), "bias": False}),
    ConvCase("same-even", kernel=(2, 4), options={"padding": "same"}),
    ConvCase("reflect", options={"padding": (2, 1), "padding_mode": "reflect"}),
    ConvCase("reflect-same", kernel=(4, 3), options={"padding": "same", "padding_mode": "reflect"}),
    ConvCase(
        "reflect-unbatched",
        options={"padding": 2, "padding_mode": "reflect"},
        images=(3, 9, 11),
    ),
    ConvCase("circular", options={"padding": (1, 2), "padding_mode": "circular", "stride": 2}),
    ConvCase(
        "circular-same-dilated",
        kernel=(3, 2),
        options={"padding": "same", "padding_mode": "circular", "dilation": 2, "bias": False},
    ),
    ConvCase("replicate", options={"padding": 3, "padding_mode": "replicate", "stride": (3, 2)}),
)


def each_linear() -> pytest.MarkDecorator:
    """Run a test once for every ``case`` of ``LINEAR_CASES``."""
    return pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.name)


def each_conv() -> pytest.MarkDecorator:
    """Run a test once for every ``case`` of ``CONV_CASES``."""
    return pytest.mark.parametrize("case", CONV_CASES, ids=lambda case: case.name)


def each_layer() -> pytest.MarkDecorator:
    """Run a test once for every ``case`` of both tables."""
    return pytest.mark.parametrize("case", [*LINEAR_CASES, *CONV_CASES], ids=lambda case: case.name)


# torch says so of a dense conv with an even kernel and padding="same", too.
ignore_even_same = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def leave_identity_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no conv multiply the identity rows of its factors, as those of high ranks don't."""
    for module in ("layer", "conv.modules"):
        monkeypatch.setattr(f"rankfold.forms.{module}.multiplies_identity", lambda *_: False)
