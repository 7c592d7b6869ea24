"""Colluder attack: invert the victim's client with another participant's copy of it (ResSFL, Li et al., CVPR 2022)."""

from __future__ import annotations

import copy
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mocosfl_priv import Attack, AttackerView, Budget, Capability
from mocosfl_priv.models.decoder import check_grammar
from mocosfl_priv.seeding import derive_seed
from mocosfl_priv.surrogate import DecoderTraining, Inversion, KnownImages, MomentFit, fit_moments, invert_through

FIT_BATCH = 48
TRUSTED = 0.9  # of a copy that explains the victim's messages so well relative to its own: that clients agree


class ColluderAttack(Attack):
    """Train a decoder on messages of the colluding participant's client, and decode the victim's with it.

    Right after a synchronisation both have the same client, and this is the decoder attack. The more they learned
    since, and the less alike their images are, the further apart are the two. Where the copy does not explain the
    victim's messages, it is first fitted to their moments: both clients come from the same average, so that the fit
    has little to find. The defense, where the attacker knows it, is passed with fresh randomness in every step
    (the adaptive attack).

    iterations, fit_rate: steps and learning rate of that fit. The others are as of the decoder attack.
    """

    needs = frozenset({Capability.COLLUDING_CLIENT, Capability.AUXILIARY_DATA})

    def __init__(
        self,
        architecture: str = "res_normN4C64",
        epochs: Annotated[int, Field(ge=1)] = 30,
        batch_size: Annotated[int, Field(ge=1)] = 32,
        learning_rate: Annotated[float, Field(gt=0)] = 5e-3,
        ssim_weight: Annotated[float, Field(ge=0)] = 0.1,
        shift: Annotated[int, Field(ge=0)] = 4,
        iterations: Annotated[int, Field(ge=1)] = 300,
        fit_rate: Annotated[float, Field(gt=0)] = 1e-2,
    ) -> None:
        check_grammar(architecture)
        self.training = DecoderTraining(architecture, epochs, batch_size, learning_rate, ssim_weight, shift)
        self.fit = MomentFit(iterations, FIT_BATCH, fit_rate)

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(derive_seed(seed, "colluder"))
        known = KnownImages.of(view.auxiliary, rng)
        steps = budget.iterate(2 * self.training.steps(len(known.train)) + self.fit.iterations)

        def invert(client: nn.Module) -> Inversion:
            return invert_through(
                lambda images: view.protect(client(images)),
                view.smashed, known, self.training, steps, view.compute, rng,
            )  # fmt: skip

        as_held = invert(view.colluder)
        if as_held.confidence >= TRUSTED or budget.exhausted:
            return as_held.images
        fitted = copy.deepcopy(view.colluder).requires_grad_(True)
        fit_moments(fitted, view.protect, view.smashed, known.train, self.fit, steps, rng)
        return max((as_held, invert(fitted.requires_grad_(False))), key=lambda inversion: inversion.explained).images
