"""The floor: the error of guessing victims without looking at their smashed data.

There are two guesses: a constant colour, and the mean image of the target distribution. Both are estimated on the
clients' private images, never on the victims, and the better one is the floor. Every reconstruction error is compared
with it by the leak ratio R = 1 - MSE / MSE_floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mocosfl_priv.evaluation.image_metrics import mse


def constant_colour(images: Tensor) -> Tensor:
    """Return the image (c, h, w) that is filled with the mean colour of images (n, c, h, w)."""
    return images.mean((0, 2, 3)).view(-1, 1, 1).expand(images.shape[1:]).contiguous()


def mean_image(images: Tensor) -> Tensor:
    """The pixelwise mean of images: the guess of an attacker that looks at no message.

    Args:
        images: float (n, c, h, w), n at least 1.

    Returns:
        Float (c, h, w), in the range of `images`.

    >>> mean_image(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)).unique()
    tensor([0.5000])
    """
    return images.mean(0)


@dataclass(frozen=True)
class Floor:
    """The better of the two blind guesses and its error.

    kind: "constant colour" or "mean image". image: (c, h, w) in [0, 1]. mse: (n,), per victim.
    """

    kind: str
    image: Tensor
    mse: Tensor


def blind_guess_floor(known: Tensor, victims: Tensor) -> Floor:
    """Compute the floor for `victims` from `known` images of the same distribution; both float (n, c, h, w) in [0, 1].

    The better guess is also chosen on `known`: each is estimated on every other image and compared on the rest. The
    chosen guess is then estimated on all of `known`.
    """
    estimate, compare = known[::2], known[1::2] if len(known) > 1 else known
    guesses = {"constant colour": constant_colour, "mean image": mean_image}
    kind = min(guesses, key=lambda k: float(mse(guesses[k](estimate).expand_as(compare), compare).mean()))
    guess = guesses[kind](known)
    return Floor(kind, guess, mse(guess.expand_as(victims), victims))


def hindsight_floor(victims: Tensor) -> Tensor:
    """Return the errors (n,) of the single guess that is best for exactly these victims (n, c, h, w): their mean image.

    For independent images, no guess that ignores the smashed data has a smaller expected mean error, whatever it knows
    of their distribution. Bounds that must hold for any attacker are therefore computed from this floor.
    """
    return mse(mean_image(victims).expand_as(victims), victims)


def leak_ratio(error: np.ndarray | Tensor, floor: np.ndarray | Tensor) -> float:
    """Return R = 1 - mean error / mean floor over the same victims; 1 is a perfect reconstruction, <= 0 is no leak."""
    return 1.0 - float(torch.as_tensor(error).mean()) / float(torch.as_tensor(floor).mean())
