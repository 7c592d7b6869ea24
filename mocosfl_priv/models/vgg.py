"""VGG (Simonyan and Zisserman, 2015) with a norm after every convolution, as a list of units.

The model can be cut after any unit. Each convolution (with norm and ReLU) and each max-pool is a unit: for images of 32
pixels, a cut of VGG-13 after unit 2 gives smashed data of shape 64x32x32, a cut after unit 3 64x16x16. The units are
the same at every image size, so larger images give larger maps. The last pool is followed by global average pooling, in
place of VGG's three linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.models.layers import LayerOptions


class ConvUnit(nn.Module):
    """3x3 convolution, norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, layers: LayerOptions) -> None:
        super().__init__()
        self.conv1 = layers.conv(in_channels, channels)
        self.bn1 = layers.normalisation(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


@dataclass(frozen=True)
class VGG:
    """The backbone: stages of convolutions, each followed by a 2x2 max-pool.

    convolutions: number per stage. width: channels of the first stage; every stage has twice the channels of the
    previous one, up to eight times `width`.
    """

    convolutions: Sequence[int]
    summary: str
    width: int = 64

    @property
    def units(self) -> int:
        """Number of units: convolutions and max-pools."""
        return sum(self.convolutions) + len(self.convolutions)

    def build(self, width: int | None, image_size: int, layers: LayerOptions) -> list[nn.Module]:  # noqa: ARG002
        """Build the units in order; `width` replaces the first stage's channels and scales all others."""
        units: list[nn.Module] = []
        in_channels = 3
        for stage, count in enumerate(self.convolutions):
            channels = (width or self.width) * min(2**stage, 8)
            for _ in range(count):
                units.append(ConvUnit(in_channels, channels, layers))
                in_channels = channels
            units.append(nn.MaxPool2d(2))
        return units


VGGS = {
    "vgg11": VGG((1, 1, 2, 2, 2), "8 convolutions and 5 pools"),
    "vgg13": VGG((2, 2, 2, 2, 2), "10 convolutions and 5 pools"),
    "vgg16": VGG((2, 2, 3, 3, 3), "13 convolutions and 5 pools"),
}
