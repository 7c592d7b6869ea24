"""Noise on messages, and clipping, which bounds a message so that noise of a given scale can hide it."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-24  # messages of smaller size count as zero
SMALLEST_DRAW = 2.0**-24  # resolution of uniform random numbers in float32


def clip_rms(smashed: Tensor, bound: float) -> Tensor:
    """Scale each message down, where it is larger, to a root mean square of `bound`; differentiable.

    Args:
        smashed: float (n, ...).
        bound: positive.

    Returns:
        Float (n, ...).

    >>> clip_rms(torch.full((1, 4), 8.0), bound=2.0)
    tensor([[2., 2., 2., 2.]])
    """
    return _clipped(smashed, smashed.flatten(1).square().mean(1).clamp(min=SMALLEST).sqrt(), bound)


def clip_mean_magnitude(smashed: Tensor, bound: float) -> Tensor:
    """Scale each message down, where it is larger, to a mean absolute value of `bound`; differentiable.

    Args:
        smashed: float (n, ...).
        bound: positive.

    Returns:
        Float (n, ...).

    >>> clip_mean_magnitude(torch.tensor([[1.0, 3.0]]), bound=1.0)
    tensor([[0.5000, 1.5000]])
    """
    return _clipped(smashed, smashed.flatten(1).abs().mean(1).clamp(min=SMALLEST), bound)


def gaussian_like(smashed: Tensor, rng: torch.Generator) -> Tensor:
    """Gaussian noise of mean 0 and deviation 1, independent for every element.

    Args:
        smashed: decides shape, dtype and device.
        rng: on the device of `smashed`.

    Returns:
        Noise of the shape of `smashed`.

    >>> gaussian_like(torch.zeros(2, 3), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3])
    """
    return torch.randn(smashed.shape, generator=rng, device=smashed.device, dtype=smashed.dtype)


def laplace_like(smashed: Tensor, rng: torch.Generator) -> Tensor:
    """Laplace noise of location 0 and scale 1, independent for every element.

    Args:
        smashed: decides shape, dtype and device.
        rng: on the device of `smashed`.

    Returns:
        Noise of the shape of `smashed`.

    >>> laplace_like(torch.zeros(2, 3), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3])
    """
    # by the inverse of the distribution function, four times as fast as torch's exponential draws
    centred = torch.rand(smashed.shape, generator=rng, device=smashed.device, dtype=smashed.dtype) - 0.5
    return -centred.sign() * torch.log1p(
        (-2 * centred.abs()).clamp(min=-1 + SMALLEST_DRAW)
    )  # clamped since a draw may be 0


def _clipped(smashed: Tensor, size: Tensor, bound: float) -> Tensor:
    # callers clamp `size` away from zero, where roots and quotients have no gradient
    return smashed * (bound / size).clamp(max=1).view(-1, *[1] * (smashed.dim() - 1))
