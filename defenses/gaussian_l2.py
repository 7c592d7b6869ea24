"""Gaussian noise with a price for large messages: the information bottleneck whose variance is given, not learned."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import Defense, MessageKind
from mocosfl_priv.defending import gaussian_like


class GaussianL2(Defense):
    """Gaussian noise of a fixed deviation, and an L2 penalty that keeps messages from growing above the noise.

    A message is drawn from N(smashed, sigma^2), and the clients' loss grows by beta / 2 times the mean square of its
    elements. Up to a constant this is beta times the divergence from N(0, 1): the variational information bottleneck
    (Alemi et al., ICLR 2017, "Deep Variational Information Bottleneck", https://arxiv.org/abs/1612.00410) with a
    given variance. `mid` learns the variance.

    beta: weight of the penalty beside the contrastive loss. sigma: deviation of the noise.
    """

    randomised = True

    def __init__(self, beta: Annotated[float, Field(ge=0)] = 0.1, sigma: Annotated[float, Field(gt=0)] = 0.5) -> None:
        self.beta = beta
        self.sigma = sigma

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        return self.beta / 2 * smashed.square().mean()

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        return smashed + self.sigma * gaussian_like(smashed, rng)
