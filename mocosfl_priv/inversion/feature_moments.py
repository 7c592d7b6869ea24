"""A distance between two sets of feature maps by their first two moments, which needs no trained critic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mocosfl_priv.inversion.arrangement import as_maps

OFFSETS = ((0, 0), (0, 1), (1, 0), (1, 1))  # offsets (down, right) between positions whose channels are correlated
CELLS = 4  # cells per side of the grid on which local means are compared
PLACES = 30.0  # weight of the local means: they are small compared with variances, but only they show the sign
QUIET = 1e-3  # lower limit for the variance of a channel, as a share of the mean variance


def moments(maps: Tensor) -> Tensor:
    """Return means of all channels, overall and per grid cell, and mean products of channels at neighbouring positions.

    Args:
        maps: float (n, c, h, w); tokens and vectors are arranged by :func:`as_maps`, tokens that are no square grid as
            a single column.

    Returns:
        Float (1 + 2 k + 4 c, c): the means; those of the k cells of a grid, for either half of the maps; then a (c, c)
        block for each of four offsets. The mean of two results is the result for the maps of both together.

    >>> moments(torch.rand(8, 4, 8, 8)).shape
    torch.Size([49, 4])
    """
    maps = as_maps(maps)
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
    """Squared distance between two results of :func:`moments`, per channel, in units of the deviations of `others`.

    Means say how loud channels are. Covariances, also those of neighbours, tell filters and their directions apart, but
    not a filter from its negative; only the means of places do, since photographs are lighter above. Those of a batch
    are mostly noise, so that part is the product of what either half says. It is right on average, and can be below
    zero.

    Args:
        some: a result of :func:`moments`.
        others: another one with as many channels.

    Returns:
        A scalar, differentiable in `some`.

    >>> maps = torch.rand(8, 4, 8, 8)
    >>> bool(moment_distance(moments(3 * maps), moments(maps)) > moment_distance(moments(maps), moments(maps)))
    True
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
