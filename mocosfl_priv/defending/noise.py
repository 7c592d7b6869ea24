"""Noise on messages, and clipping, which bounds a message so that noise of a given scale can hide it."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-24  # messages of smaller size count as zero
SMALLEST_DRAW = 2.0**-24  # resolution of uniform random numbers in float32


def clip_rms(smashed: Tensor, bound: float) -> Tensor:
    """Scale each message of `smashed` (n, ...) down to a root mean square of at most `bound`; differentiable."""
    return _clipped(smashed, smashed.flatten(1).square().mean(1).clamp(min=SMALLEST).sqrt(), bound)


def clip_mean_magnitude(smashed: Tensor, bound: float) -> Tensor:
    """Scale each message of `smashed` (n, ...) down to a mean absolute value of at most `bound`; differentiable."""
    return _clipped(smashed, smashed.flatten(1).abs().mean(1).clamp(min=SMALLEST), bound)


def gaussian_like(smashed: Tensor, rng: torch.Generator) -> Tensor:
    """Return standard normal noise of the shape of `smashed`, independent for every element."""
    return torch.randn(smashed.shape, generator=rng, device=smashed.device, dtype=smashed.dtype)


def laplace_like(smashed: Tensor, rng: torch.Generator) -> Tensor:
    """Return Laplace noise of location 0 and scale 1 of the shape of `smashed`, independent for every element."""
    # inverse transform sampling, four times as fast as torch's exponential distribution
    centred = torch.rand(smashed.shape, generator=rng, device=smashed.device, dtype=smashed.dtype) - 0.5
    return -centred.sign() * torch.log1p(
        (-2 * centred.abs()).clamp(min=-1 + SMALLEST_DRAW)
    )  # clamped since a draw may be 0


def _clipped(smashed: Tensor, size: Tensor, bound: float) -> Tensor:
    # callers clamp `size` away from zero, where roots and quotients have no gradient
    return smashed * (bound / size).clamp(max=1).view(-1, *[1] * (smashed.dim() - 1))
