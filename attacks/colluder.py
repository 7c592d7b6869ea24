"""Colluder attack: invert the victim's client with another participant's copy of it (ResSFL, Li et al., CVPR 2022)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import Attack, AttackerView, Budget, Capability
from mocosfl_priv.models.decoder import check_grammar
from mocosfl_priv.seeding import derive_seed
from mocosfl_priv.surrogate import DecoderTraining, invert_through, split_auxiliary


class ColluderAttack(Attack):
    """Train a decoder on messages of the colluding participant's client, and decode the victim's with it.

    Right after a synchronisation both have the same client, and this is the decoder attack. The more they learned
    since, and the less alike their images are, the further apart are the two; the victim's messages are then given
    the colluder's mean and deviation per channel, if the colluder's client explains the decoded images better so.
    The defense, where the attacker knows it, is passed with fresh randomness in every step (the adaptive attack).

    Parameters as of the decoder attack.
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
    ) -> None:
        check_grammar(architecture)
        self.training = DecoderTraining(architecture, epochs, batch_size, learning_rate, ssim_weight, shift)

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(derive_seed(seed, "colluder"))
        train, validation = split_auxiliary(view.auxiliary, rng)
        colluder = view.colluder

        def send(images: Tensor) -> Tensor:
            return view.protect(colluder(images))

        steps = budget.iterate(self.training.steps(len(train)))
        return invert_through(send, view.smashed, train, validation, self.training, steps, view.compute, rng)
