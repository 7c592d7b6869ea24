"""The best predictor that ignores the smashed data: the null every attack is read against."""

from __future__ import annotations

from torch import Tensor

from mocosfl_priv import Attack, AttackerView, Budget, Capability, blind_guess


class Floor(Attack):
    """Guess the mean image of the auxiliary data for every victim; mid-grey without auxiliary data.

    Of the auxiliary images, those of the target distribution are used where there are enough.
    """

    optional = frozenset({Capability.AUXILIARY_DATA})
    blind = True

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        return blind_guess(view)
