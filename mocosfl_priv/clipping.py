"""Bounds on what one message can contribute, without which noise has no meaning relative to it."""

from __future__ import annotations

from torch import Tensor


def clip_rms(smashed: Tensor, bound: float) -> Tensor:
    """Each message (n, ...) scaled down, where it is larger, to root mean square `bound`; differentiable."""
    size = smashed.flatten(1).square().mean(1).clamp(min=1e-24).sqrt()  # sqrt has no gradient at zero
    return smashed * (bound / size).clamp(max=1).view(-1, *[1] * (smashed.dim() - 1))
