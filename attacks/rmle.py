"""rMLE: regularised maximum-likelihood estimation of the images, white box (He et al., ACSAC 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import Attack, AttackerView, Budget, Capability
from mocosfl_priv.seeding import derive_seed


class RmleAttack(Attack):
    """Optimise the images until the client, with its defense, would send what the victims sent.

    Minimises |f(x) - z|^2 / |z|^2 + tv * TV(x) + l2 * |x - 1/2|^2 (means over elements) with AMSGrad and a cosine
    schedule, all victims in one batch. A randomised defense is drawn afresh in every iteration. Of several starts,
    each image keeps the one with the lowest objective; the true images are never consulted.

    iterations: per start. parametrisation: x = sigmoid(w), or x = w clamped to [0, 1] after every iteration.
    """

    needs = frozenset({Capability.CLIENT_WEIGHTS})

    def __init__(
        self,
        iterations: Annotated[int, Field(ge=1)] = 500,
        learning_rate: Annotated[float, Field(gt=0)] = 0.05,
        tv: Annotated[float, Field(ge=0)] = 1e-3,
        l2: Annotated[float, Field(ge=0)] = 0.0,
        starts: Annotated[int, Field(ge=1)] = 1,
        parametrisation: Literal["sigmoid", "clamp"] = "clamp",
    ) -> None:
        self.iterations = iterations
        self.learning_rate = learning_rate
        self.tv = tv
        self.l2 = l2
        self.starts = starts
        self.parametrisation = parametrisation

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        n = len(view.smashed)
        scale = float(view.smashed.square().mean().clamp(min=1e-12))
        best = view.smashed.new_full((n, *view.image_shape), 0.5)
        best_objective = view.smashed.new_full((n,), math.inf)
        steps = iter(budget.iterate(self.starts * self.iterations))
        for start in range(self.starts):
            images = self._one_start(view, scale, steps, derive_seed(seed, "rmle", start), mid_grey=start == 0)
            with torch.no_grad():
                objective = self._objective(view, images, scale)
            better = objective < best_objective
            best[better], best_objective[better] = images[better], objective[better]
        return best

    def _one_start(
        self, view: AttackerView, scale: float, steps: Iterator[int], seed: int, mid_grey: bool
    ) -> Tensor:
        """From mid-grey for the first start, from noise around it for the others."""
        noise = torch.randn(
            (len(view.smashed), *view.image_shape), generator=torch.Generator().manual_seed(seed)
        ).to(view.smashed.device)
        sigmoid = self.parametrisation == "sigmoid"
        free = torch.zeros_like(noise) if mid_grey else noise
        free = free if sigmoid else 0.5 + 0.2 * free
        free.requires_grad_(True)
        optimiser = torch.optim.Adam([free], lr=self.learning_rate, amsgrad=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.iterations)
        for _, _step in zip(range(self.iterations), steps, strict=False):
            images = free.sigmoid() if sigmoid else free
            optimiser.zero_grad(set_to_none=True)
            self._objective(view, images, scale).sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            if not sigmoid:
                with torch.no_grad():
                    free.clamp_(0, 1)
        return (free.sigmoid() if sigmoid else free).detach()

    def _objective(self, view: AttackerView, images: Tensor, scale: float) -> Tensor:
        """The objective of every image, (n,)."""
        distance = (view.protect(view.client(images)) - view.smashed).square().flatten(1).mean(1) / scale
        vertical = (images[:, :, 1:] - images[:, :, :-1]).abs().flatten(1).mean(1)
        horizontal = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().flatten(1).mean(1)
        prior = (images - 0.5).square().flatten(1).mean(1)
        return distance + self.tv * (vertical + horizontal) + self.l2 * prior
