"""MID: messages with a limited rate of information (Wang et al., AAAI 2021).

"Improving Robustness to Model Inversion Attacks via Mutual Information Regularization",
https://arxiv.org/abs/2009.05241
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import DefenderContext, Defense, MessageKind, PreparedModel
from mocosfl_priv.defending import gaussian_like
from mocosfl_priv.plugins import load_optimiser_state, optimiser_state, under, within

SMALLEST, LARGEST = -12.0, 8.0  # of the logarithm of a variance


class MutualInformation(Defense):
    """A variational information bottleneck at the cut: learned noise, and a price for every nat that a message tells.

    A message is drawn from N(smashed, sigma^2), with a variance of its own for every element (channel and position).
    The loss grows by beta times the mean divergence of its elements from N(0, 1), an upper bound on what messages tell
    about images (Alemi et al., ICLR 2017, "Deep Variational Information Bottleneck",
    https://arxiv.org/abs/1612.00410). Clients learn the means, and the variances are learned along with them, from the
    gradients that return: where the server can do without an element, its mean goes to 0 and its variance to 1.

    The papers' variance is a second output of the client and differs from image to image. Here it depends on the
    element only, so that every client model can be one. All clients share the variances, which take a step in every
    pass, as if theirs were averaged in every step (that traffic is not counted); an adaptive attacker knows them.

    beta: weight of the divergence, in nats per element, beside the contrastive loss. initial: deviation of the noise at
    the start. learning_rate: Adam's, of the logarithms of variances. sigma: refused; it belonged to the former `mid`,
    whose deviation was given, and which is now `gaussian_l2`.
    """

    randomised = True

    def __init__(
        self,
        beta: Annotated[float, Field(ge=0)] = 0.1,
        initial: Annotated[float, Field(gt=0)] = 0.1,
        learning_rate: Annotated[float, Field(gt=0)] = 0.01,
        sigma: float | None = None,
    ) -> None:
        if sigma is not None:
            raise ValueError(
                "sigma: mid learns its deviation now, from `initial` on; with a given one it is called gaussian_l2"
            )
        self.beta = beta
        self.initial = initial
        self.learning_rate = learning_rate

    def prepare(self, context: DefenderContext) -> PreparedModel | None:
        shape = context.build_model().smashed_shape
        self._log_variance = torch.full(shape, 2 * math.log(self.initial), device=context.compute.device)
        self._optimiser = torch.optim.Adam([self._log_variance], lr=self.learning_rate)
        self._rows = context.queries_per_step
        return None

    @property
    def deviation(self) -> Tensor:
        """Of the noise, for each element; shape `smashed_shape`."""
        return (self._log_variance / 2).exp()

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        return self.beta * divergence(smashed, self._log_variance)

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        drawn = gaussian_like(smashed, rng)
        if kind is MessageKind.QUERY:
            self._drawn = drawn  # what the gradient that returns for these messages is about
        return smashed + self.deviation * drawn

    @torch.no_grad()
    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        """One step of the variances: what they cost the task by `gradient`, what they save of the divergence."""
        cost = (gradient * self._drawn).sum(0) * self.deviation / 2
        share = len(gradient) / self._rows
        saved = self.beta * share * (1 - self._log_variance.exp()) / (2 * self._log_variance.numel())
        self._log_variance.grad = cost - saved
        self._optimiser.step()
        self._log_variance.clamp_(SMALLEST, LARGEST)
        return gradient

    def state(self) -> dict[str, Tensor]:
        return {"log_variance": self._log_variance, **under("adam", optimiser_state(self._optimiser))}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._log_variance.copy_(state["log_variance"])
        load_optimiser_state(self._optimiser, within(state, "adam"))


def divergence(means: Tensor, log_variance: Tensor) -> Tensor:
    """Of N(means, exp(log_variance)) from N(0, 1) in nats, averaged over elements; scalar, differentiable in both.

    means: (n, *shape). log_variance: (*shape,).
    """
    return (means.square() + log_variance.exp() - 1 - log_variance).mean() / 2
