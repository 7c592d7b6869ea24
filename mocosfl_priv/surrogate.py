"""Inversion through a surrogate: a client like the one that made the messages, but not the same.

A decoder learns to invert the surrogate, whose messages the attacker can make for images it knows, and is then asked
for messages of another client (He et al., ACSAC 2019, without queries; another participant's copy, Li et al., CVPR
2022). What the two clients disagree about is error, so a surrogate is first fitted to what its messages must look like:
the attacker has the victims' messages, if not their images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mocosfl_priv.compute import Compute
from mocosfl_priv.evaluation.floor import mean_image
from mocosfl_priv.inversion import DEAD, STATISTICS_IMAGES, Recipe, Sender, Standardise, held_out_split, train_inverter
from mocosfl_priv.models.decoder import build_decoder
from mocosfl_priv.threat import AuxiliaryData, Budget

VALIDATION_SHARE = 0.1
RESAMPLED = 20
Send = Callable[[Tensor], Tensor]


OFFSETS = ((0, 0), (0, 1), (1, 0), (1, 1))  # places down and to the right whose channels are compared


@dataclass(frozen=True)
class MomentFit:
    """How a surrogate is fitted: steps, images of a step, peak learning rate of Adam's one-cycle schedule."""

    iterations: int
    batch_size: int
    learning_rate: float


def fit_moments(
    client: nn.Module,
    protect: Send,
    smashed: Tensor,
    images: Tensor,
    fit: MomentFit,
    steps: Iterator[int],
    rng: torch.Generator,
    further_loss: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Train `client` (in place) until its messages have the moments of `smashed` (n, c, h, w).

    The moments are means, and covariances of all channels at one place and between neighbouring places: the first say
    how loud channels are, the others tell filters and their directions apart. Images need not be the victims', only
    alike on average. A client without parameters is left as it is.

    further_loss: of a batch of images, added to the distance of the moments.
    """
    parameters = list(client.parameters())
    if not parameters:
        return
    optimiser = torch.optim.Adam(parameters, lr=fit.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=fit.learning_rate, total_steps=fit.iterations)
    theirs = Standardise(smashed)
    wanted = _neighbourhood(theirs(smashed))
    for _, _step in zip(range(fit.iterations), steps, strict=False):
        chosen = torch.randint(len(images), (fit.batch_size,), generator=rng)
        batch = images[chosen.to(images.device)]
        loss = _apart(_neighbourhood(theirs(protect(client(batch)))), wanted)
        if further_loss is not None:
            loss = loss + further_loss(batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()


def _neighbourhood(standardised: Tensor) -> list[Tensor]:
    """Means (c,), and covariances (c, c) of the channels at a place with those `OFFSETS` further."""
    mean = standardised.mean((0, 2, 3))
    centred = standardised - mean.view(1, -1, 1, 1)
    _, _, height, width = standardised.shape
    moments = [mean]
    for down, right in OFFSETS:
        if down >= height or right >= width:
            continue
        here = centred[:, :, : height - down, : width - right]
        there = centred[:, :, down:, right:]
        count = here.shape[0] * here.shape[2] * here.shape[3]
        moments.append(torch.einsum("nchw,ndhw->cd", here, there) / count)
    return moments


def _apart(moments: list[Tensor], wanted: list[Tensor]) -> Tensor:
    return torch.stack([(a - b).square().sum() / len(b) for a, b in zip(moments, wanted, strict=True)]).sum()


def moments_agree(surrogate: Sender, smashed: Tensor, images: Tensor, rng: torch.Generator) -> bool:
    """Whether the moments of `smashed` are as near to those of the surrogate's messages for `images` as the moments
    of equally many of its messages are, drawn `RESAMPLED` times: then nothing says that the clients differ.
    """
    sample = torch.randperm(len(images), generator=rng)[:STATISTICS_IMAGES]
    own = surrogate(images[sample.to(images.device)])
    standardise = Standardise(own)
    wanted = _neighbourhood(standardise(own))
    by_chance = []
    for _ in range(RESAMPLED):
        drawn = torch.randint(len(own), (len(smashed),), generator=rng)
        by_chance.append(_apart(_neighbourhood(standardise(own[drawn.to(own.device)])), wanted))
    return bool(_apart(_neighbourhood(standardise(smashed)), wanted) <= torch.stack(by_chance).max())


@dataclass(frozen=True)
class KnownImages:
    """The attacker's images, float (n, 3, h, w) in [0, 1], shared out.

    train: to learn from. validation: held out to choose by, of the target distribution where there are such.
    mean: (3, h, w), of all those: the guess of an attacker that has learned nothing.
    """

    train: Tensor
    validation: Tensor
    mean: Tensor

    @classmethod
    def of(cls, auxiliary: AuxiliaryData, rng: torch.Generator) -> KnownImages:
        """Share out `auxiliary`; raises ConfigurationError if it is a single image."""
        train, validation = held_out_split(auxiliary, VALIDATION_SHARE, rng)
        return cls(train, validation, mean_image(auxiliary.nearest_images))


@dataclass(frozen=True)
class Inversion:
    """What came of one surrogate.

    images: float (n, 3, h, w) in [0, 1]. explained: share of the variance of the victims' messages that the surrogate
    reproduces from `images`, at most 1. confidence: the same relative to its own messages for known images, in [0, 1].
    """

    images: Tensor
    explained: float
    confidence: float


def invert_through(
    surrogate: Sender,
    smashed: Tensor,
    known: KnownImages,
    architecture: str,
    recipe: Recipe,
    budget: Budget,
    compute: Compute,
    rng: torch.Generator,
) -> Inversion:
    """Reconstruct the images behind `smashed` (n, *smashed_shape) with a decoder for the surrogate's messages.

    They are drawn towards the mean of the known images as far as the surrogate, asked for messages of the
    reconstructions, explains less of the victims' messages than of its own for images it knows: a decoder for a wrong
    surrogate gives wrong images, not vague ones. Where the decoder learned nothing, that mean is returned.
    """
    decoder = build_decoder(architecture, smashed.shape[1:], known.mean.shape)
    inverter = train_inverter(decoder, surrogate, known.train, known.validation, recipe, budget, compute, rng)
    if inverter.blind:
        return Inversion(known.mean.expand(len(smashed), *known.mean.shape).clone(), 0.0, 0.0)
    own, theirs = inverter.standardise, Standardise(smashed)
    answered = surrogate(known.validation)
    checked = inverter(answered)
    best, images = -float("inf"), checked[:0]
    for messages in (smashed, own.restore(theirs(smashed))):  # as they came, and with the surrogate's own moments
        decoded = inverter(messages)
        explained = _explained(surrogate, decoded, messages)
        if explained > best:
            best, images = explained, decoded
    reached = _explained(surrogate, checked, answered)
    confidence = min(1.0, max(0.0, best) / reached) if reached > 0 else 0.0
    trust = confidence * _trust(checked, known.validation, known.mean)
    return Inversion((known.mean + trust * (images - known.mean)).clamp(0, 1), best, confidence)


def _explained(surrogate: Sender, images: Tensor, smashed: Tensor) -> float:
    """Share of the variance of `smashed` that the surrogate's messages for `images` reproduce; per channel, then
    averaged, so that loud channels do not decide alone. 1 where all is explained, 0 at the channels' means.
    """
    axes = [0, *range(2, smashed.dim())]
    variance = smashed.var(axes)
    alive = variance > DEAD**2
    if not bool(alive.any()):
        return 0.0
    error = (surrogate(images) - smashed).square().mean(axes)
    return 1 - float((error[alive] / variance[alive]).mean())


def _trust(decoded: Tensor, images: Tensor, mean: Tensor) -> float:
    """The share s in [0, 1] for which mean + s (decoded - mean) is nearest to `images`: a decoder that has learned
    nothing, or has overfitted, is not to be believed.
    """
    away, wanted = decoded - mean, images - mean
    return float(((away * wanted).sum() / away.square().sum().clamp(min=1e-12)).clamp(0, 1))
