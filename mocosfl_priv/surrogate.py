"""Inversion through a surrogate: a client like the one that made the messages, but not the same.

A decoder learns to invert the surrogate, whose messages the attacker can make for images it knows, and is then asked
for messages of another client (He et al., ACSAC 2019, without queries; another participant's copy, Li et al., CVPR
2022). What the two clients disagree about is error, so the victims' messages are first brought to the surrogate's
moments, where that makes them easier to explain.
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
from mocosfl_priv.evaluation.image_metrics import mse, ssim_zeropad
from mocosfl_priv.models.decoder import build_decoder
from mocosfl_priv.threat import AuxiliaryData

BATCH_FOR_INFERENCE = 128
STATISTICS_IMAGES = 1024
VALIDATION_SHARE = 0.1
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


def split_auxiliary(auxiliary: AuxiliaryData, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images for training and for choosing, the latter of the target distribution where there are such."""
    if len(auxiliary) < 2:
        raise ConfigurationError("a surrogate's decoder needs at least two auxiliary images")
    candidates = auxiliary.of_target.nonzero().squeeze(1).cpu()
    if len(candidates) < 2:
        candidates = torch.arange(len(auxiliary))
    count = max(1, round(VALIDATION_SHARE * len(candidates)))
    held_out = candidates[torch.randperm(len(candidates), generator=rng)[:count]]
    rest = torch.ones(len(auxiliary), dtype=torch.bool)
    rest[held_out] = False
    device = auxiliary.images.device
    return auxiliary.images[rest.to(device)], auxiliary.images[held_out.to(device)]


def invert_through(
    surrogate: Callable[[Tensor], Tensor],
    smashed: Tensor,
    train: Tensor,
    validation: Tensor,
    training: DecoderTraining,
    steps: Iterator[int],
    compute: Compute,
    rng: torch.Generator,
) -> Tensor:
    """Reconstructions float (n, 3, h, w) in [0, 1] of the images behind `smashed` (n, *smashed_shape).

    surrogate: images (m, 3, h, w) in [0, 1] to messages, anew with every call where the defense is randomised.
    train, validation: images to learn from and to choose by. steps: as drawn from the attack's budget; without a
    single one the mean of `train` is returned.
    """
    ask = torch.no_grad()(surrogate)
    sample = torch.randperm(len(train), generator=rng)[:STATISTICS_IMAGES]
    known = ask(train[sample.to(train.device)])
    own, theirs = Moments(known), Moments(smashed)
    decoder = build_decoder(training.architecture, smashed.shape[1:], train.shape[1:])
    network = nn.Sequential(own, decoder).to(compute.device)
    mean = train.mean(0)
    if not _train(network, ask, train, validation, training, steps, compute, rng):
        return mean.expand(len(smashed), *mean.shape).clone()
    shrink = _trust(_decode(network, ask(validation)), validation, mean)
    as_sent, aligned = smashed, own.restore(theirs(smashed))
    guesses = {}
    for messages in (as_sent, aligned):
        images = _decode(network, messages)
        guesses[unexplained(ask, images, messages)] = images
    return (mean + shrink * (guesses[min(guesses)] - mean)).clamp(0, 1)


@torch.no_grad()
def unexplained(surrogate: Callable[[Tensor], Tensor], images: Tensor, smashed: Tensor) -> float:
    """Share of the variance of `smashed` that the surrogate's messages for `images` leave unexplained; per channel,
    then averaged, so that loud channels do not decide alone. 0 where all is explained, 1 at a channel's mean.
    """
    again = torch.cat([surrogate(batch) for batch in images.split(BATCH_FOR_INFERENCE)])
    axes = [0, *range(2, smashed.dim())]
    variance = smashed.var(axes)
    alive = variance > DEAD**2
    if not bool(alive.any()):
        return 1.0
    return float(((again - smashed).square().mean(axes)[alive] / variance[alive]).mean())


def _trust(decoded: Tensor, images: Tensor, mean: Tensor) -> float:
    """The share s in [0, 1] for which mean + s (decoded - mean) is nearest to `images`: a decoder that has learned
    nothing, or has overfitted, is not to be believed.
    """
    away, wanted = decoded - mean, images - mean
    return float(((away * wanted).sum() / away.square().sum().clamp(min=1e-12)).clamp(0, 1))


def _train(
    network: nn.Module,
    ask: Callable[[Tensor], Tensor],
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
        smashed = ask(images)  # outside autocast: the victims' messages were computed in full precision too
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
            error = float(mse(_decode(network, ask(validation)), validation).mean())
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
