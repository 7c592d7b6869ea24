"""The bottleneck at the cut (ResSFL, Li et al., CVPR 2022): few channels travel, the server expands them again."""

from __future__ import annotations

from torch import Tensor, nn

from mocosfl_priv.config import Bottleneck


class CompressingConv2d(nn.Conv2d):
    """One bottleneck convolution with its ReLU; a plain convolution with bias, as published (`cut.weight`)."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, relu: bool) -> None:
        super().__init__(in_channels, channels, kernel, stride, kernel // 2)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.relu() if self.relu else y


def compress(bottleneck: Bottleneck, channels: int) -> nn.Module:
    """The client's end: one convolution per halving, at least one, all to the bottleneck's channels."""
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
    """The server's mirror image: transposed convolutions back to the cut's channels and size."""
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
