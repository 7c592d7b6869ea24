"""Which way round colours are, where a fit by second moments left it open.

Reflecting colours along a principal axis keeps their mean and their covariance, so a surrogate that was fitted to
moments may have learned the client of reflected images, and its decoder then gives negatives. People see which is the
photograph; so does a small network.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from mocosfl_priv.inversion.discriminator import build_critic

# Of the principal axes, that of least variance first: there is too little on it to see, or to lose. The identity first.
SIGNS = tuple((1.0, *signs) for signs in product((1.0, -1.0), repeat=2))
JUDGE_STEPS = 300  # after which a network sees what reflections are
BATCH = 16
LEARNING_RATE = 2e-3
CERTAIN = 2.0  # standard errors, below which images stay as they are


class Reflections:
    """Reflections of colours about their mean, along the principal axes of `images` (n, 3, h, w); see `SIGNS`."""

    def __init__(self, images: Tensor) -> None:
        pixels = images.movedim(1, 3).reshape(-1, 3)
        self._mean = pixels.mean(0)
        axes = torch.linalg.eigh(torch.cov(pixels.T).double())[1]
        signs = torch.tensor(SIGNS, dtype=torch.float64, device=images.device)
        self._matrices = torch.einsum("ij,rj,kj->rik", axes, signs, axes).to(images.dtype)

    def __call__(self, images: Tensor, which: Tensor) -> Tensor:
        """Images (n, 3, h, w), each after the reflection (n,) of `SIGNS`; twice the same is none, but for clipping."""
        mean = self._mean.view(1, 3, 1, 1)
        turned = torch.einsum("nik,nkhw->nihw", self._matrices[which.to(images.device)], images - mean)
        return (turned + mean).clamp(0, 1)


def undo_reflection(
    decoded: Tensor, known: Tensor, truth: Tensor, steps: Iterable[int], rng: torch.Generator
) -> Tensor:
    """`decoded` images (n, 3, h, w) after the one reflection of all that makes them look like `known` ones.

    known: what the same decoder makes of messages whose images, `truth`, it knows; what reflections are is seen on
    these. A network learns, as many steps as there are (`JUDGE_STEPS` are enough), to tell which reflection a known
    image went through.
    """
    reflections = Reflections(truth)
    judge = build_critic(known.shape[1:], scores=len(SIGNS)).to(known.device)
    optimiser = torch.optim.Adam(judge.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, JUDGE_STEPS)
    # every image of a batch in every reflection, lest the network leans towards one of them
    which = torch.arange(len(SIGNS), device=known.device).repeat_interleave(BATCH)
    for _ in steps:
        images = known[torch.randint(len(known), (BATCH,), generator=rng).to(known.device)]
        mirrored = (torch.rand(BATCH, 1, 1, 1, generator=rng) < 0.5).to(known.device)
        images = torch.where(mirrored, images.flip(3), images).repeat(len(SIGNS), 1, 1, 1)
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
    # how much likelier than as they are, in standard errors of the mean over images
    gain = likely[:, 1:] - likely[:, :1]
    evidence = gain.mean(0) / (gain.std(0) / len(gain) ** 0.5).clamp(min=1e-6)
    best = int(gain.mean(0).argmax())
    if len(decoded) < 2 or float(evidence[best]) < CERTAIN:
        return decoded
    return reflections(decoded, torch.full((len(decoded),), best + 1))
