"""Inversion through a surrogate: a client like the one that made the messages, but not the same.

A decoder learns to invert the surrogate, whose messages the attacker can make for images it knows, and is then asked
for messages of another client (He et al., ACSAC 2019, without queries; another participant's copy, Li et al., CVPR
2022). What the two clients disagree about is error, so a surrogate is first fitted to what its messages must look like:
the attacker has the victims' messages, if not their images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.compute import Compute
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.evaluation.floor import mean_image
from mocosfl_priv.evaluation.image_metrics import mse, ssim_zeropad
from mocosfl_priv.models.decoder import build_decoder
from mocosfl_priv.threat import AuxiliaryData

BATCH_FOR_INFERENCE = 128
STATISTICS_IMAGES = 1024
VALIDATION_SHARE = 0.1
Send = Callable[[Tensor], Tensor]
DEAD = 1e-6  # a deviation below this is a channel that says nothing


@dataclass(frozen=True)
class DecoderTraining:
    """How a decoder is trained: see `attacks.decoder`, whose parameters these are."""

    architecture: str
    epochs: int
    batch_size: int
    learning_rate: float
    ssim_weight: float
    shift: int

    def steps(self, images: int) -> int:
        """Steps of a training on so many images."""
        return self.epochs * -(-images // self.batch_size)


class Moments(nn.Module):
    """Mean and deviation per channel of messages (n, c, ...): (1, c, 1, ...) each, seen once."""

    mean: Tensor
    std: Tensor

    def __init__(self, smashed: Tensor) -> None:
        super().__init__()
        axes = [0, *range(2, smashed.dim())]
        self.register_buffer("mean", smashed.mean(axes, keepdim=True))
        # dead channels stay zero instead of being blown up
        self.register_buffer("std", smashed.std(axes, keepdim=True).clamp(min=DEAD))

    def forward(self, smashed: Tensor) -> Tensor:
        """Zero mean and unit deviation."""
        return (smashed - self.mean) / self.std

    def restore(self, standardised: Tensor) -> Tensor:
        """The inverse."""
        return standardised * self.std + self.mean


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
    theirs = Moments(smashed)
    wanted = _neighbourhood(theirs(smashed))
    for _, _step in zip(range(fit.iterations), steps, strict=False):
        chosen = torch.randint(len(images), (fit.batch_size,), generator=rng)
        batch = images[chosen.to(images.device)]
        moments = _neighbourhood(theirs(protect(client(batch))))
        loss = torch.stack([(a - b).square().sum() / len(b) for a, b in zip(moments, wanted, strict=True)]).sum()
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
        if len(auxiliary) < 2:
            raise ConfigurationError("a surrogate's decoder needs at least two auxiliary images")
        images = auxiliary.images
        candidates = auxiliary.of_target.nonzero().squeeze(1).cpu()
        if len(candidates) < 2:
            candidates = torch.arange(len(auxiliary))
        count = max(1, round(VALIDATION_SHARE * len(candidates)))
        held_out = candidates[torch.randperm(len(candidates), generator=rng)[:count]]
        rest = torch.ones(len(auxiliary), dtype=torch.bool)
        rest[held_out] = False
        mean = mean_image(images[candidates.to(images.device)])
        return cls(images[rest.to(images.device)], images[held_out.to(images.device)], mean)


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
    surrogate: Send,
    smashed: Tensor,
    known: KnownImages,
    training: DecoderTraining,
    steps: Iterator[int],
    compute: Compute,
    rng: torch.Generator,
) -> Inversion:
    """Reconstruct the images behind `smashed` (n, *smashed_shape).

    They are drawn towards the mean of the known images as far as the surrogate, asked for messages of the
    reconstructions, explains less of the victims' messages than of its own for images it knows: a decoder for a wrong
    surrogate gives wrong images, not vague ones.

    surrogate: images (m, 3, h, w) in [0, 1] to messages, anew with every call where the defense is randomised.
    steps: as drawn from the attack's budget; without a single one the mean of the known images is returned.
    """
    train, validation, mean = known.train, known.validation, known.mean
    sample = torch.randperm(len(train), generator=rng)[:STATISTICS_IMAGES]
    own, theirs = Moments(_answers(surrogate, train[sample.to(train.device)])), Moments(smashed)
    decoder = build_decoder(training.architecture, smashed.shape[1:], train.shape[1:])
    network = nn.Sequential(own, decoder).to(compute.device)
    if not _train(network, surrogate, train, validation, training, steps, compute, rng):
        return Inversion(mean.expand(len(smashed), *mean.shape).clone(), 0.0, 0.0)
    answered = _answers(surrogate, validation)
    checked = _decode(network, answered)
    best, images = -float("inf"), checked[:0]
    for messages in (smashed, own.restore(theirs(smashed))):  # as they came, and with the surrogate's own moments
        decoded = _decode(network, messages)
        explained = _explained(surrogate, decoded, messages)
        if explained > best:
            best, images = explained, decoded
    reached = _explained(surrogate, checked, answered)
    confidence = min(1.0, max(0.0, best) / reached) if reached > 0 else 0.0
    trust = confidence * _trust(checked, validation, mean)
    return Inversion((mean + trust * (images - mean)).clamp(0, 1), best, confidence)


@torch.no_grad()
def _answers(surrogate: Send, images: Tensor) -> Tensor:
    return torch.cat([surrogate(batch) for batch in images.split(BATCH_FOR_INFERENCE)])


def _explained(surrogate: Send, images: Tensor, smashed: Tensor) -> float:
    """Share of the variance of `smashed` that the surrogate's messages for `images` reproduce; per channel, then
    averaged, so that loud channels do not decide alone. 1 where all is explained, 0 at the channels' means.
    """
    axes = [0, *range(2, smashed.dim())]
    variance = smashed.var(axes)
    alive = variance > DEAD**2
    if not bool(alive.any()):
        return 0.0
    error = (_answers(surrogate, images) - smashed).square().mean(axes)
    return 1 - float((error[alive] / variance[alive]).mean())


def _trust(decoded: Tensor, images: Tensor, mean: Tensor) -> float:
    """The share s in [0, 1] for which mean + s (decoded - mean) is nearest to `images`: a decoder that has learned
    nothing, or has overfitted, is not to be believed.
    """
    away, wanted = decoded - mean, images - mean
    return float(((away * wanted).sum() / away.square().sum().clamp(min=1e-12)).clamp(0, 1))


def _train(
    network: nn.Module,
    surrogate: Send,
    train: Tensor,
    validation: Tensor,
    training: DecoderTraining,
    steps: Iterator[int],
    compute: Compute,
    rng: torch.Generator,
) -> int:
    """Train `network` and keep its best epoch on `validation`; returns the steps taken."""
    steps_per_epoch = training.steps(len(train)) // training.epochs
    planned = training.steps(len(train))
    optimiser = torch.optim.AdamW(network.parameters(), lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=training.learning_rate, total_steps=planned)
    best_error, best_state = float("inf"), None
    order = torch.empty(0, dtype=torch.long)
    taken = 0
    for step, _ in zip(range(planned), steps, strict=False):
        position = step % steps_per_epoch
        if position == 0:
            order = torch.randperm(len(train), generator=rng)
        chosen = order[position * training.batch_size : (position + 1) * training.batch_size]
        images = flip_and_shift(train[chosen.to(train.device)], training.shift, rng)
        smashed = _answers(
            surrogate, images
        )  # outside autocast: the victims' messages were computed in full precision too
        with compute.autocast():
            decoded = network(smashed)
        decoded = decoded.float()
        loss = F.mse_loss(decoded, images)
        if training.ssim_weight:
            loss = loss + training.ssim_weight * (1 - ssim_zeropad(decoded, images).mean())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        taken += 1
        if position == steps_per_epoch - 1:
            error = float(mse(_decode(network, _answers(surrogate, validation)), validation).mean())
            if error < best_error:
                best_error, best_state = error, copy.deepcopy(network.state_dict())
    if best_state is not None:
        network.load_state_dict(best_state)
    return taken


@torch.no_grad()
def _decode(network: nn.Module, smashed: Tensor) -> Tensor:
    network.eval()
    decoded = torch.cat([network(batch) for batch in smashed.split(BATCH_FOR_INFERENCE)])
    network.train()
    return decoded.float().clamp(0, 1)


def flip_and_shift(images: Tensor, shift: int, rng: torch.Generator) -> Tensor:
    """Mirror each image with probability one half and move it by up to `shift` pixels; edges are reflected."""
    n, _, height, width = images.shape
    flips = (torch.rand(n, generator=rng) < 0.5).to(images.device)
    images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
    if shift == 0:
        return images
    padded = F.pad(images, (shift,) * 4, mode="reflect")
    offsets = torch.randint(0, 2 * shift + 1, (n, 2), generator=rng).to(images.device)
    rows = (offsets[:, :1] + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (offsets[:, 1:] + torch.arange(width, device=images.device))[:, None, None, :]
    batch = torch.arange(n, device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[batch, channels, rows, columns]
