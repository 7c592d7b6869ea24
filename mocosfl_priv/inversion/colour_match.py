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
