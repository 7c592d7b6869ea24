"""Ridge regression from tensors to tensors, for many more numbers than examples."""

from __future__ import annotations

import torch
from torch import Tensor


class Ridge:
    """The affine map with the least squared error on examples plus a penalty on its weights, in closed form.

    inputs: (n, ...). targets: (n, ...). strength: of the penalty, positive, in units of the inputs' mean squared
    distance from their mean; the constant is not penalised. Solved in its dual: the weights are combinations of the n
    examples, so the cost grows with their number and not with that of the weights.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, strength: float) -> None:
        self._shape = targets.shape[1:]
        self._mean, self._target_mean = inputs.mean(0), targets.mean(0)
        self._examples = (inputs - self._mean).flatten(1)
        gram = (self._examples @ self._examples.mT).double()
        penalty = strength * gram.diagonal().mean().clamp(min=1e-12)
        away = (targets - self._target_mean).flatten(1).double()
        solved = torch.linalg.solve(gram + penalty * torch.eye(len(gram)).to(gram), away)
        self._dual = solved.to(targets.dtype)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Targets (m, ...) for inputs (m, ...)."""
        similar = (inputs - self._mean).flatten(1) @ self._examples.mT
        return self._target_mean + (similar @ self._dual).view(-1, *self._shape)
