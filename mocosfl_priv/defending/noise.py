"""Noise on messages, and the clipping without which noise has no meaning relative to what it hides."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-24  # below which a message counts as zero
SMALLEST_DRAW = 2.0**-24  # of a uniform one in float32, but for zero


def clip_rms(smashed: Tensor, bound: float) -> Tensor:
    """Each message (n, ...) scaled down, where it is larger, to root mean square `bound`; differentiable."""
    return _clipped(smashed, smashed.flatten(1).square().mean(1).clamp(min=SMALLEST).sqrt(), bound)


def clip_mean_magnitude(smashed: Tensor, bound: float) -> Tensor:
    """The same for the mean absolute value of a message's elements."""
    return _clipped(smashed, smashed.flatten(1).abs().mean(1).clamp(min=SMALLEST), bound)


def gaussian_like(smashed: Tensor, rng: torch.Generator) -> Tensor:
    """Gaussian noise of mean 0 and deviation 1, independent for every element."""
    return torch.randn(smashed.shape, generator=rng, device=smashed.device, dtype=smashed.dtype)


def laplace_like(smashed: Tensor, rng: torch.Generator) -> Tensor:
    """Laplace noise of location 0 and scale 1, independent for every element."""
    # by the inverse of the distribution function, four times as fast as torch's exponential draws
    centred = torch.rand(smashed.shape, generator=rng, device=smashed.device, dtype=smashed.dtype) - 0.5
    return -centred.sign() * torch.log1p((-2 * centred.abs()).clamp(min=-1 + SMALLEST_DRAW))  # a draw may be 0


def _clipped(smashed: Tensor, size: Tensor, bound: float) -> Tensor:
    # the size is clamped away from zero before roots and quotients, which have no gradient there
    return smashed * (bound / size).clamp(max=1).view(-1, *[1] * (smashed.dim() - 1))
