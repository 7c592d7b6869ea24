"""Laplace noise with clipping: the Laplace mechanism (Dwork et al., TCC 2006) on every message."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import Defense, MessageKind
from mocosfl_priv.defending import clip_mean_magnitude, laplace_like


class LaplaceNoise(Defense):
    """Clip each message to mean absolute value `clip`, then add Laplace(0, scale * clip) to every element.

    Laplace noise answers for distances in L1, so that is what clipping bounds: with d elements the L1 norm is at most
    clip * d, and two messages differ by at most twice that. A message so satisfies the Laplace mechanism with noise
    multiplier scale / (2 d). At the scale where images stay useful that is no meaningful epsilon, and none is claimed;
    `local_dp` is the defense that claims one.

    scale: of the noise, in units of `clip`; its deviation is sqrt(2) times that. clip: bound on the mean absolute
    value of a message's elements.
    """

    randomised = True

    def __init__(self, scale: Annotated[float, Field(ge=0)] = 0.35, clip: Annotated[float, Field(gt=0)] = 1.0) -> None:
        self.scale = scale
        self.clip = clip

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        return clip_mean_magnitude(smashed, self.clip) + self.scale * self.clip * laplace_like(smashed, rng)
