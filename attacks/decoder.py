"""Decoder attack: learn to invert the client from pairs of images and their smashed data (He et al., ACSAC 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import (
    Attack,
    AttackerView,
    AuxiliaryData,
    Budget,
    Capability,
    ConfigurationError,
    MessageEncoder,
    Recipe,
    build_decoder,
    derive_seed,
    held_out_split,
    load_lpips,
    mean_image,
    train_inverter,
)
from mocosfl_priv.inversion import NormName, batch_size_for, check_architecture, check_own_decoder

DEFAULT_STEPS = 3000

# The attack that published defenses were tested with (MocoSFL, ResSFL), by its public code: 1 % of CIFAR-10's training
# images from the augmenting loader, so mirrored and moved once and for all; nine tenths of them to train on; Adam, 50
# epochs.
PAPER: dict[str, Any] = {
    "architecture": "ressfl_N4C64",
    "norm": "batch",
    "target_images": 500,
    "source_images": 0,
    "epochs": 50,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "one_cycle": False,
    "standardise": False,
    "reuse": 50,
    "validations": 50,
}


class DecoderAttack(Attack):
    """Train a decoder on the attacker's auxiliary images, sent through the client and its defense.

    The smashed data is standardised per channel; auxiliary images are flipped and shifted; the defense is drawn anew in
    every step, so that a randomised one is met with fresh randomness (the adaptive attack). The step that is kept is
    chosen on auxiliary images held out from training, of the target distribution where the attacker has enough of it.
    A decoder that is no better there than the mean image is not used. The linear path of ``unet`` and ``edsr`` decoders
    begins as a ridge regression, in closed form, and the choice is between that and what follows.

    preset: ``paper`` changes the defaults of what follows to those of the published attack.
    architecture: the capacity ladder is conv_normN0C16, res_normN0C16, res_normN4C64, res_normN8C64, unet_N2C32,
    unet_N3C48, and ressfl_N4C64 is the published attack's; see `mocosfl_priv.inversion.decoders`.
    epochs: passes over the auxiliary images. steps: batches instead of epochs; 3000 if both are left out. batch_size:
    if left out 32, or less where time is limited and auxiliary images are few.
    learning_rate: peak of a one-cycle schedule, or Adam's constant one without `one_cycle`.
    ssim_weight, lpips_weight: loss = MSE + ssim_weight * (1 - SSIM) + lpips_weight * LPIPS.
    norm: of decoders that have norms. reuse: passes before images are augmented and encoded afresh.
    validations: how often the state is compared with the best so far. validation_share: of the auxiliary images, held
    out.
    one_cycle: whether the learning rate rises and falls once over the training. standardise: whether the smashed data
    is standardised per channel. flip: whether auxiliary images are mirrored at random. shift: they are shifted by up
    to so many pixels.
    target_images: use at most so many auxiliary images of the target distribution.
    source_images: use at most so many auxiliary images of the source.
    """

    needs = frozenset({Capability.QUERY, Capability.AUXILIARY_DATA})
    optional = frozenset({Capability.CLIENT_WEIGHTS})

    def __init__(
        self,
        preset: Literal["paper"] | None = None,
        architecture: str | None = None,
        epochs: Annotated[int, Field(ge=1)] | None = None,
        steps: Annotated[int, Field(ge=1)] | None = None,
        batch_size: Annotated[int, Field(ge=1)] | None = None,
        learning_rate: Annotated[float, Field(gt=0)] | None = None,
        one_cycle: bool | None = None,
        ssim_weight: Annotated[float, Field(ge=0)] = 0.0,
        lpips_weight: Annotated[float, Field(ge=0)] = 0.0,
        norm: NormName | None = None,
        standardise: bool | None = None,
        flip: bool | None = None,
        shift: Annotated[int, Field(ge=0)] | None = None,
        reuse: Annotated[int, Field(ge=1)] | None = None,
        validations: Annotated[int, Field(ge=1)] | None = None,
        validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        target_images: Annotated[int, Field(ge=0)] | None = None,
        source_images: Annotated[int, Field(ge=0)] | None = None,
    ) -> None:
        defaults = PAPER if preset == "paper" else {}
        self.architecture: str = _first(architecture, defaults.get("architecture"), "unet_N2C32")
        check_architecture(self.architecture)
        self.epochs: int | None = _first(epochs, defaults.get("epochs"))
        self.steps = steps
        self.batch_size: int | None = _first(batch_size, defaults.get("batch_size"))
        self.learning_rate: float = _first(learning_rate, defaults.get("learning_rate"), 2e-3)
        self.one_cycle: bool = _first(one_cycle, defaults.get("one_cycle"), True)
        self.ssim_weight = ssim_weight
        self.lpips_weight = lpips_weight
        self.norm: NormName = _first(norm, defaults.get("norm"), "group")
        self.standardise: bool = _first(standardise, defaults.get("standardise"), True)
        self.flip: bool = _first(flip, defaults.get("flip"), True)
        self.shift: int = _first(shift, defaults.get("shift"), 4)
        self.reuse: int = _first(reuse, defaults.get("reuse"), 4)
        self.validations: int = _first(validations, defaults.get("validations"), 10)
        self.validation_share = validation_share
        self.target_images: int | None = _first(target_images, defaults.get("target_images"))
        self.source_images: int | None = _first(source_images, defaults.get("source_images"))

    def check(self, smashed_shape: Sequence[int], image_shape: Sequence[int]) -> None:
        check_own_decoder(self.architecture, smashed_shape, image_shape)

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(derive_seed(seed, "decoder"))
        auxiliary = self.knowledge(view.auxiliary, rng)
        train, validation = held_out_split(auxiliary, self.validation_share, rng)
        lpips, note = load_lpips("alex") if self.lpips_weight else (None, "")
        if self.lpips_weight and lpips is None:
            raise ConfigurationError(f"lpips_weight: {note}")
        recipe = Recipe(
            steps=self.steps or DEFAULT_STEPS,
            batch_size=self.batch_size or batch_size_for(len(train), budget),
            learning_rate=self.learning_rate,
            one_cycle=self.one_cycle,
            ssim_weight=self.ssim_weight,
            lpips_weight=self.lpips_weight,
            flip=self.flip,
            shift=self.shift,
            reuse=self.reuse,
            validations=self.validations,
        )
        if self.epochs is not None and self.steps is None:
            recipe = recipe.passing(self.epochs, len(train))
        decoder = build_decoder(self.architecture, view.smashed.shape[1:], view.image_shape, self.norm)
        inverter = train_inverter(
            decoder, MessageEncoder.of(view), train.images, validation.images, recipe, budget, view.compute, rng,
            guess=mean_image(train.nearest_images), standardise=self.standardise, lpips=lpips,
        )  # fmt: skip
        return inverter(view.smashed)

    def knowledge(self, auxiliary: AuxiliaryData, rng: torch.Generator) -> AuxiliaryData:
        """As much of the auxiliary data as this attack is told to use, at random."""
        kept = []
        for of_target, most in ((True, self.target_images), (False, self.source_images)):
            mine = (auxiliary.of_target == of_target).nonzero().squeeze(1).cpu()
            kept.append(mine if most is None else mine[torch.randperm(len(mine), generator=rng)[:most]])
        return auxiliary.select(torch.cat(kept))


def _first(*values: Any) -> Any:
    """The first value that is given."""
    return next((value for value in values if value is not None), None)
