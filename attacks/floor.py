"""The best predictor that ignores the smashed data: the null every attack is read against."""

from __future__ import annotations

from torch import Tensor

from mocosfl_priv import Attack, AttackerView, Budget, Capability
from mocosfl_priv.evaluation.floor import mean_image


class Floor(Attack):
    """Guess the mean image of the auxiliary data for every victim; mid-grey without auxiliary data.

    Of the auxiliary images, those of the target distribution are used where there are any.
    """

    optional = frozenset({Capability.AUXILIARY_DATA})
    blind = True

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        guess = view.smashed.new_full(view.image_shape, 0.5)
        if view.has(Capability.AUXILIARY_DATA) and len(view.auxiliary):
            auxiliary = view.auxiliary
            known = auxiliary.images[auxiliary.of_target] if bool(auxiliary.of_target.any()) else auxiliary.images
            guess = mean_image(known)
        return guess.expand(len(view.smashed), *view.image_shape).clone()
