"""rMLE: regularised maximum-likelihood estimation of the images, white box (He et al., ACSAC 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import Attack, AttackerView, Budget, Capability
from mocosfl_priv.evaluation.image_metrics import mse
from mocosfl_priv.seeding import derive_seed

TV_LADDER = (1e-3, 1e-2, 1e-1, 1.0)
TV_WITHOUT_AUXILIARY_DATA = 1e-2
TRIAL_IMAGES = 32
TRIAL_SHARE = 0.4  # of a limited time: the victims get the rest


class RmleAttack(Attack):
    """Optimise the images until the client, with its defense, would send what the victims sent.

    Minimises |f(x) - z|^2 / |z|^2 + tv * TV(x) + l2 * |x - 1/2|^2 (means over elements) with AMSGrad and a cosine
    schedule, all victims in one batch. A randomised defense is drawn afresh in every iteration. Of several starts,
    each image keeps the one with the lowest objective; the true images are never consulted.

    iterations: per start. tv: weight of the total variation; left out, the attacker tries a ladder of weights on
    images of its own, where it has some, and takes the best. parametrisation: x = sigmoid(w), or x = w clamped to
    [0, 1] after every iteration.
    """

    needs = frozenset({Capability.CLIENT_WEIGHTS})
    optional = frozenset({Capability.AUXILIARY_DATA})

    def __init__(
        self,
        iterations: Annotated[int, Field(ge=1)] = 500,
        learning_rate: Annotated[float, Field(gt=0)] = 0.1,
        tv: Annotated[float, Field(ge=0)] | None = None,
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
        rng = torch.Generator().manual_seed(derive_seed(seed, "rmle"))
        may_try = view.has(Capability.AUXILIARY_DATA) and len(view.auxiliary) > 0
        ladder = TV_LADDER if self.tv is None and may_try else ()
        steps = budget.iterate((len(ladder) + self.starts) * self.iterations)
        tv = TV_WITHOUT_AUXILIARY_DATA if self.tv is None else self.tv
        if ladder:
            tv = self._best_on_own_images(view, ladder, budget.until(steps, TRIAL_SHARE), rng)
        best = view.smashed.new_full((len(view.smashed), *view.image_shape), 0.5)
        best_objective = view.smashed.new_full((len(view.smashed),), math.inf)
        for start in range(self.starts):
            images = self._optimise(view, view.smashed, tv, steps, None if start == 0 else rng)
            with torch.no_grad():
                objective = self._objective(view, images, view.smashed, tv)
            better = objective < best_objective
            best[better], best_objective[better] = images[better], objective[better]
        return best

    def _best_on_own_images(
        self, view: AttackerView, ladder: tuple[float, ...], steps: Iterator[int], rng: torch.Generator
    ) -> float:
        """The total-variation weight that reconstructs a few auxiliary images best, of the target if it has such."""
        candidates = view.auxiliary.nearest_images
        chosen = torch.randperm(len(candidates), generator=rng)[:TRIAL_IMAGES]
        own = candidates[chosen.to(candidates.device)]
        with torch.no_grad():
            smashed = view.protect(view.client(own))
        errors = {tv: float(mse(self._optimise(view, smashed, tv, steps, None), own).mean()) for tv in ladder}
        return min(errors, key=lambda tv: errors[tv])

    def _optimise(
        self, view: AttackerView, smashed: Tensor, tv: float, steps: Iterator[int], start: torch.Generator | None
    ) -> Tensor:
        """One run of the optimiser, from mid-grey, or from noise around it where `start` is given."""
        free = smashed.new_zeros((len(smashed), *view.image_shape))
        if start is not None:
            free = torch.randn(free.shape, generator=start).to(free)
        sigmoid = self.parametrisation == "sigmoid"
        free = (free if sigmoid else 0.5 + 0.2 * free).requires_grad_(True)
        optimiser = torch.optim.Adam([free], lr=self.learning_rate, amsgrad=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.iterations)
        for _, _step in zip(range(self.iterations), steps, strict=False):
            optimiser.zero_grad(set_to_none=True)
            images = free.sigmoid() if sigmoid else free
            self._objective(view, images, smashed, tv).sum().backward()
            optimiser.step()
            schedule.step()
            if not sigmoid:
                with torch.no_grad():
                    free.clamp_(0, 1)
        return (free.sigmoid() if sigmoid else free).detach()

    def _objective(self, view: AttackerView, images: Tensor, smashed: Tensor, tv: float) -> Tensor:
        """The objective of every image, (n,)."""
        scale = smashed.square().mean().clamp(min=1e-12)
        distance = (view.protect(view.client(images)) - smashed).square().flatten(1).mean(1) / scale
        vertical = (images[:, :, 1:] - images[:, :, :-1]).abs().flatten(1).mean(1)
        horizontal = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().flatten(1).mean(1)
        prior = (images - 0.5).square().flatten(1).mean(1)
        return distance + tv * (vertical + horizontal) + self.l2 * prior
