"""Colluder attack: invert the victim's client with another participant's copy of it (ResSFL, Li et al., CVPR 2022)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mocosfl_priv import Attack, AttackerView, Budget, Capability, MessageEncoder, Recipe, derive_seed
from mocosfl_priv.inversion import (
    FitTarget,
    Inversion,
    KnownImages,
    MomentFit,
    check_architecture,
    check_own_decoder,
    fit_moments,
    in_batches,
    invert_through,
    moments,
    moments_agree,
)

FIT_BATCH = 48
FIRST_SHARE, FIT_SHARE = 0.5, 0.2  # of what is left of a limited budget, for the first inversion and for the fit
TRUSTED = 0.9  # confidence from which on the colluder's copy is taken for the victim's, if moments agree too
TIE = 0.02  # of explained shares


class ColluderAttack(Attack):
    """Train a decoder on messages of the colluding participant's client, and decode the victim's with it.

    Right after a synchronisation both have the same client, and this is the decoder attack. The more they learned
    since, and the less alike their images are, the further apart are the two. Where the copy does not explain the
    victim's messages, or theirs have other moments, it is fitted to these: both clients come from the same average,
    so that the fit has little to find. The defense, where the attacker knows it, is passed with fresh randomness in
    every step (the adaptive attack).

    iterations, fit_rate: steps and learning rate of that fit.
    architecture: of the decoder, in the decoder grammar. epochs: its passes over the auxiliary images.
    batch_size, learning_rate: of the decoder's training. ssim_weight: its loss is MSE + ssim_weight * (1 - SSIM).
    shift: auxiliary images are shifted by up to so many pixels.
    """

    needs = frozenset({Capability.COLLUDING_CLIENT, Capability.AUXILIARY_DATA})

    def __init__(
        self,
        architecture: str = "unet_N2C32",
        epochs: Annotated[int, Field(ge=1)] = 30,
        batch_size: Annotated[int, Field(ge=1)] = 32,
        learning_rate: Annotated[float, Field(gt=0)] = 2e-3,
        ssim_weight: Annotated[float, Field(ge=0)] = 0.0,
        shift: Annotated[int, Field(ge=0)] = 4,
        iterations: Annotated[int, Field(ge=1)] = 300,
        fit_rate: Annotated[float, Field(gt=0)] = 1e-2,
    ) -> None:
        check_architecture(architecture)
        self.architecture = architecture
        self.epochs = epochs
        self.recipe = Recipe(1, batch_size, learning_rate, ssim_weight=ssim_weight, shift=shift)
        self.fit = MomentFit(iterations, FIT_BATCH, fit_rate)

    def check(self, smashed_shape: Sequence[int], image_shape: Sequence[int]) -> None:
        check_own_decoder(self.architecture, smashed_shape, image_shape)

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(derive_seed(seed, "colluder"))
        known = KnownImages.of(view.auxiliary, rng)
        recipe = self.recipe.passing(self.epochs, len(known.train))

        def invert(client: nn.Module, part: Budget) -> Inversion:
            sender = MessageEncoder(in_batches(client), view.protect)
            return invert_through(sender, view.smashed, known, self.architecture, recipe, part, view.compute, rng)

        held = view.colluder
        as_held = invert(held, budget.share(FIRST_SHARE))
        alike = moments_agree(MessageEncoder(in_batches(held), view.protect), view.smashed, known.nearest, rng)
        if (alike and as_held.confidence >= TRUSTED) or budget.exhausted:
            return as_held.images
        client = copy.deepcopy(held).requires_grad_(True)
        likeness = FitTarget(moments(view.smashed), known.draw(rng), view.protect)
        fit_moments(client, likeness, self.fit, budget.share(FIT_SHARE))
        fitted = invert(client.requires_grad_(False), budget.share(1.0))
        # Clients that lose nothing explain every message: then the moments have decided.
        return (fitted if fitted.explained > as_held.explained - TIE else as_held).images
