"""A small encoder that replaces the client, for attackers who do not know its architecture."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

WIDTH = 32


def build_pilot(image_shape: Sequence[int], smashed_shape: Sequence[int]) -> nn.Module:
    """A small encoder of an attacker that does not know the client's layers: convolutions that halve the maps.

    Args:
        image_shape: (3, h, w).
        smashed_shape: (c, h, w) of smashed data.

    Returns:
        A module from images (n, *image_shape) in [0, 1] to (n, *smashed_shape); its last layer is linear.

    >>> import torch
    >>> build_pilot((3, 16, 16), (8, 4, 4))(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 8, 4, 4])
    """
    layers: list[nn.Module] = [nn.Conv2d(image_shape[0], WIDTH, 3, padding=1), nn.LeakyReLU(0.2)]
    side = image_shape[1]
    while side > smashed_shape[1]:
        layers += [nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        side = -(-side // 2)
    return nn.Sequential(*layers, nn.Conv2d(WIDTH, smashed_shape[0], 3, padding=1))
