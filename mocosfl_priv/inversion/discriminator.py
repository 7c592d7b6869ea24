"""Critics and discriminators of smashed data or images, with or without labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SMALLEST_SIDE = 4


def build_critic(shape: Sequence[int], width: int = 16, scores: int = 1) -> nn.Module:
    """A network that scores maps.

    It has no norms, as Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017,
    ask for: a convolution, then halvings down to four pixels, the channels doubling up to four times the width.

    Args:
        shape: (c, h, w) of the maps.
        width: channels of the first layer.
        scores: numbers per map.

    Returns:
        A module from (n, *shape) to (n, scores), higher for maps that look more real.

    >>> build_critic((4, 8, 8), width=8)(torch.rand(2, 4, 8, 8)).shape
    torch.Size([2, 1])
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
    """A network of maps, called with labels that it ignores.

    Args:
        network: from maps (n, c, h, w).

    >>> Unlabelled(nn.Flatten())(torch.rand(2, 1, 2, 2), None).shape
    torch.Size([2, 4])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, maps: Tensor, labels: Tensor | None) -> Tensor:  # noqa: ARG002 - the same call with or without
        """Apply the network to maps (n, c, h, w)."""
        judged: Tensor = self.network(maps)
        return judged


class Labelled(nn.Module):
    """A network of maps and their labels, which join the maps as one more channel.

    After Mirza and Osindero, "Conditional Generative Adversarial Nets", 2014, as used by SDAR.

    Args:
        network: for maps (n, c + 1, h, w).
        classes: how many labels there are.
        size: (h, w) of the maps.

    >>> Labelled(nn.Flatten(), classes=10, size=(2, 2))(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 9])).shape
    torch.Size([3, 8])
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
