"""Shadow attack: a client of the attacker's own, trained against the server's frozen half (He et al., ACSAC 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mocosfl_priv import Attack, AttackerView, Budget, Capability, MessageEncoder, Recipe, derive_seed
from mocosfl_priv.inversion import (
    FitTarget,
    KnownImages,
    MomentFit,
    check_architecture,
    check_own_decoder,
    fit_best,
    in_batches,
    invert_through,
    moco_v2_view,
    moments,
    redrawn,
)

FIT_SHARE = 0.5  # of a limited time: the decoder gets the rest


class ShadowAttack(Attack):
    """Train a shadow of the client without asking it anything, and a decoder through the shadow.

    The paper's query-free attack needs labels; here the server was trained without, and so is the shadow: behind it,
    the frozen server must recognise two views of an auxiliary image among those of others (InfoNCE within the batch),
    and the shadow's messages must have the moments of the victims', which the server receives anyway. Both are asked of
    images of the target distribution, where the attacker has enough of them. The decoder learns from all, and passes
    the defense, where the attacker knows it, with fresh randomness in every step (the adaptive attack). Moments hardly
    tell which way round colours are; that is seen on the reconstructions, too.

    starts: shadows that are tried, from weights of their own; the one whose messages have the victims' moments best
    goes on, and only that one is asked for contrast. iterations, fit_batch, fit_rate: steps of all of them, images of a
    step and learning rate. contrast: weight of InfoNCE beside the moments. temperature: of InfoNCE.
    architecture: of the decoder, in the decoder grammar. epochs: its passes over the auxiliary images.
    batch_size, learning_rate: of the decoder's training. ssim_weight: its loss is MSE + ssim_weight * (1 - SSIM).
    shift: auxiliary images are shifted by up to so many pixels.
    """

    needs = frozenset({Capability.ARCHITECTURE, Capability.AUXILIARY_DATA, Capability.SERVER_MODEL})

    def __init__(
        self,
        architecture: str = "unet_N2C32",
        epochs: Annotated[int, Field(ge=1)] = 30,
        batch_size: Annotated[int, Field(ge=1)] = 32,
        learning_rate: Annotated[float, Field(gt=0)] = 2e-3,
        ssim_weight: Annotated[float, Field(ge=0)] = 0.0,
        shift: Annotated[int, Field(ge=0)] = 4,
        starts: Annotated[int, Field(ge=1)] = 12,
        iterations: Annotated[int, Field(ge=1)] = 4000,
        fit_batch: Annotated[int, Field(ge=2)] = 48,
        fit_rate: Annotated[float, Field(gt=0)] = 0.1,
        contrast: Annotated[float, Field(ge=0)] = 1.0,
        temperature: Annotated[float, Field(gt=0)] = 0.2,
    ) -> None:
        check_architecture(architecture)
        self.architecture = architecture
        self.epochs = epochs
        self.recipe = Recipe(1, batch_size, learning_rate, ssim_weight=ssim_weight, shift=shift)
        self.fit = MomentFit(iterations, fit_batch, fit_rate)
        self.starts = starts
        self.contrast = contrast
        self.temperature = temperature

    def check(self, smashed_shape: Sequence[int], image_shape: Sequence[int]) -> None:
        check_own_decoder(self.architecture, smashed_shape, image_shape)

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(derive_seed(seed, "shadow"))
        views_rng = torch.Generator(device=view.compute.device).manual_seed(derive_seed(seed, "shadow", "views"))
        known = KnownImages.of(view.auxiliary, rng)
        server = view.server

        def contrast(shadow: nn.Module, images: Tensor) -> Tensor:
            pair = torch.cat([moco_v2_view(images, views_rng), moco_v2_view(images, views_rng)])
            first, second = F.normalize(server(view.protect(shadow(pair))).float(), dim=1).chunk(2)
            logits = first @ second.T / self.temperature
            own = torch.arange(len(images), device=images.device)
            return self.contrast * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

        shadows = [redrawn(view.untrained_client(), rng) for _ in range(self.starts)]
        further = contrast if self.contrast else None
        likeness = FitTarget(moments(view.smashed), known.draw(rng), view.protect, further, view.image_shape[0])
        shadow = fit_best(shadows, likeness, self.fit, budget.share(FIT_SHARE))
        shadow.requires_grad_(False)
        sender = MessageEncoder(in_batches(shadow), view.protect)
        recipe = self.recipe.passing(self.epochs, len(known.train))
        return invert_through(
            sender, view.smashed, known, self.architecture, recipe, budget.share(1.0), view.compute, rng,
            right_way_round=False,
        ).images  # fmt: skip
