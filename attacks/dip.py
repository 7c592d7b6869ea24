"""Likelihood maximisation with a deep image prior, white box (DISCO, Singh et al., CVPR 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import Attack, AttackerView, Budget, Capability, derive_seed
from mocosfl_priv.inversion import StackedSkipNetworks

SMALLEST_MAP = 4  # pixels a side at the bottom of the hourglass
JUDGED_EVERY = 10


class DipAttack(Attack):
    """Optimise the weights of one untrained skip network per victim until the client would send what was sent.

    Minimises |f(G(noise)) - z|^2 / |z|^2 over the weights of G (Ulyanov et al., CVPR 2018): the network's structure is
    the prior, and no data is needed. The fixed input noise is perturbed anew in every iteration, ever less; a
    randomised defense is drawn afresh. What is returned is not a single output but a running mean of the late ones,
    which removes much of what the network fits last, the noise; of these means each image keeps the one of the lowest
    objective. Where the defense is randomised, the objective counts only as far as it exceeds what two answers to the
    same image differ by: a mean that comes closer fits the randomness (Morozov's discrepancy principle).

    iterations: per victim. learning_rate: Adam's, of the networks' weights. channels: of the network, a multiple of
    four. scales: of the hourglass, fewer for images that would become smaller than four pixels. perturbation: of the
    unit input noise at the start, annealed linearly to zero. averaging: decay of the running mean. networks_at_once:
    bounds the memory.
    """

    searches_by_gradient = True
    needs = frozenset({Capability.CLIENT_WEIGHTS})

    def __init__(
        self,
        iterations: Annotated[int, Field(ge=1)] = 500,
        learning_rate: Annotated[float, Field(gt=0)] = 0.01,
        channels: Annotated[int, Field(ge=4, multiple_of=4)] = 32,
        scales: Annotated[int, Field(ge=0)] = 3,
        perturbation: Annotated[float, Field(ge=0)] = 1.0,
        averaging: Annotated[float, Field(ge=0, lt=1)] = 0.95,
        networks_at_once: Annotated[int, Field(ge=1)] = 32,
    ) -> None:
        self.iterations = iterations
        self.learning_rate = learning_rate
        self.channels = channels
        self.scales = scales
        self.perturbation = perturbation
        self.averaging = averaging
        self.networks_at_once = networks_at_once

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        view.client  # noqa: B018 - refused here, not after the time for the first step ran out
        rng = torch.Generator().manual_seed(derive_seed(seed, "dip"))
        chunks = view.smashed.split(self.networks_at_once)
        steps = budget.iterate(len(chunks) * self.iterations)
        images = [
            self._optimise(view, smashed, budget.until(islice(steps, self.iterations), number / len(chunks)), rng)
            for number, smashed in enumerate(chunks, start=1)
        ]
        return torch.cat(images)

    def _optimise(self, view: AttackerView, smashed: Tensor, steps: Iterator[int], rng: torch.Generator) -> Tensor:
        """The best running mean of every victim of one chunk; mid-grey without a single step."""
        scale = view.smashed.square().mean().clamp(min=1e-12)
        colours, height, width = view.image_shape
        networks = StackedSkipNetworks(
            len(smashed), self.channels, _fitting_scales(self.scales, height, width), smashed.device, colours
        )
        noise = torch.randn((len(smashed), self.channels, height, width), generator=rng).to(smashed.device)
        optimiser = torch.optim.Adam(networks.parameters, lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.iterations)
        average = smashed.new_full((len(smashed), *view.image_shape), 0.5)
        best, best_excess = average.clone(), smashed.new_full((len(smashed),), math.inf)
        for step, _ in enumerate(steps):
            strength = self.perturbation * (1 - step / self.iterations)
            shaken = noise + strength * torch.randn(noise.shape, generator=rng).to(noise)
            images = networks(shaken)
            loss = (view.protect(view.client(images)) - smashed).square().flatten(1).mean(1) / scale
            optimiser.zero_grad(set_to_none=True)
            loss.sum().backward()
            optimiser.step()
            schedule.step()
            average = torch.lerp(images.detach(), average, min(self.averaging, step / (step + 10)))
            if step % JUDGED_EVERY == JUDGED_EVERY - 1:
                excess = _excess_distance(view, average, smashed)
                better = excess < best_excess
                best[better], best_excess[better] = average[better], excess[better]
        return best


@torch.no_grad()
def _excess_distance(view: AttackerView, images: Tensor, smashed: Tensor) -> Tensor:
    """The feature distance of every image beyond that of two answers to it, at least zero: (n,)."""
    plain = view.client(images)
    answer, other = view.protect(plain), view.protect(plain)
    distance, randomness = ((answer - z).square().flatten(1).mean(1) for z in (smashed, other))
    return (distance - randomness).clamp(min=0)


def _fitting_scales(scales: int, height: int, width: int) -> int:
    """At most `scales` halvings that divide both sides and leave `SMALLEST_MAP` pixels."""
    possible = 0
    while possible < scales and all(
        side % 2 ** (possible + 1) == 0 and side // 2 ** (possible + 1) >= SMALLEST_MAP for side in (height, width)
    ):
        possible += 1
    return possible
