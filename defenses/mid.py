"""MID: messages with a limited rate of information (Wang et al., AAAI 2021; Alemi et al., ICLR 2017)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import Defense, MessageKind
from mocosfl_priv.defending import gaussian_like


class MutualInformation(Defense):
    """A variational information bottleneck at the cut: noise, and a price for every nat that a message tells.

    A message is drawn from N(smashed, sigma^2), and the clients' loss grows by beta times its divergence from N(0, 1),
    an upper bound on what messages tell about images. The papers' bottleneck learns its variance, too, by a second
    output of the client; here it is given, so that every client model can be one: what is learned is how far means
    stand apart.

    beta: weight of the divergence, in nats per element, beside the contrastive loss. sigma: deviation of the noise.
    """

    randomised = True

    def __init__(self, beta: Annotated[float, Field(ge=0)] = 0.1, sigma: Annotated[float, Field(gt=0)] = 0.5) -> None:
        self.beta = beta
        self.sigma = sigma

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        return self.beta * divergence(smashed, self.sigma)

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        return smashed + self.sigma * gaussian_like(smashed, rng)


def divergence(means: Tensor, sigma: float) -> Tensor:
    """Of N(means, sigma^2) from N(0, 1) in nats, averaged over elements; scalar, differentiable in `means`."""
    return (means.square().mean() + sigma**2 - 1) / 2 - math.log(sigma)
