"""Ridge regression in closed form: in its dual for few examples of large tensors, and for convolution weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCHES_AT_A_TIME = 1 << 14  # in memory


class Ridge:
    """Ridge regression in closed form: the affine map with the least squared error plus a penalty on its weights.

    Solved in its dual: the weights are combinations of the n examples, so the cost grows with their number and not with
    that of the weights.

    Args:
        inputs: float (n, ...).
        targets: float (n, ...).

    >>> inputs = torch.tensor([[0.0], [1.0], [2.0]])
    >>> Ridge(inputs, 2 * inputs)(torch.tensor([[3.0]]), strength=1e-6).round(decimals=3)
    tensor([[6.]])
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self._targets = targets
        self._mean, self._target_mean = inputs.mean(0), targets.mean(0)
        self._examples = (inputs - self._mean).flatten(1)
        self._gram = (self._examples @ self._examples.mT).double()

    def __call__(self, inputs: Tensor, strength: float) -> Tensor:
        """Predict targets.

        Args:
            inputs: float (m, ...), shaped like the examples.
            strength: of the penalty, positive, in units of the examples' mean squared distance from their mean; the
                constant is not penalised.

        Returns:
            Float (m, ...), shaped like the targets.
        """
        dual = self._dual(strength)
        similar = (inputs - self._mean).flatten(1) @ self._examples.mT
        return self._target_mean + (similar @ dual.to(similar.dtype)).view(-1, *self._targets.shape[1:])

    def affine(self, strength: float) -> tuple[Tensor, Tensor]:
        """The map itself.

        Args:
            strength: as in a call.

        Returns:
            Weights float (numbers of a target, numbers of an input), and a constant float (numbers of a target,).
        """
        weight = self._dual(strength).to(self._examples.dtype).mT @ self._examples
        return weight, self._target_mean.flatten() - weight @ self._mean.flatten()

    def _dual(self, strength: float) -> Tensor:
        """Weights of the examples, double (n, numbers of a target)."""
        penalty = strength * self._gram.diagonal().mean().clamp(min=1e-12)
        away = (self._targets - self._target_mean).flatten(1).double()
        return torch.linalg.solve(self._gram + penalty * torch.eye(len(self._gram)).to(self._gram), away)


@torch.no_grad()
def fit_convolution(convolution: nn.Conv2d, maps: Tensor, targets: Tensor, strength: float) -> None:
    """Give `convolution` the weights and bias with the least squared error plus a penalty on the weights.

    maps: (n, c, h, w), its inputs. targets: (n, d, h', w'), what it should give. strength: of the penalty, positive, in
    units of the mean square of a number in a patch; the bias is not penalised. Solved by the normal equations, since
    there are usually many more patches than numbers in one. `convolution` has no groups and pads with zeros.
    """
    assert not isinstance(convolution.padding, str) and convolution.bias is not None
    assert convolution.groups == 1 and convolution.padding_mode == "zeros"
    numbers = convolution.weight[0].numel()
    gram = torch.zeros(numbers + 1, numbers + 1, dtype=torch.float64, device=maps.device)
    wanted = gram.new_zeros(numbers + 1, targets.shape[1])
    at_a_time = max(1, PATCHES_AT_A_TIME // targets[0, 0].numel())
    for some, answers in zip(maps.split(at_a_time), targets.split(at_a_time), strict=True):
        seen = F.unfold(some, convolution.kernel_size, convolution.dilation, convolution.padding, convolution.stride)
        rows = F.pad(seen, (0, 0, 0, 1), value=1.0).transpose(1, 2).flatten(0, 1)
        gram += (rows.T @ rows).double()
        wanted += (rows.T @ answers.flatten(2).transpose(1, 2).flatten(0, 1)).double()
    penalty = torch.full_like(gram[0], strength * float(gram.diagonal()[:-1].mean().clamp(min=1e-12)))
    penalty[-1] = 0.0
    found = torch.linalg.solve(gram + penalty.diag(), wanted).to(convolution.weight.dtype)
    convolution.weight.copy_(found[:-1].T.reshape(convolution.weight.shape))
    convolution.bias.copy_(found[-1])
