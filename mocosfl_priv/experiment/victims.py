"""Victims: the images whose smashed data an attacker holds, with the blind guess for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mocosfl_priv.evaluation.floor import Floor, blind_guess_floor, hindsight_floor
from mocosfl_priv.plugins.guarantee import Guarantee


@dataclass(frozen=True)
class VictimSet:
    """Images whose smashed data an attacker holds, under the name that results call them by.

    images: float (n, 3, h, w) in [0, 1]; only scoring reads them. groups: (n,) which images belong together.
    floor: the blind guess for them. origin: where they come from, `ROLES` or `RELEASE`.
    """

    name: str
    images: Tensor
    groups: Tensor
    floor: Floor
    origin: str

    @classmethod
    def of(cls, name: str, images: Tensor, origin: str, known: Tensor, groups: Tensor | None = None) -> VictimSet:
        """Victims with the floor of somebody who knows the images `known`, float (m, 3, h, w) in [0, 1].

        groups: (n,); None if every image stands for itself.
        """
        groups = torch.arange(len(images)) if groups is None else groups
        return cls(name, images, groups, blind_guess_floor(known, images), origin)

    def mse_lower_bound(self, guarantee: Guarantee) -> np.ndarray:
        """Terms (n,) of the mean MSE on these images that `guarantee` promises of any attacker."""
        return guarantee.bound(hindsight_floor(self.images).numpy())
