"""A distance between two sets of feature maps by their first two moments, which needs no trained critic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

OFFSETS = ((0, 0), (0, 1), (1, 0), (1, 1))  # offsets (down, right) between positions whose channels are correlated
CELLS = 4  # cells per side of the grid on which local means are compared
PLACES = 30.0  # weight of the local means: they are small compared with variances, but only they show the sign
QUIET = 1e-3  # lower limit for the variance of a channel, as a share of the mean variance


def moments(maps: Tensor) -> Tensor:
    """Return means of all channels, overall and per grid cell, and mean products of channels at neighbouring positions.

    maps: (n, c, h, w). The result has shape (1 + 2 k + 4 c, c) for k grid cells: the overall means; the means per cell,
    for each half of the maps; and a (c, c) block for each of `OFFSETS`. Results of several batches can be averaged.
    """
    count, channels, height, width = maps.shape
    parts = [maps.mean((0, 2, 3)).unsqueeze(0)]
    half = (count + 1) // 2
    halves = (maps[:half], maps[count - half :])
    parts += [F.adaptive_avg_pool2d(some.mean(0), CELLS).flatten(1).T for some in halves]
    for offset in OFFSETS:
        down, right = min(offset[0], height - 1), min(offset[1], width - 1)
        here, there = maps[:, :, : height - down, : width - right], maps[:, :, down:, right:]
        left, moved = (part.transpose(0, 1).reshape(channels, -1) for part in (here, there))
        parts.append(left @ moved.T / left.shape[1])
    return torch.cat(parts)


def moment_distance(some: Tensor, others: Tensor) -> Tensor:
    """Return the squared distance per channel between two results of :func:`moments`, a scalar.

    It is in units of the standard deviations of `others`, so that channels with large values do not dominate.
    Covariances, also those of neighbouring positions, tell filters and their orientations apart, but not a filter from
    its negative. Only the means per cell do that, since photographs are brighter at the top. In a batch these are
    mostly noise, so their part is the product of the differences in both halves, which is unbiased and can be negative.
    """
    (mean, places, covariances), (wanted_mean, wanted_places, wanted) = _parted(some), _parted(others)
    variance = wanted[0].diagonal()
    deviation = variance.clamp(min=max(float(QUIET * variance.mean()), 1e-12)).sqrt()
    first = ((mean - wanted_mean) / deviation).square().sum()
    second = ((covariances - wanted) / torch.outer(deviation, deviation)).square().sum()
    apart = (places - wanted_places.mean(0)) / deviation
    return (first + second) / len(mean) + PLACES * (apart[0] * apart[1]).mean()


def _parted(found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split a result of :func:`moments` into means (c,), means per cell (2, k, c) and covariances (offsets, c, c)."""
    mean, grid = found[0], 2 * CELLS**2
    products = found[1 + grid :].view(-1, len(mean), len(mean))
    return mean, found[1 : 1 + grid].view(2, -1, len(mean)), products - torch.outer(mean, mean)
