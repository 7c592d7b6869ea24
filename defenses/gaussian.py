"""Gaussian noise with clipping: the Gaussian mechanism on every message."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import Defense, MessageKind
from mocosfl_priv.defending import clip_rms, gaussian_like


class GaussianNoise(Defense):
    """Clip each message to root-mean-square `clip`, then add N(0, (sigma * clip)^2) to every element.

    Clipping bounds what one image can contribute, so that the noise has a meaning relative to it; without it a
    client could learn to shout over the noise. With d elements per message the L2 norm is bounded by clip * sqrt(d)
    and two messages differ by at most twice that, so a message satisfies the Gaussian mechanism with noise
    multiplier sigma / (2 sqrt(d)). At the sigma where images stay useful that is no meaningful epsilon, and none is
    claimed.

    sigma: noise deviation in units of `clip`. clip: bound on the root mean square of a message's elements.
    """

    randomised = True

    def __init__(self, sigma: Annotated[float, Field(ge=0)] = 0.5, clip: Annotated[float, Field(gt=0)] = 1.0) -> None:
        self.sigma = sigma
        self.clip = clip

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        return clip_rms(smashed, self.clip) + self.sigma * self.clip * gaussian_like(smashed, rng)
