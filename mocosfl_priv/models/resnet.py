"""ResNets as a list of units to cut between: the stem is unit 1, every residual block one more.

Submodules are called as in the published client models (``0.conv1``, ``0.bn1``, ``1.conv2``, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.models.layers import conv, group_norm


class Stem(nn.Module):
    """Convolution, norm, ReLU. 3x3 stride 1 below 48 pixels, 3x3 stride 2 below 128, else 7x7 stride 2."""

    def __init__(self, width: int, image_size: int) -> None:
        super().__init__()
        kernel, stride = (3, 1) if image_size < 48 else (3, 2) if image_size < 128 else (7, 2)
        self.conv1 = conv(3, width, kernel, stride)
        self.bn1 = group_norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = group_norm(channels)
        self.conv2 = conv(channels, channels)
        self.bn2 = group_norm(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(conv(in_channels, channels, 1, stride), group_norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


@dataclass(frozen=True)
class ResNet:
    """Blocks per stage and the stem's channels; each later stage doubles channels and halves the size."""

    blocks: Sequence[int]
    width: int
    summary: str

    @property
    def units(self) -> int:
        """Units of the backbone: the stem and every block."""
        return 1 + sum(self.blocks)

    def build(self, width: int | None, image_size: int) -> list[nn.Module]:
        """The units in order; `width` replaces the stem's channels."""
        channels = width or self.width
        units: list[nn.Module] = [Stem(channels, image_size)]
        for stage, count in enumerate(self.blocks):
            out_channels = (width or self.width) * 2**stage
            for block in range(count):
                units.append(BasicBlock(channels, out_channels, stride=2 if stage and not block else 1))
                channels = out_channels
        return units


BACKBONES = {
    "resnet8": ResNet((1, 1, 1), 16, "narrow, three blocks: demos and tests"),
    "resnet10": ResNet((1, 1, 1, 1), 16, "narrow, four blocks: demos and tests"),
    "resnet18": ResNet((2, 2, 2, 2), 64, "the paper's backbone"),
}
