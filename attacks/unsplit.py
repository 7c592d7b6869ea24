"""UnSplit: invert and clone the client at once, from its architecture alone (Erdogan et al., WPES 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mocosfl_priv import Attack, AttackerView, Budget, Capability


class UnsplitAttack(Attack):
    """Coordinate descent on the images and on the weights of a clone of the client, without any data.

    The images start at mid-grey, the clone at freshly drawn weights. In turns, some steps of AMSGrad change the images
    to lower |clone(x) - z|^2 / |z|^2 + tv * TV(x) + l2 * |x - 1/2|^2 (means over elements, TV of squared differences
    as in the authors' code), and some change the clone to lower the distance alone. All victims share one clone, so
    each of them is evidence about it. The attacker does not know the weights and cannot simulate a defense.

    It is the weak anchor of the suite: nothing ties the images to the true ones but the layers' structure.

    iterations: turns, each of `image_steps` and `clone_steps`; the authors take 1000 turns of 100 and 100 for one
    image, with learning rates of 0.001. image_steps, clone_steps: steps of a turn that change the images, and the
    clone. image_learning_rate, clone_learning_rate: of these steps. tv: weight of the total variation.
    l2: weight of the distance to mid-grey.
    """

    needs = frozenset({Capability.ARCHITECTURE})

    def __init__(
        self,
        iterations: Annotated[int, Field(ge=1)] = 50,
        image_steps: Annotated[int, Field(ge=1)] = 20,
        clone_steps: Annotated[int, Field(ge=1)] = 20,
        image_learning_rate: Annotated[float, Field(gt=0)] = 0.01,
        clone_learning_rate: Annotated[float, Field(gt=0)] = 0.001,
        tv: Annotated[float, Field(ge=0)] = 0.1,
        l2: Annotated[float, Field(ge=0)] = 0.1,
    ) -> None:
        self.iterations = iterations
        self.image_steps = image_steps
        self.clone_steps = clone_steps
        self.image_learning_rate = image_learning_rate
        self.clone_learning_rate = clone_learning_rate
        self.tv = tv
        self.l2 = l2

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        clone = view.untrained_client().eval().requires_grad_(True)
        weights = list(clone.parameters())
        images = view.smashed.new_full((len(view.smashed), *view.image_shape), 0.5).requires_grad_(True)
        of_images = torch.optim.Adam([images], lr=self.image_learning_rate, amsgrad=True)
        # a client without parameters leaves nothing to clone
        of_clone = torch.optim.Adam(weights, lr=self.clone_learning_rate, amsgrad=True) if weights else None
        turn = self.image_steps + (self.clone_steps if weights else 0)
        steps = budget.iterate(self.iterations * turn)
        for _ in range(self.iterations):
            self._improve_images(view.smashed, clone, images, of_images, islice(steps, self.image_steps))
            if of_clone is not None:
                _improve_clone(view.smashed, clone, images, of_clone, islice(steps, self.clone_steps))
        return images.detach()

    def _improve_images(
        self, smashed: Tensor, clone: nn.Module, images: Tensor, optimiser: torch.optim.Optimizer, steps: Iterator[int]
    ) -> None:
        for _ in steps:
            loss = _distance(clone, images, smashed) + self.tv * _squared_variation(images)
            loss = loss + self.l2 * (images - 0.5).square().flatten(1).mean(1)
            # of the images alone: what reached the clone's weights would be left over for its own steps
            (images.grad,) = torch.autograd.grad(loss.sum(), [images])
            optimiser.step()
            with torch.no_grad():
                images.clamp_(0, 1)


def _improve_clone(
    smashed: Tensor, clone: nn.Module, images: Tensor, optimiser: torch.optim.Optimizer, steps: Iterator[int]
) -> None:
    for _ in steps:
        optimiser.zero_grad(set_to_none=True)
        _distance(clone, images.detach(), smashed).mean().backward()
        optimiser.step()


def _distance(clone: nn.Module, images: Tensor, smashed: Tensor) -> Tensor:
    """The relative feature distance of every image, (n,)."""
    scale = smashed.square().mean().clamp(min=1e-12)
    return F.mse_loss(clone(images), smashed, reduction="none").flatten(1).mean(1) / scale


def _squared_variation(images: Tensor) -> Tensor:
    """The mean squared difference of neighbours of every image, (n,)."""
    vertical = (images[:, :, 1:] - images[:, :, :-1]).square().flatten(1).mean(1)
    horizontal = (images[:, :, :, 1:] - images[:, :, :, :-1]).square().flatten(1).mean(1)
    return vertical + horizontal
