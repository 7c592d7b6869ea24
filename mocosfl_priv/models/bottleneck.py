"""The bottleneck at the cut (ResSFL, Li et al., CVPR 2022).

The client reduces smashed data to few channels before sending it, and the server expands it again.
"""

from __future__ import annotations

from torch import Tensor, nn

from mocosfl_priv.config import Bottleneck


class CompressingConv2d(nn.Conv2d):
    """A convolution with bias, optionally followed by ReLU.

    It is a subclass of the convolution, so that its weight is called `cut.weight`, as in the published models.
    """

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, relu: bool) -> None:
        super().__init__(in_channels, channels, kernel, stride, kernel // 2)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.relu() if self.relu else y


def compress(bottleneck: Bottleneck, channels: int) -> nn.Module:
    """Build the client's part: log2(stride) convolutions of stride 2, or one of stride 1 for a bottleneck of stride 1.

    All have the bottleneck's number of output channels. channels: of the input.
    """
    halvings = bottleneck.stride.bit_length() - 1
    layers = [
        CompressingConv2d(
            channels if index == 0 else bottleneck.channels,
            bottleneck.channels,
            bottleneck.kernel,
            2 if halvings else 1,
            bottleneck.relu,
        )
        for index in range(max(1, halvings))
    ]
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def expand(bottleneck: Bottleneck, channels: int) -> nn.Module:
    """Build the server's part: transposed convolutions that restore the original number of channels and map size."""
    halvings = bottleneck.stride.bit_length() - 1
    layers: list[nn.Module] = []
    steps = max(1, halvings)
    for index in range(steps):
        layers.append(
            nn.ConvTranspose2d(
                bottleneck.channels,
                channels if index == steps - 1 else bottleneck.channels,
                bottleneck.kernel,
                stride=2 if halvings else 1,
                padding=bottleneck.kernel // 2,
                output_padding=1 if halvings else 0,
            )
        )
        if bottleneck.relu:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
