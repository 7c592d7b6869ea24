"""Inversion networks: smashed data back to images, by the grammar ``res_normN{N}C{C}`` / ``conv_normN{N}C{C}``.

Used by the decoder attack and by the simulated attacker of attacker-aware defenses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.errors import ConfigurationError

Norm = Callable[[int], nn.Module]
NormName = Literal["group", "batch"]

GRAMMAR = re.compile(r"(res|conv)_normN(\d+)C(\d+)")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with norms beside a shortcut that is left un-normalised.

    GroupNorm discards each image's own brightness and contrast; the plain shortcut keeps a path for them, without
    which even an invertible client could not be inverted exactly.
    """

    def __init__(self, in_channels: int, channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = norm(channels)
        self.shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.shortcut(x) + y


class ConvBlock(nn.Sequential):
    """Convolution, norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, norm: Norm) -> None:
        super().__init__(nn.Conv2d(in_channels, channels, 3, padding=1), norm(channels), nn.ReLU())


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 4 if channels % 4 == 0 else 1, channels)


NORMS: dict[NormName, Norm] = {"group": _group_norm, "batch": nn.BatchNorm2d}


def check_grammar(architecture: str) -> tuple[str, int, int]:
    """Kind, number of blocks and channels of `architecture`; ConfigurationError if it is not in the grammar."""
    match = GRAMMAR.fullmatch(architecture)
    if match is None or int(match[3]) < 1:
        raise ConfigurationError(
            f"decoder architecture {architecture!r} is not of the form res_normN<blocks>C<channels> or conv_norm..."
        )
    return match[1], int(match[2]), int(match[3])


def build_decoder(
    architecture: str, smashed_shape: Sequence[int], image_shape: Sequence[int], norm: NormName = "group"
) -> nn.Module:
    """A decoder from (n, *smashed_shape) to images (n, *image_shape) in (0, 1).

    A block to C channels, N blocks of C, transposed convolutions up to the image size, a block to the image's
    channels, a sigmoid; norms as named. Raises ConfigurationError where the sizes are no power of two apart.
    """
    kind, blocks, channels = check_grammar(architecture)
    block = ResidualBlock if kind == "res" else ConvBlock
    if len(smashed_shape) != 3 or len(image_shape) != 3:
        raise ConfigurationError(f"decoder: smashed data of shape {tuple(smashed_shape)} is not an image-like tensor")
    make_norm = NORMS[norm]
    layers: list[nn.Module] = [block(smashed_shape[0], channels, make_norm)]
    layers += [block(channels, channels, make_norm) for _ in range(blocks)]
    height, target = smashed_shape[1], image_shape[1]
    while height < target:
        layers += [nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1), nn.ReLU()]
        height *= 2
    if height != target:
        raise ConfigurationError(f"decoder: {smashed_shape[1]} pixels cannot be doubled to {target}")
    last = (
        ResidualBlock(channels, image_shape[0], make_norm)
        if kind == "res"
        else nn.Conv2d(channels, image_shape[0], 3, padding=1)
    )
    return nn.Sequential(*layers, last, nn.Sigmoid())
