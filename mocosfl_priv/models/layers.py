"""Layers every backbone is made of. No BatchNorm anywhere: a micro-batch of one image must train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.models.convolution import convolve, standardise

CHANNELS_PER_GROUP = 4


class WeightStandardisedConv2d(nn.Conv2d):
    """A convolution without bias whose filters have zero mean and unit (unbiased) deviation (Qiao et al., 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, standardise(self.weight), self.stride[0], int(self.padding[0]), self.groups)


def conv(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> WeightStandardisedConv2d:
    """A weight-standardised convolution without bias that keeps the size up to its stride."""
    return WeightStandardisedConv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)


from mocosfl_priv.models.normalisation import GroupNorm


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with four channels a group."""
    return GroupNorm(channels // CHANNELS_PER_GROUP, channels)


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
