"""An over-parameterised ResNeXt for CIFAR-10, which ``benchmarks.cifar_training`` trains.

``resnext`` takes no argument and returns an untrained net, so that this works:

    rankfold compact benchmarks/resnext.py:resnext \
        --weights benchmarks/models/resnext_seed0.safetensors ...

Images are small and 1x1 convolutions cheap at low resolution, so the stem halves the resolution
and most of the parameters lie where the image is 4x4: many parameters for little time.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


class Stage(NamedTuple):
    """Blocks at one resolution; the first of all but the first stage halves it."""

    blocks: int
    channels: int
    bottleneck: int


STEM_CHANNELS = 64
STAGES = (Stage(2, 128, 64), Stage(3, 256, 128), Stage(7, 512, 256))
GROUP_WIDTH = 8  # channels of a group: small, so that the 1x1 convolutions hold the parameters


class ResNeXtBlock(nn.Module):
    """1x1 down, grouped 3x3, 1x1 up, and a shortcut (Xie et al. 2017, figure 3c)."""

    def __init__(self, in_channels: int, channels: int, bottleneck: int, stride: int) -> None:
        super().__init__()
        groups = bottleneck // GROUP_WIDTH
        self.conv1 = nn.Conv2d(in_channels, bottleneck, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(bottleneck)
        self.conv2 = nn.Conv2d(
            bottleneck, bottleneck, 3, stride=stride, padding=1, groups=groups, bias=False
        )
        self.bn2 = nn.BatchNorm2d(bottleneck)
        self.conv3 = nn.Conv2d(bottleneck, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNeXt(nn.Module):
    def __init__(self, stem_channels: int, stages: tuple[Stage, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        blocks: list[nn.Sequential] = []
        in_channels = stem_channels
        for number, (count, channels, bottleneck) in enumerate(stages):
            first = ResNeXtBlock(in_channels, channels, bottleneck, stride=1 if number == 0 else 2)
            rest = (ResNeXtBlock(channels, channels, bottleneck, 1) for _ in range(count - 1))
            blocks.append(nn.Sequential(first, *rest))
            in_channels = channels
        self.stages = nn.Sequential(*blocks)
        self.fc = nn.Linear(in_channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 32, 32) -> (n, 10)
        out = F.relu(self.bn1(self.conv1(x)))
        logits: Tensor = self.fc(self.stages(out).mean((2, 3)))
        return logits


def resnext() -> ResNeXt:
    """The untrained net; every block starts as its shortcut."""
    net = ResNeXt(STEM_CHANNELS, STAGES)
    for module in net.modules():
        if isinstance(module, ResNeXtBlock):
            nn.init.zeros_(module.bn3.weight)
    return net
