"""How credible the reconstructions of a decoder are if it was trained on the messages of another client.

A decoder for the wrong client returns wrong images, not blurred ones. Its results are therefore drawn towards a blind
guess by as much as they fail to explain the messages.
"""

from __future__ import annotations

from torch import Tensor

from mocosfl_priv.inversion.arrangement import channel_axes

DEAD = 1e-6  # channels with a smaller standard deviation carry no information


def explained(maps: Tensor, by: Tensor) -> float:
    """Return the share of the variance of `maps` (n, c, ...) that `by`, of the same shape, explains; in [0, 1].

    It is averaged over channels, so that channels with large values do not dominate; 0 if all maps are equal. Of tokens
    (n, t, d), what all messages have in common at a place is no variance. A single message of tokens or of a vector has
    none.
    """
    if maps.dim() == 3:
        common = maps.mean(0, keepdim=True)
        maps, by = maps - common, by - common
    axes = channel_axes(maps)
    variance = maps.var(axes)
    alive = variance > DEAD**2
    if not bool(alive.any()):
        return 0.0
    error = (by - maps).square().mean(axes)
    # negative values are clamped: a channel of fine detail, which no decoder restores, must not outweigh the others
    return float((1 - error[alive] / variance[alive]).clamp(min=0).mean())


def confidence(theirs: float, own: float) -> float:
    """Return the share explained of foreign messages relative to that of messages with known images, in [0, 1]."""
    return min(1.0, theirs / own) if own > 0 else 0.0


def trust(sure: float, decoded: Tensor, images: Tensor, guess: Tensor) -> float:
    """Return the factor in [0, 1] by which the difference of a reconstruction from `guess` is to be multiplied.

    It is the squared confidence times how well the decoder does on own messages. The confidence is squared because even
    a wrong client explains a part, by what all natural images have in common.

    Args:
        sure: From :func:`confidence`.
        decoded: Reconstructions (n, 3, h, w) from own messages.
        images: The originals of `decoded`.
        guess: The blind guess.

    """
    away, wanted = decoded - guess, images - guess
    share = (away * wanted).sum() / away.square().sum().clamp(min=1e-12)
    return sure**2 * float(share.clamp(0, 1))
