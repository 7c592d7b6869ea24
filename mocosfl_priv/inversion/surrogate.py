"""Inversion through a surrogate: a client like the one that made the messages, but not the same.

A decoder learns to invert the surrogate, whose messages the attacker can make for images it knows, and is then asked
for messages of another client (He et al., ACSAC 2019, without queries; another participant's copy, Li et al., CVPR
2022). What the two clients disagree about is error, so a surrogate is first fitted to what its messages must look like:
the attacker has the victims' messages, if not their images.
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
JUDGE_SHARE = 0.1  # of a limited budget
SCREENING_SHARE = 0.5  # of the iterations of a fit from several beginnings
REFLECTION_SHARE = 0.25  # for the best and its reflections
REFLECTING = 0.5  # of what each of these has, to become a reflection
REFLECTED_IMAGES = 32  # of a step
RISE, FIRST_RATE = 0.3, 0.04  # of a fit, and of its peak rate
Send = Callable[[Tensor], Tensor]
Draw = Callable[[int], Tensor]  # about so many images, at random, alike on average to those behind the messages
Loss = Callable[[nn.Module, Tensor], Tensor]  # of a client, for a batch of images


@dataclass(frozen=True)
class MomentFit:
    """How a surrogate is fitted: steps, images of a step, peak learning rate of Adam's one-cycle schedule."""

    iterations: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class FitTarget:
    """What a surrogate's messages shall be like.

    wanted: the moments of smashed data (n, c, h, w). draw: images to be sent; they need not be the victims', only alike
    on average. protect: the defense. further_loss: added to the distance of the moments; see :func:`moment_distance`.
    """

    wanted: Tensor
    draw: Draw
    protect: Send
    further_loss: Loss | None = None

    def loss(self, client: nn.Module, count: int) -> Tensor:
        """How unlike the messages of `client` are, for `count` images."""
        images = self.draw(count)
        loss = moment_distance(moments(self.protect(client(images))), self.wanted)
        return loss if self.further_loss is None else loss + self.further_loss(client, images)

    @torch.no_grad()
    def distance(self, client: nn.Module) -> float:
        """Distance of the moments alone, for as many images as it takes to compare clients."""
        sent = self.protect(in_batches(client)(self.draw(STATISTICS_IMAGES)))
        return float(moment_distance(moments(sent), self.wanted))


def fit_moments(client: nn.Module, likeness: FitTarget, fit: MomentFit, budget: Budget) -> None:
    """Train `client` (in place) until its messages are like that. One without parameters is left as it is."""
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
    """A cosine up from a twenty-fifth during the first three tenths, and one down to zero."""
    if spent < RISE:
        return FIRST_RATE + (1 - FIRST_RATE) * 0.5 * (1 - math.cos(math.pi * spent / RISE))
    return 0.5 * (1 + math.cos(math.pi * (spent - RISE) / (1 - RISE)))


def fit_best(clients: Sequence[nn.Module], likeness: FitTarget, fit: MomentFit, budget: Budget) -> nn.Module:
    """A client whose messages come to be like that, from several beginnings; see :func:`fit_moments`.

    What is within the reach of one beginning can be far from the client that made the messages. Which beginning is good
    shows early, so half of the iterations go to all of them alike. The moments of the client of images with reflected
    colours (`colour_reflection`) are nearly the same, so one in two beginnings ends there: the best is compared with
    its reflections. The best of these has the remaining iterations, and the further loss, to itself. A single client
    has all of them.
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
    """A copy of `client` that learns to send for images what `client` sends for their reflection `which`."""
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
    """`client` with the weights of its layers (not biases or norms) drawn anew from a normal of their deviation."""
    with torch.no_grad():
        for parameter in client.parameters():
            if parameter.dim() > 1:
                drawn = torch.randn(parameter.shape, generator=rng)
                parameter.copy_(drawn.to(parameter.device) * parameter.square().mean().sqrt())
    return client


def moments_agree(surrogate: MessageEncoder, smashed: Tensor, images: Tensor, rng: torch.Generator) -> bool:
    """Whether the moments of `smashed` are as near to those of the surrogate's messages for `images` as the moments
    of equally many of its messages are, drawn `RESAMPLED` times: then nothing says that the clients differ.
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
    """What clients send, and images that are alike on average to those behind it; for who attended a training.

    smashed: float (n, *smashed_shape). draw: images of the attacker's own. of_victims: whether it is the victims'.
    """

    smashed: Tensor
    draw: Draw
    of_victims: bool

    @classmethod
    def of(cls, view: AttackerView, recent: Tensor, view_of: Send) -> MessageSample:
        """The victims' messages, or where these are few (and training sent any) `recent` ones of training.

        view_of: what clients make of images in training, before they send them. Where these are augmented views,
        colours are so mixed up that hardly anything tells them apart.
        """
        images = view.auxiliary.nearest_images
        few = len(view.smashed) < ENOUGH_IMAGES and len(recent) > 0

        def draw(count: int) -> Tensor:
            chosen = images[sample(len(images), count, images.device)]
            return view_of(chosen) if few else chosen

        return cls(recent if few else view.smashed, draw, not few)


@dataclass(frozen=True)
class KnownImages:
    """The attacker's images, float (n, 3, h, w) in [0, 1], shared out.

    train: to learn from. nearest: those of `train` that are distributed most like the victims' images, see
    `AuxiliaryData.nearest`: what messages are like, on average, is seen on no others. validation: held out to choose
    by, see `AuxiliaryData.hold_out`. mean: (3, h, w): the guess of an attacker that has learned nothing.
    """

    train: Tensor
    nearest: Tensor
    validation: Tensor
    mean: Tensor

    @classmethod
    def of(cls, auxiliary: AuxiliaryData, rng: torch.Generator) -> KnownImages:
        """Share out `auxiliary`; raises ConfigurationError if it is a single image."""
        train, validation = held_out_split(auxiliary, VALIDATION_SHARE, rng)
        few = int(auxiliary.of_target.sum()) < ENOUGH_IMAGES
        nearest = train.images if few else train.images[train.of_target]
        return cls(train.images, nearest, validation.images, mean_image(nearest))

    def draw(self, rng: torch.Generator) -> Draw:
        """Draws from the nearest images, with replacement."""
        images = self.nearest
        return lambda count: images[torch.randint(len(images), (count,), generator=rng).to(images.device)]


@dataclass(frozen=True)
class Inversion:
    """What came of one surrogate.

    images: float (n, 3, h, w) in [0, 1]. explained: share of the variance of the victims' messages that the surrogate
    reproduces from `images`. confidence: the same relative to its own messages for known images, in [0, 1].
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

    They are drawn towards the mean of the known images as far as the surrogate, asked for messages of the
    reconstructions, explains less of the victims' messages than of its own for images it knows: a decoder for a wrong
    surrogate gives wrong images, not vague ones. Where the decoder learned nothing, that mean is returned.

    right_way_round: the surrogate cannot be that of reflected images; see `mocosfl_priv.inversion.colour_reflection`.
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
    for messages in (smashed, own.restore(theirs(smashed))):  # as they came, and with the surrogate's own moments
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
