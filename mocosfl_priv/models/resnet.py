"""ResNets as a list of units: unit 1 is the stem, and each residual block is one more unit.

Submodules have the names that they have in the published client models (``0.conv1``, ``0.bn1``, ``1.conv2``, ...);
those called ``bn`` may be another norm than BatchNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.models.layers import LayerOptions, Residual


class Stem(nn.Module):
    """Convolution, norm, ReLU, without pooling.

    The convolution is 3x3 with stride 1 for images below 48 pixels, 3x3 with stride 2 below 128, else 7x7 stride 2.
    """

    def __init__(self, width: int, image_size: int, layers: LayerOptions) -> None:
        super().__init__()
        kernel, stride = (3, 1) if image_size < 48 else (3, 2) if image_size < 128 else (7, 2)
        self.conv1 = layers.conv(3, width, kernel, stride)
        self.bn1 = layers.normalisation(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)), inplace=True)


def _projection(in_channels: int, channels: int, stride: int, layers: LayerOptions) -> nn.Module:
    """The shortcut: the identity if input and output have equal shapes, else a 1x1 convolution with a norm."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(layers.conv(in_channels, channels, 1, stride), layers.normalisation(channels))


class BasicBlock(Residual):
    """Two 3x3 convolutions and a shortcut (He et al., 2016)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, layers: LayerOptions) -> None:
        super().__init__()
        self.conv1 = layers.conv(in_channels, channels, 3, stride)
        self.bn1 = layers.normalisation(channels)
        self.conv2 = layers.conv(channels, channels)
        self.bn2 = layers.normalisation(channels)
        self.shortcut = _projection(in_channels, channels, stride, layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(self.join(y, x), inplace=True)


class BottleneckBlock(Residual):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (He et al., 2016); the output has 4 * `channels` channels.

    The stride is in the 3x3 convolution ("ResNet v1.5"), as in most implementations since.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, layers: LayerOptions) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = layers.conv(in_channels, channels, 1)
        self.bn1 = layers.normalisation(channels)
        self.conv2 = layers.conv(channels, channels, 3, stride)
        self.bn2 = layers.normalisation(channels)
        self.conv3 = layers.conv(channels, out_channels, 1)
        self.bn3 = layers.normalisation(out_channels)
        self.shortcut = _projection(in_channels, out_channels, stride, layers)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(self.join(y, x), inplace=True)


@dataclass(frozen=True)
class ResNet:
    """The backbone: a stem and stages of residual blocks.

    blocks: number per stage. width: channels of the stem and the first stage; each later stage doubles the channels and
    halves the map size. block: the kind of block, for which `expansion` multiplies the output channels.
    """

    blocks: Sequence[int]
    width: int
    summary: str
    block: type[BasicBlock] | type[BottleneckBlock] = BasicBlock

    @property
    def units(self) -> int:
        """Number of units: the stem and the blocks."""
        return 1 + sum(self.blocks)

    def build(self, width: int | None, image_size: int, layers: LayerOptions) -> list[nn.Module]:
        """Build the units in order; `width` replaces the stem's channels and scales all others."""
        stem_channels = width or self.width
        units: list[nn.Module] = [Stem(stem_channels, image_size, layers)]
        in_channels = stem_channels
        for stage, count in enumerate(self.blocks):
            channels = stem_channels * 2**stage
            for position in range(count):
                units.append(self.block(in_channels, channels, 2 if stage and not position else 1, layers))
                in_channels = channels * self.block.expansion
        return units


RESNETS = {
    "resnet8": ResNet((1, 1, 1), 16, "narrow, three blocks; for demos and tests"),
    "resnet10": ResNet((1, 1, 1, 1), 16, "narrow, four blocks; for demos and tests"),
    "resnet18": ResNet((2, 2, 2, 2), 64, "the paper's backbone"),
    "resnet34": ResNet((3, 4, 6, 3), 64, "deeper, basic blocks"),
    "resnet50": ResNet((3, 4, 6, 3), 64, "deeper, bottleneck blocks", BottleneckBlock),
}
