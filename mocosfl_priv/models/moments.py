"""How alike two collections of maps are in their first two moments: a distance that needs no critic to be trained."""

from __future__ import annotations

import torch
from torch import Tensor

OFFSETS = ((0, 0), (0, 1), (1, 0))


def moments(maps: Tensor) -> Tensor:
    """Mean of every channel, and the second moments of all pairs of channels at neighbouring places.

    maps: (n, c, h, w). Returns (1 + 3 c, c): the means, then a (c, c) block for each of `OFFSETS`.
    """
    _, channels, height, width = maps.shape
    parts = [maps.mean((0, 2, 3)).unsqueeze(0)]
    for down, right in OFFSETS:
        here = maps[:, :, : height - min(down, height - 1), : width - min(right, width - 1)]
        there = maps[:, :, min(down, height - 1) :, min(right, width - 1) :]
        left, moved = (part.transpose(0, 1).reshape(channels, -1) for part in (here, there))
        parts.append(left @ moved.T / left.shape[1])
    return torch.cat(parts)


def moment_distance(some: Tensor, others: Tensor) -> Tensor:
    """Squared distance between two results of :func:`moments`, relative to the second; scalar >= 0."""
    first = (some[:1] - others[:1]).square().sum() / others[:1].square().sum().clamp(min=1e-8)
    second = (some[1:] - others[1:]).square().sum() / others[1:].square().sum().clamp(min=1e-8)
    return first + second


def explained(maps: Tensor, by: Tensor) -> float:
    """Share of the variance of maps (n, ...) that `by` (n, ...) explains; in [0, 1], 0 for maps that are all alike."""
    variance = (maps - maps.mean(0)).square().mean()
    if float(variance) < 1e-10:
        return 0.0
    return float((1 - (maps - by).square().mean() / variance).clamp(0, 1))
