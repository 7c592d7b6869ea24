"""MobileNetV2 (Sandler et al., CVPR 2018) as a list of units; the model can be cut after any of them.

Unit 1 is the stem, each following unit is a group of inverted residual blocks, and the last unit is the final 1x1
convolution. For images of 32 pixels, a cut after unit 2 gives smashed data of shape 16x32x32. As in the paper, only
blocks whose input and output have the same shape have a shortcut, and it is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.models.layers import LayerOptions, Residual


class Group(NamedTuple):
    """A row of the paper's table 2: expansion factor, output channels, number of blocks, stride of the first block."""

    expansion: int
    channels: int
    blocks: int
    stride: int


GROUPS = (
    Group(1, 16, 1, 1),
    Group(6, 24, 2, 2),
    Group(6, 32, 3, 2),
    Group(6, 64, 4, 2),
    Group(6, 96, 3, 1),
    Group(6, 160, 3, 2),
    Group(6, 320, 1, 1),
)
STEM_CHANNELS = 32
LAST_CHANNELS = 1280
SMALL_IMAGES = 48  # for images with fewer pixels a side, the stem and the second group have stride 1


class ConvUnit(nn.Module):
    """Convolution, norm, ReLU6."""

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int, layers: LayerOptions, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = layers.conv(in_channels, channels, kernel, stride, groups)
        self.bn1 = layers.normalisation(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.bn1(self.conv1(x)))


class InvertedResidual(Residual):
    """1x1 expansion, 3x3 depthwise, 1x1 projection; with a shortcut if input and output have equal shapes."""

    def __init__(self, in_channels: int, channels: int, expansion: int, stride: int, layers: LayerOptions) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.expand = ConvUnit(in_channels, hidden, 1, 1, layers) if expansion != 1 else nn.Identity()
        self.depthwise = ConvUnit(hidden, hidden, 3, stride, layers, groups=hidden)
        self.conv1 = layers.conv(hidden, channels, 1)
        self.bn1 = layers.normalisation(channels)
        if stride == 1 and in_channels == channels:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.bn1(self.conv1(self.depthwise(self.expand(x)))), x)


@dataclass(frozen=True)
class MobileNetV2:
    """The backbone: stem, groups of inverted residual blocks (`GROUPS`), and the last convolution."""

    summary: str

    @property
    def units(self) -> int:
        """Number of units."""
        return len(GROUPS) + 2

    def build(self, width: int | None, image_size: int, layers: LayerOptions) -> list[nn.Module]:
        """Build the units in order.

        width: channels of the stem, 32 if None; all other channels are scaled in proportion, to multiples of four.
        """
        small = image_size < SMALL_IMAGES
        stem_channels = width or STEM_CHANNELS

        def scaled(channels: int) -> int:
            return max(4, round(channels * stem_channels / STEM_CHANNELS / 4) * 4)

        units: list[nn.Module] = [ConvUnit(3, stem_channels, 3, 1 if small else 2, layers)]
        in_channels = stem_channels
        for index, group in enumerate(GROUPS):
            stride = 1 if small and index == 1 else group.stride
            blocks = []
            for position in range(group.blocks):
                channels = scaled(group.channels)
                blocks.append(
                    InvertedResidual(in_channels, channels, group.expansion, 1 if position else stride, layers)
                )
                in_channels = channels
            units.append(nn.Sequential(*blocks))
        units.append(ConvUnit(in_channels, scaled(LAST_CHANNELS), 1, 1, layers))
        return units


MOBILENETS = {"mobilenetv2": MobileNetV2("inverted residuals, depthwise convolutions")}
