"""Critics and discriminators of smashed data or images, with or without labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SMALLEST_SIDE = 4


def build_critic(shape: Sequence[int], width: int = 16, scores: int = 1) -> nn.Module:
    """Return a critic from maps (n, *shape) to scores (n, scores), higher for more real; without norms, as in WGAN-GP.

    A convolution to `width` channels, then strided convolutions down to at most four pixels per side, which double the
    channels up to four times `width`, then a linear layer.
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
    """Wraps a network of maps such that it can be called with labels, which it ignores."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, maps: Tensor, labels: Tensor | None) -> Tensor:  # noqa: ARG002 - the same call with or without
        """Apply the network to maps (n, c, h, w)."""
        judged: Tensor = self.network(maps)
        return judged


class Labelled(nn.Module):
    """A network of maps and labels; an embedding of the label is appended as a channel (Mirza & Osindero, 2014).

    As in the attack SDAR.

    Args:
        network: Takes maps with the additional channel.
        classes: Number of classes.
        size: (h, w) of the maps.

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
        """Apply the network to maps (n, c, h, w) with labels int64 (n,)."""
        plane = self.embedding(labels).view(-1, 1, *self.size)
        judged: Tensor = self.network(torch.cat([maps, plane], dim=1))
        return judged
