"""Published nets trained on CIFAR-10, as plain PyTorch.

Names and shapes are those of the weight files in ``cifar10-nets`` of the shared data. The
architectures follow akamaster/pytorch_resnet_cifar10 (``akamaster_*``: option-A shortcuts) and
chenyaofo/pytorch-cifar-models (``chenyaofo_*``: 1x1-convolution shortcuts, ShuffleNetV2).

Every factory takes no argument and returns an untrained net, so that this works:

    rankfold compress benchmarks/cifar_nets.py:akamaster_resnet20 --weights FILE.safetensors ...

``python -m benchmarks.cifar_nets`` prints accuracy and loss of every net.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.tasks.losses import logits_of

if TYPE_CHECKING:
    from benchmarks.cifar10 import PerChannel

CLASSES = 10


class OptionAShortcut(nn.Module):
    """Every second pixel, with zeros for the channels that the block adds."""

    def __init__(self, added_channels: int) -> None:
        super().__init__()
        self.added_each_side = added_channels // 2

    def forward(self, x: Tensor) -> Tensor:  # (n, c, h, w) -> (n, c + added, h/2, w/2)
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added_each_side, self.added_each_side))


class AkamasterBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else OptionAShortcut(channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class AkamasterResNet(nn.Module):
    """ResNet of He et al. for CIFAR, of depth ``6 * blocks + 2``."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(AkamasterBlock, blocks, 16, 16, stride=1)
        self.layer2 = _stage(AkamasterBlock, blocks, 16, 32, stride=2)
        self.layer3 = _stage(AkamasterBlock, blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 32, 32) -> (n, 10)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


class ChenyaofoBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        result: Tensor = self.relu(out)
        return result


class ChenyaofoResNet(nn.Module):
    """The same depths, with 1x1 convolutions where a shortcut changes shape."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(ChenyaofoBlock, blocks, 16, 16, stride=1)
        self.layer2 = _stage(ChenyaofoBlock, blocks, 16, 32, stride=2)
        self.layer3 = _stage(ChenyaofoBlock, blocks, 32, 64, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 32, 32) -> (n, 10)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.fc(self.avgpool(out).flatten(1))
        return logits


class ShuffleBlock(nn.Module):
    """The ShuffleNetV2 unit: at stride 1 half of the channels pass through untouched."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        half = channels // 2
        self.stride = stride
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                _depthwise(in_channels, stride),
                nn.BatchNorm2d(in_channels),
                nn.Conv2d(in_channels, half, 1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(in_channels if stride > 1 else half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            _depthwise(half, stride),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            untouched, changed = x.chunk(2, dim=1)
            out = torch.cat((untouched, self.branch2(changed)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        # The channels of the two halves take turns: (n, 2, c/2, h, w) -> (n, c/2, 2, h, w).
        n, channels, height, width = out.shape
        halves = out.view(n, 2, channels // 2, height, width)
        return halves.transpose(1, 2).reshape(n, channels, height, width)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 for 32x32 images: the stem has stride 1 and no pooling."""

    def __init__(self, widths: tuple[int, int, int], last_width: int) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True)
        )
        self.stage2 = _stage(ShuffleBlock, 4, 24, first, stride=2)
        self.stage3 = _stage(ShuffleBlock, 8, first, second, stride=2)
        self.stage4 = _stage(ShuffleBlock, 4, second, third, stride=2)
        self.conv5 = nn.Sequential(
            nn.Conv2d(third, last_width, 1, bias=False),
            nn.BatchNorm2d(last_width),
            nn.ReLU(inplace=True),
        )
        self.fc = nn.Linear(last_width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 32, 32) -> (n, 10)
        out = self.stage4(self.stage3(self.stage2(self.conv1(x))))
        logits: Tensor = self.fc(self.conv5(out).mean((2, 3)))
        return logits


def akamaster_resnet20() -> AkamasterResNet:
    return AkamasterResNet(blocks=3)


def akamaster_resnet32() -> AkamasterResNet:
    return AkamasterResNet(blocks=5)


def akamaster_resnet44() -> AkamasterResNet:
    return AkamasterResNet(blocks=7)


def akamaster_resnet56() -> AkamasterResNet:
    return AkamasterResNet(blocks=9)


def chenyaofo_resnet20() -> ChenyaofoResNet:
    return ChenyaofoResNet(blocks=3)


def chenyaofo_resnet56() -> ChenyaofoResNet:
    return ChenyaofoResNet(blocks=9)


def chenyaofo_shufflenetv2_x0_5() -> ShuffleNetV2:
    return ShuffleNetV2(widths=(48, 96, 192), last_width=1024)


class Recipe(NamedTuple):
    """How a net is built, and how its images were normalised when it was trained."""

    build: Callable[[], nn.Module]
    mean: PerChannel
    std: PerChannel


_AKAMASTER = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CHENYAOFO = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))

NETS = {  # by the stem of the weights' file name
    "akamaster_resnet20": Recipe(akamaster_resnet20, *_AKAMASTER),
    "akamaster_resnet32": Recipe(akamaster_resnet32, *_AKAMASTER),
    "akamaster_resnet44": Recipe(akamaster_resnet44, *_AKAMASTER),
    "akamaster_resnet56": Recipe(akamaster_resnet56, *_AKAMASTER),
    "chenyaofo_resnet20": Recipe(chenyaofo_resnet20, *_CHENYAOFO),
    "chenyaofo_resnet56": Recipe(chenyaofo_resnet56, *_CHENYAOFO),
    "chenyaofo_shufflenetv2_x0_5": Recipe(chenyaofo_shufflenetv2_x0_5, *_CHENYAOFO),
}


def load_cifar_net(name: str) -> tuple[nn.Module, PerChannel, PerChannel]:
    """A trained net in eval mode, with the mean and std of its images.

    Raises:
        ValueError: No net has this name.
    """
    if name not in NETS:
        raise ValueError(f"no net is called {name!r}; there are {', '.join(NETS)}")
    # Imported late: the CLI loads this file by its path, where `benchmarks` may be no package.
    from benchmarks import shared_data

    recipe = NETS[name]
    net = recipe.build()
    net.load_state_dict(load_file(shared_data() / "cifar10-nets" / f"{name}.safetensors"))
    return net.eval(), recipe.mean, recipe.std


@torch.no_grad()
def accuracy_and_loss(
    net: nn.Module, images: Tensor, labels: Tensor, batch: int = 250
) -> tuple[float, float]:
    """The share of images classified correctly, and the mean cross-entropy in nats."""
    logits = torch.cat([logits_of(net(part)) for part in images.split(batch)])
    right = (logits.argmax(1) == labels).double().mean().item()
    return right, F.cross_entropy(logits.double(), labels).item()


def _stage(
    block: Callable[[int, int, int], nn.Module],
    blocks: int,
    in_channels: int,
    channels: int,
    stride: int,
) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels, channels, 1) for _ in range(blocks - 1)))


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)


def main(training_images: int = 2_000, seed: int = 0) -> None:
    """Print accuracy and loss of every net on the test images and on some training images."""
    from benchmarks.cifar10 import cifar10_test, cifar10_train

    print(f"test: 1000 images; training: {training_images} images, seed {seed}; loss in nats")
    print(f"{'net':<28} {'test acc':>8} {'loss':>8} {'train acc':>9} {'loss':>9}")
    for name in NETS:
        net, mean, std = load_cifar_net(name)
        test_accuracy, test_loss = accuracy_and_loss(net, *cifar10_test(mean, std))
        images, labels = cifar10_train(training_images, seed, mean, std)
        training_accuracy, training_loss = accuracy_and_loss(net, images, labels)
        print(
            f"{name:<28} {test_accuracy:>8.1%} {test_loss:>8.4f} "
            f"{training_accuracy:>9.2%} {training_loss:>9.5f}",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
