"""Correct the colours of reconstructions, by statistics that need no pairs of victims and reconstructions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mocosfl_priv.inversion.colour_reflection import undo_reflection
from mocosfl_priv.inversion.confidence import confidence, explained, trust


class ColourMatch:
    """Corrects mean and contrast of colours, by those of images decoded from foreign and from own smashed data.

    Contrast is only ever lowered, since reconstructions with more contrast than usual are not credible. If all foreign
    images are equal, or `trust` is 0, the result is the mean colour of `truth`, the blind guess.

    Args:
        foreign: Images decoded from clients' smashed data, float (n, 3, h, w).
        familiar: Images decoded from the attacker's own smashed data; the originals are distributed alike.
        truth: The originals of `familiar`.
        trust: In [0, 1]; factor by which contrast is lowered further.

    """

    def __init__(self, foreign: Tensor, familiar: Tensor, truth: Tensor, trust: float = 1.0) -> None:
        self._from, spread = _moments(foreign)
        _, usual = _moments(familiar)
        self._to, _ = _moments(truth)
        self._gain = trust * (usual / spread.clamp(min=1e-6)).clamp(max=1)

    def __call__(self, images: Tensor) -> Tensor:
        """Return corrected images; both are float (n, 3, h, w) in [0, 1]."""
        return (self._to + self._gain * (images - self._from)).clamp(0, 1)


def believable(
    encode: Callable[[Tensor], Tensor],
    protect: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    views: Tensor,
    foreign: Tensor,
    smashed: Tensor,
    steps: Iterable[int],
    rng: torch.Generator,
) -> Tensor:
    """Decode clients' `smashed` data, corrected by how credible the result is; returns images (n, 3, h, w) in [0, 1].

    `decode` was trained on messages that `encode` and the defense make of the attacker's images. A reconstruction is
    credible only if `encode` would make the clients' message from it. Less credible ones are drawn to the mean colour.

    Args:
        encode: The attacker's model of the client.
        protect: The defense.
        decode: The inversion network.
        views: The attacker's own images.
        foreign: Further smashed data of the clients for the statistics of colours, or `smashed` itself.
        smashed: What to decode.
        steps: Steps to spend on the question whether colours are reflected; see `undo_reflection`.
        rng: Source of randomness.

    """
    familiar = protect(encode(views))
    decoded, guess = decode(familiar).clamp(0, 1), decode(smashed).clamp(0, 1)
    sure = confidence(explained(smashed, encode(guess)), explained(familiar, encode(decoded)))
    share = trust(sure, decoded, views, views.mean((0, 2, 3), keepdim=True))
    further = guess[:0] if foreign is smashed else decode(foreign).clamp(0, 1)
    right = undo_reflection(torch.cat([guess, further]), decoded, views, steps, rng)
    guess, further = right[: len(guess)], right[len(guess) :]
    return ColourMatch(further if len(further) else guess, decoded, views, share)(guess)


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    axes = (0, 2, 3)
    return images.mean(axes, keepdim=True), images.std(axes, keepdim=True, unbiased=False)


def sample(rows: int, most: int, device: torch.device) -> Tensor:
    """Draw distinct row indices from torch's global generator; returns int64 (min(rows, most),)."""
    return torch.randperm(rows)[:most].to(device)
