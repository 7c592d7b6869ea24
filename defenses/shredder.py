"""Shredder: noise whose distribution is learned (Mireshghallah et al., ASPLOS 2020)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.distributions import Laplace

from mocosfl_priv import DefenderContext, Defense, MessageKind, PreparedModel
from mocosfl_priv.defending import clip_rms, laplace_like
from mocosfl_priv.plugins import load_optimiser_state, optimiser_state, under, within

SMALLEST, LARGEST = -6.0, 4.0  # of the logarithm of a scale


class Shredder(Defense):
    """Laplace noise with a location and a scale of its own for every element of a message, as loud as the task allows.

    The paper learns noise for a finished network. Here it is learned along with the clients, from the gradients that
    return to them: the loss falls by `reward` for every e-fold of the scales' geometric mean, so that noise grows
    where the server can do without the element. Messages are clipped first, lest clients outshout it. All clients
    share the distribution, which takes a step in every pass (that traffic is not counted), and an adaptive attacker
    knows it.

    reward: of louder noise, beside the contrastive loss. initial: scale of the noise at the start. clip: bound on the
    root mean square of a message's elements. learning_rate: Adam's, of locations and logarithms of scales.
    """

    randomised = True

    def __init__(
        self,
        reward: Annotated[float, Field(ge=0)] = 0.1,
        initial: Annotated[float, Field(gt=0)] = 0.1,
        clip: Annotated[float, Field(gt=0)] = 1.0,
        learning_rate: Annotated[float, Field(gt=0)] = 0.01,
    ) -> None:
        self.reward = reward
        self.initial = initial
        self.clip = clip
        self.learning_rate = learning_rate

    def prepare(self, context: DefenderContext) -> PreparedModel | None:
        shape, device = context.build_model().smashed_shape, context.compute.device
        self._location = torch.zeros(shape, device=device)
        self._log_scale = torch.full(shape, self.initial, device=device).log()
        self._optimiser = torch.optim.Adam([self._location, self._log_scale], lr=self.learning_rate)
        self._rows = context.queries_per_step  # whose gradients return in a step
        return None

    @property
    def distribution(self) -> Laplace:
        """Of the noise; batch shape `smashed_shape`."""
        return Laplace(self._location, self._log_scale.exp())

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        drawn = laplace_like(smashed, rng)
        if kind is MessageKind.QUERY:
            self._drawn = drawn  # what the gradient that returns for these messages is about
        return clip_rms(smashed, self.clip) + self._location + self._log_scale.exp() * drawn

    @torch.no_grad()
    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        """One step of the noise: what it costs the task by `gradient`, what it earns by its size."""
        self._location.grad = gradient.sum(0)
        earned = self.reward * len(gradient) / self._rows / self._log_scale.numel()
        self._log_scale.grad = (gradient * self._drawn).sum(0) * self._log_scale.exp() - earned
        self._optimiser.step()
        self._log_scale.clamp_(SMALLEST, LARGEST)
        return gradient

    def state(self) -> dict[str, Tensor]:
        return {
            "location": self._location,
            "log_scale": self._log_scale,
            **under("adam", optimiser_state(self._optimiser)),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._location.copy_(state["location"])
        self._log_scale.copy_(state["log_scale"])
        load_optimiser_state(self._optimiser, within(state, "adam"))
