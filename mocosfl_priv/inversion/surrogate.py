"""Inversion through a surrogate: a client model that resembles, but is not, the client that made the messages.

A decoder is trained to invert the surrogate, with which the attacker can encode known images. It is then applied to the
messages of the real client (He et al., ACSAC 2019, without queries; another participant's copy of the client, Li et
al., CVPR 2022). Differences between the two clients cause errors. The surrogate is therefore first fitted such that its
messages resemble those of the victims, which the attacker has.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.evaluation.floor import mean_image
from mocosfl_priv.inversion.colour_match import sample
from mocosfl_priv.inversion.colour_reflection import JUDGE_STEPS, SIGNS, Reflections, undo_reflection
from mocosfl_priv.inversion.confidence import confidence, explained, trust
from mocosfl_priv.inversion.decoder_training import (
    STATISTICS_IMAGES,
    MessageEncoder,
    Recipe,
    Standardise,
    held_out_split,
    in_batches,
    train_inverter,
)
from mocosfl_priv.inversion.decoders import build_decoder
from mocosfl_priv.inversion.feature_moments import moment_distance, moments
from mocosfl_priv.plugins import ENOUGH_IMAGES, AttackerView, AuxiliaryData, Budget
from mocosfl_priv.runtime.compute import Compute

VALIDATION_SHARE = 0.1
RESAMPLED = 20
JUDGE_IMAGES = 1024
JUDGE_SHARE = 0.1  # share of a limited budget for undoing reflections of colours
SCREENING_SHARE = 0.5  # share of a fit's iterations for comparing several initialisations
REFLECTION_SHARE = 0.25  # share of a fit's iterations for comparing the best one with its reflections
REFLECTING = 0.5  # share of a reflection's iterations for learning the reflection
REFLECTED_IMAGES = 32  # images per step for learning a reflection
RISE, FIRST_RATE = 0.3, 0.04  # warm-up as a share of a fit, and its first learning rate as a share of the peak
Send = Callable[[Tensor], Tensor]
Draw = Callable[[int], Tensor]  # draws about this many random images, distributed like those behind the messages
Loss = Callable[[nn.Module, Tensor], Tensor]  # loss of a client for a batch of images


@dataclass(frozen=True)
class MomentFit:
    """How a surrogate is fitted: steps, images of a step, peak learning rate of Adam's one-cycle schedule."""

    iterations: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class FitTarget:
    """What a surrogate is fitted to.

    wanted: moments of the real smashed data, see :func:`moments`.
    draw: draws images to encode, which must be distributed like those of the victims.
    protect: the defense.
    further_loss: added to the distance of the moments, see :func:`moment_distance`.
    """

    wanted: Tensor
    draw: Draw
    protect: Send
    further_loss: Loss | None = None

    def loss(self, client: nn.Module, count: int) -> Tensor:
        """Return the loss of `client`, a scalar, for about `count` drawn images."""
        images = self.draw(count)
        loss = moment_distance(moments(self.protect(client(images))), self.wanted)
        return loss if self.further_loss is None else loss + self.further_loss(client, images)

    @torch.no_grad()
    def distance(self, client: nn.Module) -> float:
        """Return the distance of the moments alone, for enough images to compare clients."""
        sent = self.protect(in_batches(client)(self.draw(STATISTICS_IMAGES)))
        return float(moment_distance(moments(sent), self.wanted))


def fit_moments(client: nn.Module, likeness: FitTarget, fit: MomentFit, budget: Budget) -> None:
    """Train `client` in place such that its messages match `likeness`; a client without parameters is not changed."""
    _minimise(client, lambda client: likeness.loss(client, fit.batch_size), fit, budget)


def _minimise(client: nn.Module, loss_of: Callable[[nn.Module], Tensor], fit: MomentFit, budget: Budget) -> None:
    """Adam on a one-cycle schedule that ends with the budget."""
    parameters = list(client.parameters())
    if not parameters:
        return
    optimiser = torch.optim.Adam(parameters, lr=fit.learning_rate)
    for step in budget.iterate(fit.iterations):
        for group in optimiser.param_groups:
            group["lr"] = fit.learning_rate * _share_of_peak(budget.spent(step, fit.iterations))
        loss = loss_of(client)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()


def _share_of_peak(spent: float) -> float:
    """The learning rate as a share of its peak: a cosine from `FIRST_RATE` up to 1 until `RISE`, then one down to 0."""
    if spent < RISE:
        return FIRST_RATE + (1 - FIRST_RATE) * 0.5 * (1 - math.cos(math.pi * spent / RISE))
    return 0.5 * (1 + math.cos(math.pi * (spent - RISE) / (1 - RISE)))


def fit_best(clients: Sequence[nn.Module], likeness: FitTarget, fit: MomentFit, budget: Budget) -> nn.Module:
    """Fit several initial clients as :func:`fit_moments` does, and return the best.

    A fit may end far from the real client, depending on its initialisation. Which initialisation is good shows early,
    so half of the iterations are divided among all `clients`. A client for images with reflected colours
    (`colour_reflection`) has nearly the same moments, and about every second fit ends at one, so the best is then
    compared with its reflections. The best of these gets the remaining iterations, with `further_loss`. A single client
    gets all iterations.
    """
    if len(clients) == 1 or not list(clients[0].parameters()):
        fit_moments(clients[0], likeness, fit, budget)
        return clients[0]
    alone = replace(likeness, further_loss=None)

    def best_of(candidates: Sequence[nn.Module], iterations: float, part: Budget) -> nn.Module:
        distances = []
        for place, client in enumerate(candidates):
            own = replace(fit, iterations=max(1, round(iterations)))
            fit_moments(client, alone, own, part.share(1 / (len(candidates) - place)))
            distances.append(alone.distance(client))
        return candidates[min(range(len(candidates)), key=distances.__getitem__)]

    best = best_of(clients, SCREENING_SHARE * fit.iterations / len(clients), budget.share(SCREENING_SHARE))
    turning = budget.share(REFLECTION_SHARE / (1 - SCREENING_SHARE))
    each = REFLECTION_SHARE * fit.iterations / (len(SIGNS) + REFLECTING * (len(SIGNS) - 1))
    learn = replace(fit, iterations=max(1, round(REFLECTING * each)), batch_size=REFLECTED_IMAGES)
    reflections = [
        _reflected(best, which, alone.draw, learn, turning.share(REFLECTING / (2 * len(SIGNS) - which)))
        for which in range(1, len(SIGNS))
    ]
    best = best_of([best, *reflections], each, turning)
    last = max(1, round((1 - SCREENING_SHARE - REFLECTION_SHARE) * fit.iterations))
    fit_moments(best, likeness, replace(fit, iterations=last), budget)
    return best


def _reflected(client: nn.Module, which: int, draw: Draw, fit: MomentFit, budget: Budget) -> nn.Module:
    """A copy of `client`, trained to encode images as `client` encodes their reflection `which`."""
    reflections = Reflections(draw(STATISTICS_IMAGES))

    def unlike(reflected: nn.Module) -> Tensor:
        images = draw(fit.batch_size)
        with torch.no_grad():
            wanted = client(reflections(images, torch.full((len(images),), which)))
        return F.mse_loss(reflected(images), wanted) / wanted.var().clamp(min=1e-12)

    reflected = copy.deepcopy(client)
    _minimise(reflected, unlike, fit, budget)
    return reflected


def redrawn(client: nn.Module, rng: torch.Generator) -> nn.Module:
    """Replace the weights of `client` in place by normal random numbers of the same root mean square; returns it.

    Biases and norms are not changed.
    """
    with torch.no_grad():
        for parameter in client.parameters():
            if parameter.dim() > 1:
                drawn = torch.randn(parameter.shape, generator=rng)
                parameter.copy_(drawn.to(parameter.device) * parameter.square().mean().sqrt())
    return client


def moments_agree(surrogate: MessageEncoder, smashed: Tensor, images: Tensor, rng: torch.Generator) -> bool:
    """Whether `smashed` may come from the surrogate, by its moments.

    Their distance to the moments of the surrogate's messages for `images` must not exceed the largest distance of
    equally many of the surrogate's own messages, drawn `RESAMPLED` times.
    """
    chosen = torch.randperm(len(images), generator=rng)[:STATISTICS_IMAGES]
    own = surrogate(images[chosen.to(images.device)])
    wanted = moments(own)
    by_chance = []
    for _ in range(RESAMPLED):
        drawn = torch.randint(len(own), (len(smashed),), generator=rng)
        by_chance.append(moment_distance(moments(own[drawn.to(own.device)]), wanted))
    return bool(moment_distance(moments(smashed), wanted) <= torch.stack(by_chance).max())


@dataclass(frozen=True)
class MessageSample:
    """Messages of clients, and images distributed like those behind them, for attackers who observed a training.

    smashed: float (n, *smashed_shape).
    draw: draws images of the attacker.
    of_victims: whether the messages are those of the victims.
    """

    smashed: Tensor
    draw: Draw
    of_victims: bool

    @classmethod
    def of(cls, view: AttackerView, recent: Tensor, view_of: Send) -> MessageSample:
        """Return the victims' messages or, if these are few and there are any, `recent` messages of the training.

        view_of: the augmentation of the clients in training. With augmented views, colours vary so much that messages
            reveal little about them.
        """
        images = view.auxiliary.nearest_images
        few = len(view.smashed) < ENOUGH_IMAGES and len(recent) > 0

        def draw(count: int) -> Tensor:
            chosen = images[sample(len(images), count, images.device)]
            return view_of(chosen) if few else chosen

        return cls(recent if few else view.smashed, draw, not few)


@dataclass(frozen=True)
class KnownImages:
    """The attacker's images, float (n, 3, h, w) in [0, 1], split by purpose.

    train: images to train on.
    nearest: the images of `train` that are distributed most like the victims', see `AuxiliaryData.nearest`; statistics
        of messages are compared on these only.
    validation: images held out for model selection, see `AuxiliaryData.hold_out`.
    mean: the blind guess (3, h, w), the mean of `nearest`.
    """

    train: Tensor
    nearest: Tensor
    validation: Tensor
    mean: Tensor

    @classmethod
    def of(cls, auxiliary: AuxiliaryData, rng: torch.Generator) -> KnownImages:
        """Split `auxiliary`; raises ConfigurationError for fewer than two images."""
        train, validation = held_out_split(auxiliary, VALIDATION_SHARE, rng)
        few = int(auxiliary.of_target.sum()) < ENOUGH_IMAGES
        nearest = train.images if few else train.images[train.of_target]
        return cls(train.images, nearest, validation.images, mean_image(nearest))

    def draw(self, rng: torch.Generator) -> Draw:
        """Return a function that draws from `nearest` with replacement."""
        images = self.nearest
        return lambda count: images[torch.randint(len(images), (count,), generator=rng).to(images.device)]


@dataclass(frozen=True)
class Inversion:
    """The result of an inversion through one surrogate.

    images: reconstructions, float (n, 3, h, w) in [0, 1].
    explained: share of the variance of the victims' messages that the surrogate reproduces from `images`.
    confidence: `explained` relative to that for its own messages of known images, in [0, 1].
    """

    images: Tensor
    explained: float
    confidence: float


def invert_through(
    surrogate: MessageEncoder,
    smashed: Tensor,
    known: KnownImages,
    architecture: str,
    recipe: Recipe,
    budget: Budget,
    compute: Compute,
    rng: torch.Generator,
    *,
    right_way_round: bool = True,
) -> Inversion:
    """Reconstruct the images behind `smashed` (n, *smashed_shape) with a decoder for the surrogate's messages.

    A decoder for a wrong surrogate returns wrong images, not blurred ones. Reconstructions are therefore drawn towards
    the mean of the known images by as much as the surrogate, applied to the reconstructions, explains less of the
    victims' messages than of its own. If the decoder learned nothing, the mean is returned.

    right_way_round: whether it is known that colours are not reflected, see
        `mocosfl_priv.inversion.colour_reflection`.
    """
    decoder = build_decoder(architecture, smashed.shape[1:], known.mean.shape)
    learning = budget if right_way_round else budget.share(1 - JUDGE_SHARE)
    inverter = train_inverter(
        decoder, surrogate, known.train, known.validation, recipe, learning, compute, rng, guess=known.mean
    )
    if inverter.blind:
        return Inversion(known.mean.expand(len(smashed), *known.mean.shape).clone(), 0.0, 0.0)
    own, theirs = inverter.standardise, Standardise(smashed)
    answered = surrogate(known.validation)
    checked = inverter(answered)
    best, images = -float("inf"), checked[:0]
    for messages in (
        smashed,
        own.restore(theirs(smashed)),
    ):  # unchanged, and with the mean and deviation of the surrogate's messages
        decoded = inverter(messages)
        share = explained(messages, surrogate(decoded))
        if share > best:
            best, images = share, decoded
    if not right_way_round:
        truth = known.nearest[:JUDGE_IMAGES]
        images = undo_reflection(images, inverter(surrogate(truth)), truth, budget.iterate(JUDGE_STEPS), rng)
    sure = confidence(best, explained(answered, surrogate(checked)))
    kept = trust(sure, checked, known.validation, known.mean)
    return Inversion((known.mean + kept * (images - known.mean)).clamp(0, 1), best, sure)
