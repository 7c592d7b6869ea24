"""Layers that all backbones share. None uses BatchNorm by default, since a micro-batch may be a single image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.config import NormName
from mocosfl_priv.models.convolution import convolve, standardise
from mocosfl_priv.models.normalisation import GroupNorm

CHANNELS_PER_GROUP = 4


class WeightStandardisedConv2d(nn.Conv2d):
    """A convolution without bias whose filters are standardised to mean 0 and standard deviation 1, with Bessel's
    correction (weight standardisation, Qiao et al., 2019).
    """

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, standardise(self.weight), self.stride[0], int(self.padding[0]), self.groups)


@dataclass(frozen=True)
class LayerOptions:
    """The norms and convolutions that a backbone is built from; the defaults are those of the MocoSFL paper.

    norm: group (GroupNorm with four channels per group), layer (one group), instance (one channel per group) or batch.
    weight_standardisation: whether convolutions standardise their filters.
    """

    norm: NormName = "group"
    weight_standardisation: bool = True

    def conv(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
        """Build a convolution without bias, padded so that only the stride changes height and width."""
        kind = WeightStandardisedConv2d if self.weight_standardisation else nn.Conv2d
        return kind(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)

    def normalisation(self, channels: int) -> nn.Module:
        """Build the norm for `channels` channels, a multiple of four."""
        if self.norm == "batch":
            return nn.BatchNorm2d(channels)
        groups = {"group": channels // CHANNELS_PER_GROUP, "layer": 1, "instance": channels}[self.norm]
        return GroupNorm(groups, channels)


class Residual(nn.Module):
    """Base class of blocks with a shortcut, which :func:`drop_shortcuts` can remove."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut: nn.Module | None = None

    def join(self, branch: Tensor, x: Tensor) -> Tensor:
        """Return `branch` plus the shortcut of `x`; only `branch` if the block has no shortcut."""
        return branch if self.shortcut is None else branch + self.shortcut(x)


def drop_shortcuts(units: Sequence[nn.Module]) -> None:
    """Remove the shortcut of every residual block in `units`, in place."""
    for unit in units:
        for module in unit.modules():
            if isinstance(module, Residual):
                module.shortcut = None


class Normalise(nn.Module):
    """Normalise images (n, 3, h, w) in [0, 1] with a mean and a standard deviation per colour; has no parameters.

    It is the first layer of the client, so everything outside the client works on images in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class GlobalAveragePool(nn.Module):
    """Average over all pixels: (n, c, h, w) to (n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
