"""Networks that judge maps: smashed data or images, with or without the labels that they came with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SMALLEST_SIDE = 4


def build_critic(shape: Sequence[int], width: int = 16, scores: int = 1) -> nn.Module:
    """From maps (n, *shape) to a score (n, 1), higher for more real, or to several; no norms, as WGAN-GP asks for.

    A convolution to `width` channels, then halvings to a side of at most four pixels, the channels doubling up to
    four times the width.
    """
    channels, side = shape[0], min(shape[1:])
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.LeakyReLU(0.2)]
    now, height, breadth = width, shape[1], shape[2]
    while side > SMALLEST_SIDE:
        wider = min(2 * now, 4 * width)
        layers += [nn.Conv2d(now, wider, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        now, side, height, breadth = wider, -(-side // 2), -(-height // 2), -(-breadth // 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(now * height * breadth, scores))


class Unlabelled(nn.Module):
    """A network of maps alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, maps: Tensor, labels: Tensor | None) -> Tensor:  # noqa: ARG002 - the same call with or without
        """Maps (n, c, h, w); labels are not looked at."""
        judged: Tensor = self.network(maps)
        return judged


class Labelled(nn.Module):
    """A network of maps and their labels, which join them as one more channel (Mirza & Osindero, 2014; as in SDAR).

    network: for maps with that channel. size: (h, w) of the maps.
    """

    EMBEDDED = 50

    def __init__(self, network: nn.Module, classes: int, size: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.size = tuple(size)
        self.embedding = nn.Sequential(
            nn.Embedding(classes, self.EMBEDDED), nn.Linear(self.EMBEDDED, size[0] * size[1])
        )

    def forward(self, maps: Tensor, labels: Tensor) -> Tensor:
        """Maps (n, c, h, w), labels int64 (n,)."""
        plane = self.embedding(labels).view(-1, 1, *self.size)
        judged: Tensor = self.network(torch.cat([maps, plane], dim=1))
        return judged
