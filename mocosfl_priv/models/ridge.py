"""Ridge regression from tensors to tensors, for many more numbers than examples."""

from __future__ import annotations

import torch
from torch import Tensor


class Ridge:
    """The affine map with the least squared error on examples plus a penalty on its weights, in closed form.

    inputs: (n, ...). targets: (n, ...). Solved in its dual: the weights are combinations of the n examples, so the cost
    grows with their number and not with that of the weights.
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self._targets = targets
        self._mean, self._target_mean = inputs.mean(0), targets.mean(0)
        self._examples = (inputs - self._mean).flatten(1)
        self._gram = (self._examples @ self._examples.mT).double()

    def __call__(self, inputs: Tensor, strength: float) -> Tensor:
        """Targets (m, ...) for inputs (m, ...).

        strength: of the penalty, positive, in units of the examples' mean squared distance from their mean; the
        constant is not penalised.
        """
        penalty = strength * self._gram.diagonal().mean().clamp(min=1e-12)
        away = (self._targets - self._target_mean).flatten(1).double()
        dual = torch.linalg.solve(self._gram + penalty * torch.eye(len(self._gram)).to(self._gram), away)
        similar = (inputs - self._mean).flatten(1) @ self._examples.mT
        return self._target_mean + (similar @ dual.to(similar.dtype)).view(-1, *self._targets.shape[1:])
