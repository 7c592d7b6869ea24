"""Detect and undo reflected colours, an ambiguity of surrogates that are fitted to second moments.

Reflecting colours along a principal axis keeps their mean and covariance. A surrogate that was fitted to moments may
therefore match the client for reflected images, and its decoder then returns colour negatives. A small network can
learn to tell photographs from their reflections.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from mocosfl_priv.inversion.discriminator import build_critic

JUDGE_STEPS = 300  # enough steps for the network to recognise reflections
BATCH = 16
LEARNING_RATE = 2e-3
CERTAIN = 2.0  # images are only changed if the evidence exceeds this number of standard errors


def signs_of(colours: int) -> tuple[tuple[float, ...], ...]:
    """Signs along the principal axes, in order of variance, of each reflection. The first one is the identity.

    At most two axes are reflected, those of the most variance: of three colours, that of the least is hardly visible.
    Grey images have one axis, and their reflection is the negative.
    """
    reflected = min(2, colours)
    return tuple((*[1.0] * (colours - reflected), *signs) for signs in product((1.0, -1.0), repeat=reflected))


class Reflections:
    """Reflections of colours about their mean, along the principal axes of `images` (n, c, h, w); see `signs_of`."""

    def __init__(self, images: Tensor) -> None:
        pixels = images.movedim(1, 3).reshape(-1, images.shape[1])
        self._mean = pixels.mean(0)
        axes = torch.linalg.eigh(torch.atleast_2d(torch.cov(pixels.T)).double())[1]
        self.signs = signs_of(images.shape[1])
        signs = torch.tensor(self.signs, dtype=torch.float64, device=images.device)
        self._matrices = torch.einsum("ij,rj,kj->rik", axes, signs, axes).to(images.dtype)

    def __call__(self, images: Tensor, which: Tensor) -> Tensor:
        """Reflect each image (n, c, h, w) by the entry of `signs` with the index in `which` (n,); clipped to [0, 1]."""
        mean = self._mean.view(1, -1, 1, 1)
        turned = torch.einsum("nik,nkhw->nihw", self._matrices[which.to(images.device)], images - mean)
        return (turned + mean).clamp(0, 1)


def undo_reflection(
    decoded: Tensor, known: Tensor, truth: Tensor, steps: Iterable[int], rng: torch.Generator
) -> Tensor:
    """Apply to all `decoded` images the one reflection after which they look most like `known` images.

    A network is trained to recognise which reflection a known image went through. Without steps, without sufficient
    evidence, or for a single image, `decoded` is returned unchanged.

    Args:
        decoded: Images (n, c, h, w) in [0, 1].
        known: What the same decoder makes of messages whose images are known.
        truth: The originals of `known`, which define the principal axes.
        steps: Training steps; `JUDGE_STEPS` are enough.
        rng: Source of randomness.

    """
    reflections = Reflections(truth)
    count = len(reflections.signs)
    judge = build_critic(known.shape[1:], scores=count).to(known.device)
    optimiser = torch.optim.Adam(judge.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, JUDGE_STEPS)
    # every image of a batch in every reflection, so that the network is not biased to one of them
    which = torch.arange(count, device=known.device).repeat_interleave(BATCH)
    for _ in steps:
        images = known[torch.randint(len(known), (BATCH,), generator=rng).to(known.device)]
        mirrored = (torch.rand(BATCH, 1, 1, 1, generator=rng) < 0.5).to(known.device)
        images = torch.where(mirrored, images.flip(3), images).repeat(count, 1, 1, 1)
        with torch.enable_grad():
            loss = F.cross_entropy(judge(reflections(images, which)), which)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
        optimiser.step()
        schedule.step()
    if schedule.last_epoch == 0:  # no step was left
        return decoded
    with torch.no_grad():
        likely = F.log_softmax(judge(decoded), dim=1)
    # log-likelihood of each reflection relative to none, in standard errors of the mean over images
    gain = likely[:, 1:] - likely[:, :1]
    evidence = gain.mean(0) / (gain.std(0) / len(gain) ** 0.5).clamp(min=1e-6)
    best = int(gain.mean(0).argmax())
    if len(decoded) < 2 or float(evidence[best]) < CERTAIN:
        return decoded
    return reflections(decoded, torch.full((len(decoded),), best + 1))
