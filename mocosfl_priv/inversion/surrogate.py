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
from mocosfl_priv.inversion.colour_reflection import JUDGE_STEPS, Reflections, signs_of, undo_reflection
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
    """How a surrogate client is fitted.

    Args:
        iterations: planned steps.
        batch_size: images of a step.
        learning_rate: peak of Adam's one-cycle schedule.

    >>> MomentFit(iterations=100, batch_size=32, learning_rate=0.1).iterations
    100
    """

    iterations: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class FitTarget:
    """What the messages of a surrogate client shall be like.

    Args:
        wanted: the :func:`moments` of the messages that were received, smashed data (n, *smashed_shape).
        draw: a number to about so many images, at random; they need not be the victims', only alike on average.
        protect: the defense's transformation.
        further_loss: of a client and a batch of images, added to the distance of the moments.
        colours: channels of the images.

    >>> images = torch.rand(16, 3, 8, 8)
    >>> target = FitTarget(moments(images), draw=lambda count: images[:count], protect=nn.Identity())
    >>> target.distance(nn.Conv2d(3, 3, 1)) > 0
    True
    """

    wanted: Tensor
    draw: Draw
    protect: Send
    further_loss: Loss | None = None
    colours: int = 3

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
    """Train a client in place until its messages have the moments of `likeness`.

    Args:
        client: images (n, 3, h, w) to smashed data. One without parameters is left as it is.
        likeness: what its messages shall be like.
        fit: steps and rate.
        budget: steps are drawn from it.

    >>> images, client = torch.rand(16, 3, 8, 8), nn.Conv2d(3, 3, 1)
    >>> target = FitTarget(moments(images), draw=lambda count: images[:count], protect=nn.Identity())
    >>> before = target.distance(client)
    >>> fit_moments(client, target, MomentFit(10, 16, 0.05), Budget())
    >>> target.distance(client) < before
    True
    """
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
    """Fit several clients, and go on with the one whose messages come nearest to `likeness`.

    What one beginning can reach may be far from the client that made the messages. This shows early, so half of the
    iterations go to all beginnings alike. The client of images with reflected colours has nearly the same moments, so
    about every other beginning ends there: the best one is then compared with its reflections. The best of these has
    the remaining iterations, and the further loss, to itself. A single client has all iterations.

    Args:
        clients: the beginnings, changed in place; at least one.
        likeness: what messages shall be like.
        fit: steps of all of them together, and rate.
        budget: steps are drawn from it.

    Returns:
        The best client, one of `clients` or a copy of one.

    >>> images = torch.rand(16, 3, 8, 8)
    >>> target = FitTarget(moments(images), draw=lambda count: images[:count], protect=nn.Identity())
    >>> fit_best([nn.Conv2d(3, 3, 1) for _ in range(2)], target, MomentFit(8, 16, 0.05), Budget())
    Conv2d(3, 3, kernel_size=(1, 1), stride=(1, 1))
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
    count = len(signs_of(likeness.colours))
    each = REFLECTION_SHARE * fit.iterations / (count + REFLECTING * (count - 1))
    learn = replace(fit, iterations=max(1, round(REFLECTING * each)), batch_size=REFLECTED_IMAGES)
    reflections = [
        _reflected(best, which, alone.draw, learn, turning.share(REFLECTING / (2 * count - which)))
        for which in range(1, count)
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
    """A client with weights drawn anew from a normal of their deviation; biases and norms are kept.

    Args:
        client: changed in place.
        rng: on the CPU.

    Returns:
        The same client.

    >>> client = nn.Linear(2, 2)
    >>> before = client.weight.detach().clone()
    >>> torch.equal(redrawn(client, torch.Generator().manual_seed(0)).weight, before)
    False
    """
    with torch.no_grad():
        for parameter in client.parameters():
            if parameter.dim() > 1:
                drawn = torch.randn(parameter.shape, generator=rng)
                parameter.copy_(drawn.to(parameter.device) * parameter.square().mean().sqrt())
    return client


def moments_agree(surrogate: MessageEncoder, smashed: Tensor, images: Tensor, rng: torch.Generator) -> bool:
    """Whether the moments of messages show no difference between their client and a surrogate.

    Equally many of the surrogate's own messages are drawn 20 times. The moments agree where those of `smashed` are no
    further from the moments of all of the surrogate's messages than the furthest of these draws is.

    Args:
        surrogate: makes messages of images.
        smashed: float (n, *smashed_shape), the messages that were received.
        images: float (m, 3, h, w) in [0, 1], alike on average to those behind `smashed`.
        rng: on the CPU.

    Returns:
        Whether they agree.

    >>> images = torch.rand(64, 3, 8, 8)
    >>> same = MessageEncoder(encode=lambda images: images, protect=lambda smashed: smashed)
    >>> moments_agree(same, 5 * images[:16], images, torch.Generator().manual_seed(0))
    False
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
    """Messages of clients, and images alike on average to those behind them; for attacks that attend a training.

    Args:
        smashed: float (n, *smashed_shape).
        draw: a number to about so many images of the attacker's own.
        of_victims: whether the messages are the victims'.

    >>> MessageSample(torch.rand(2, 4, 8, 8), draw=lambda count: torch.rand(count, 3, 8, 8), of_victims=True).of_victims
    True
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

    Args:
        train: to learn from.
        nearest: those of `train` whose distribution is most like that of the victims' images; see
            :attr:`AuxiliaryData.nearest`. Statistics of messages are taken from these only.
        validation: held out to choose by; see :meth:`AuxiliaryData.hold_out`.
        mean: (3, h, w), the guess of an attacker that has learned nothing.

    >>> images = AuxiliaryData(torch.rand(40, 3, 8, 8), of_target=torch.ones(40, dtype=torch.bool))
    >>> known = KnownImages.of(images, torch.Generator().manual_seed(0))
    >>> len(known.train), len(known.validation)
    (36, 4)
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
        images = train.images  # asked for once: where bytes are stored, every question makes new floats
        nearest = images if few else images[train.of_target]
        return cls(images, nearest, validation.images, mean_image(nearest))

    def draw(self, rng: torch.Generator) -> Draw:
        """Return a function that draws from `nearest` with replacement."""
        images = self.nearest
        return lambda count: images[torch.randint(len(images), (count,), generator=rng).to(images.device)]


@dataclass(frozen=True)
class Inversion:
    """What one surrogate led to.

    Args:
        images: float (n, 3, h, w) in [0, 1].
        explained: share of the variance of the victims' messages that the surrogate reproduces from `images`.
        confidence: the same relative to its own messages for known images, in [0, 1].

    >>> Inversion(torch.zeros(1, 3, 8, 8), explained=0.5, confidence=0.6).confidence
    0.6
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
    """Reconstruct the images behind messages with a decoder that learned to invert a surrogate client.

    After He et al., "Model Inversion Attacks Against Collaborative Inference", ACSAC 2019, without queries. A decoder
    for a wrong surrogate gives wrong images, not vague ones. So the images are moved towards the mean of the known ones
    as far as the surrogate, asked for messages of the reconstructions, explains less of the victims' messages than of
    its own. Where the decoder learned nothing, that mean is returned.

    Args:
        surrogate: makes messages of images.
        smashed: float (n, *smashed_shape), the victims' messages.
        known: the attacker's images.
        architecture: of the decoder; see :func:`build_decoder`.
        recipe: how the decoder is trained.
        budget: steps are drawn from it.
        compute: device and precision.
        rng: on the CPU.
        right_way_round: whether the surrogate is known not to be the client of images with reflected colours.

    Returns:
        Images, and how far they are to be trusted.

    Raises:
        RunFailedError: see :func:`train_inverter`.

    >>> from mocosfl_priv.config import ComputeConfig
    >>> images, rng = torch.rand(40, 3, 8, 8), torch.Generator().manual_seed(0)
    >>> known = KnownImages.of(AuxiliaryData(images, of_target=torch.ones(40, dtype=torch.bool)), rng)
    >>> same = MessageEncoder(encode=lambda images: images, protect=lambda smashed: smashed)
    >>> compute = Compute.resolve(ComputeConfig(device="cpu", precision="float32"))
    >>> invert_through(same, images[:4], known, "edsr_N0C16", Recipe(steps=5), Budget(), compute, rng).images.shape
    torch.Size([4, 3, 8, 8])
    """
    decoder = build_decoder(architecture, smashed.shape[1:], known.mean.shape)
    learning = budget if right_way_round else budget.share(1 - JUDGE_SHARE)
    inverter = train_inverter(
        decoder, surrogate, known.train, known.validation, recipe, learning, compute, rng, guess=known.mean
    )
    if inverter.blind:
        return Inversion(known.mean.expand(len(smashed), *known.mean.shape).clone(), 0.0, 0.0)
    own, theirs = inverter.standardise, Standardise(smashed, known.mean.shape[1:])
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
