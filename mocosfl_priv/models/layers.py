"""Layers every backbone is made of. By default no BatchNorm anywhere: a micro-batch of one image must train."""

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
    """A convolution without bias whose filters have zero mean and unit (unbiased) deviation (Qiao et al., 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, standardise(self.weight), self.stride[0], int(self.padding[0]), self.groups)


@dataclass(frozen=True)
class LayerOptions:
    """Which norms and convolutions a backbone is built from; the defaults are the paper's.

    norm: group (four channels a group), layer (one group), instance (one channel a group) or batch.
    weight_standardisation: whether convolutions standardise their filters.
    """

    norm: NormName = "group"
    weight_standardisation: bool = True

    def conv(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
        """A convolution without bias that keeps the size up to its stride."""
        kind = WeightStandardisedConv2d if self.weight_standardisation else nn.Conv2d
        return kind(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)

    def normalisation(self, channels: int) -> nn.Module:
        """The norm over `channels`, a multiple of four."""
        if self.norm == "batch":
            return nn.BatchNorm2d(channels)
        groups = {"group": channels // CHANNELS_PER_GROUP, "layer": 1, "instance": channels}[self.norm]
        return GroupNorm(groups, channels)


class Residual(nn.Module):
    """A unit or block whose branches run beside a shortcut, which :func:`drop_shortcuts` can take away."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut: nn.Module | None = None

    def join(self, branch: Tensor, x: Tensor) -> Tensor:
        """`branch` plus the shortcut of `x`, where there is one."""
        return branch if self.shortcut is None else branch + self.shortcut(x)


def drop_shortcuts(units: Sequence[nn.Module]) -> None:
    """Take the shortcut of every residual block in `units` away, in place."""
    for unit in units:
        for module in unit.modules():
            if isinstance(module, Residual):
                module.shortcut = None


class Normalise(nn.Module):
    """Images in [0, 1] to zero mean and unit deviation per colour; part of the client, without parameters."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class GlobalAveragePool(nn.Module):
    """(n, c, h, w) to (n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
