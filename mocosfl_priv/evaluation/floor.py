"""The no-information floor: how well one can guess victims without looking at their smashed data.

Two predictors ignore z: one constant colour, and the mean image of the target distribution. Both are estimated on
the clients' private images, never on the victims, and the better of the two is the floor. It is the null that every
reconstruction error is read against: leak ratio R = 1 - MSE / MSE_floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mocosfl_priv.evaluation.image_metrics import mse


def constant_colour(images: Tensor) -> Tensor:
    """The image (3, h, w) that shows the mean colour of images (n, 3, h, w) everywhere."""
    return images.mean((0, 2, 3)).view(3, 1, 1).expand(images.shape[1:]).contiguous()


def mean_image(images: Tensor) -> Tensor:
    """The pixelwise mean of images: the guess of an attacker that looks at no message.

    Args:
        images: float (n, 3, h, w), n at least 1.

    Returns:
        Float (3, h, w), in the range of `images`.

    >>> mean_image(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)).unique()
    tensor([0.5000])
    """
    return images.mean(0)


@dataclass(frozen=True)
class Floor:
    """The better blind guess and its error: `image` (3, h, w) in [0, 1], `mse` (n,) per victim."""

    kind: str
    image: Tensor
    mse: Tensor


def blind_guess_floor(known: Tensor, victims: Tensor) -> Floor:
    """The floor for `victims` from images of the same distribution; both float (n, 3, h, w) in [0, 1].

    Which of the two guesses is better is decided on `known` as well: each is estimated on the even images and
    compared on the odd ones. The guess itself then uses them all.
    """
    estimate, compare = known[::2], known[1::2] if len(known) > 1 else known
    guesses = {"constant colour": constant_colour, "mean image": mean_image}
    kind = min(guesses, key=lambda k: float(mse(guesses[k](estimate).expand_as(compare), compare).mean()))
    guess = guesses[kind](known)
    return Floor(kind, guess, mse(guess.expand_as(victims), victims))


def hindsight_floor(victims: Tensor) -> Tensor:
    """Errors (n,) of the one guess that is best for these very victims (n, 3, h, w), their own mean image.

    No guess of independent images that ignores the smashed data has a smaller mean error in the long run, whatever it
    knows of their distribution; so promises about any attacker start from it, and not from what one guess reached.
    """
    return mse(mean_image(victims).expand_as(victims), victims)


def leak_ratio(error: np.ndarray | Tensor, floor: np.ndarray | Tensor) -> float:
    """R = 1 - mean error / mean floor over the same victims; 1 is perfect reconstruction, <= 0 is no leak."""
    return 1.0 - float(torch.as_tensor(error).mean()) / float(torch.as_tensor(floor).mean())
