"""Colours put right: what a decoder gets wrong on average can be seen without a single pair of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mocosfl_priv.inversion.colour_reflection import undo_reflection
from mocosfl_priv.inversion.confidence import confidence, explained, trust


class ColourMatch:
    """Moves colours by the first two moments of what a decoder makes of foreign and of familiar smashed data.

    foreign: images decoded from clients' data; familiar: from the attacker's own, float (n, 3, h, w) each, of
    images that are distributed alike. truth: the images behind `familiar`. Contrast is only ever lowered: what
    differs more than it should is not to be believed. trust: in [0, 1], lowers it further. A decoder that sees nothing
    in clients' data (all its foreign images are one), or that is not trusted at all, thus ends at the mean colour of
    the attacker's images, the blind guess.
    """

    def __init__(self, foreign: Tensor, familiar: Tensor, truth: Tensor, trust: float = 1.0) -> None:
        self._from, spread = _moments(foreign)
        _, usual = _moments(familiar)
        self._to, _ = _moments(truth)
        self._gain = trust * (usual / spread.clamp(min=1e-6)).clamp(max=1)

    def __call__(self, images: Tensor) -> Tensor:
        """Images float (n, 3, h, w) in [0, 1], from such images."""
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
    """What a decoder makes of clients' messages, moved towards the mean image as far as it is not to be trusted.

    `decode` learned on what `encode` and the defense make of the attacker's images. A client's message is decoded well
    only where `encode` would send that message for the decoded image, too.

    Args:
        encode: images (n, 3, h, w) in [0, 1] to smashed data.
        protect: the defense's transformation.
        decode: smashed data to images.
        views: float (m, 3, h, w) in [0, 1], images of the attacker's own.
        foreign: smashed data of clients, whose decoded colours should be usual; may be `smashed` itself.
        smashed: float (n, *smashed_shape), what is decoded.
        steps: as many as may be spent on finding out whether colours are reflected.
        rng: on the CPU.

    Returns:
        Float (n, 3, h, w) in [0, 1].

    >>> images, rng = torch.rand(32, 3, 8, 8), torch.Generator().manual_seed(0)
    >>> same = torch.nn.Identity()
    >>> believable(same, same, same, images, images[:4], images[:4], range(2), rng).shape
    torch.Size([4, 3, 8, 8])
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
    """Different rows, drawn from torch's global generator.

    Args:
        rows: how many there are.
        most: how many are wanted.
        device: of the result.

    Returns:
        Int64 (min(rows, most),), each in [0, rows).

    >>> len(sample(10, 4, torch.device("cpu")))
    4
    """
    return torch.randperm(rows)[:most].to(device)
