"""How far a decoder that was learned on one client's messages is to be believed about another's.

A decoder for a wrong client gives wrong images, not vague ones. What it says is to be drawn towards what a blind guess
says, as far as it does not explain the messages.
"""

from __future__ import annotations

from torch import Tensor

DEAD = 1e-6  # a deviation below this is a channel that says nothing


def explained(maps: Tensor, by: Tensor) -> float:
    """Share of the variance of maps (n, c, ...) that `by`, of the same shape, explains; per channel, then averaged, so
    that loud channels do not decide alone; in [0, 1], 0 for maps that are all alike.
    """
    axes = [0, *range(2, maps.dim())]
    variance = maps.var(axes)
    alive = variance > DEAD**2
    if not bool(alive.any()):
        return 0.0
    error = (by - maps).square().mean(axes)
    # a channel of fine detail, which no decoder restores, must not outweigh those that are explained
    return float((1 - error[alive] / variance[alive]).clamp(min=0).mean())


def confidence(theirs: float, own: float) -> float:
    """In [0, 1]: what is explained of foreign messages, relative to what is of messages whose images are known."""
    return min(1.0, theirs / own) if own > 0 else 0.0


def trust(sure: float, decoded: Tensor, images: Tensor, guess: Tensor) -> float:
    """The share in [0, 1] of its distance from `guess` that a reconstruction of foreign messages may keep.

    sure: :func:`confidence`. decoded: of own messages about known `images`, (n, 3, h, w). guess: what is said without
    any message. A decoder that has learned nothing, or has overfitted, is not to be believed about its own messages,
    even less about others. Squared confidence: a wrong client explains a part, too, by what all natural images share.
    """
    away, wanted = decoded - guess, images - guess
    share = (away * wanted).sum() / away.square().sum().clamp(min=1e-12)
    return sure**2 * float(share.clamp(0, 1))
