"""What a defense may promise of any attacker, in the unit that attacks are measured in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Guarantee:
    """A lower bound on the error of every attacker, whatever it computes and whatever else it knows of the system.

    Here: everything that the attacker saw of an image x, M(x), is (epsilon, delta)-differentially private in the local
    model, where any two images are neighbours. For a loss L in [0, 1], such as the MSE of images in [0, 1], and any
    other image x', this says of the attacker's reconstruction r

        E L(x, r(M(x))) >= exp(-epsilon) (E L(x, r(M(x'))) - delta),

    since L(x, r(.)) is a function of the output with values in [0, 1]. Draw x' without regard to x: then r(M(x')) is
    a blind guess, and the right side is at least exp(-epsilon) (blind - delta) with the error of the best one.

    A defense that promises another way (a Cramer-Rao bound, say) overrides `bound` and `claim`.

    messages: how many messages of an image the attacker saw.
    """

    epsilon: float
    delta: float
    messages: int

    @property
    def claim(self) -> str:
        """For people: what is promised, without the bound that follows."""
        return f"local DP, eps {self.epsilon:.3g}, delta {self.delta:.3g} for {count(self.messages)}"

    def bound(self, blind: np.ndarray) -> np.ndarray:
        """From the errors of the best blind guess, per image, terms whose mean no attacker's mean MSE is below.

        The single terms bound nothing: a guess may be right by chance. They may be negative.
        """
        return math.exp(-self.epsilon) * (blind - self.delta)

    def as_json(self) -> dict[str, Any]:
        """For run.json; an epsilon without end is None there."""
        epsilon = self.epsilon if math.isfinite(self.epsilon) else None
        return {"claim": self.claim, "epsilon": epsilon, "delta": self.delta, "messages": self.messages}


def count(messages: int) -> str:
    """`messages` in words."""
    return f"{messages} message{'s' if messages != 1 else ''}"
