"""FSHA: a malicious server trains the clients to send what it can invert (Pasquini et al., CCS 2021)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mocosfl_priv import (
    Attack,
    AttackerView,
    Budget,
    Capability,
    Learner,
    Message,
    ServerHooks,
    State,
    StreamView,
    build_decoder,
    derive_seed,
    drawn_generator,
)
from mocosfl_priv.inversion import (
    JUDGE_STEPS,
    FitTarget,
    MessageSample,
    MomentFit,
    believable,
    build_critic,
    build_pilot,
    check_architecture,
    check_own_decoder,
    fit_best,
    in_batches,
    moco_v2_view,
    moment_distance,
    moments,
    redrawn,
    sample,
)
from mocosfl_priv.plugins import under, within

CALIBRATION_IMAGES = 512
FIT_BATCH = 64
LISTENING_SHARE = 0.25  # of the training, at most
NEWEST = 0.2  # weight of a message among those before it, whose clients were others


class FshaAttack(Attack):
    """Feature-space hijacking: replace the clients' gradients, so that they learn the server's own feature space.

    While the clients train, the server trains a pilot encoder with its inverse on auxiliary images, and a critic
    (WGAN-GP) that tells the pilot's features from received smashed data. Clients get the gradient that makes the
    critic take theirs for the pilot's. The inverse then decodes what they send. MocoSFL's clients send augmented views,
    so pilot and critic see auxiliary images under the same augmentation; the inverse also sees plain ones, as victims
    are. Who knows the client's architecture gives it to the pilot: a feature space that clients can reach.

    Two things are ours, without which clients of another making than the paper's end where no critic tells their
    features from the pilot's and the inverse makes nothing of them. The server first listens, passing the honest
    gradient on, and begins with a pilot whose features have the moments of what clients send: they have no long way
    to go. And it never pushes harder than the honest gradient did: one that has the same sign everywhere kills
    channels in two steps.

    As in SDAR, only images of the target distribution, where there are enough, stand for the clients'; the inverse goes
    on learning from all when the training is over.

    Frozen clients take no gradient, so nothing is hijacked, and what the inverse says is a guess.

    patience: messages before the hijack, at most a quarter of all. starts, iterations, fit_rate: pilots that are begun
    then, steps of all of them, within one message and whatever the limits, and learning rate; the one whose features
    come nearest is taken. strength: bound on the gradient that clients get, relative to the largest honest one that was
    passed on (not to that of the same message, which grows as hijacked clients leave what the server knows).
    moment_weight: of the distance to the second moments of the pilot's features, beside the critic. penalty: weight
    of the gradient penalty. rows: of a message and of the auxiliary images, for one step. updates: steps per
    message. architecture: of the inverse, in the decoder grammar. epochs: passes over the auxiliary images, in
    which the inverse alone goes on learning after the training. pilot_learning_rate: of the pilot.
    learning_rate: of the inverse. critic_learning_rate: of the critic.
    """

    needs = frozenset({Capability.GRADIENT_CHANNEL, Capability.AUXILIARY_DATA})
    optional = frozenset({Capability.ARCHITECTURE})

    def __init__(
        self,
        architecture: str = "res_normN1C32",
        epochs: Annotated[int, Field(ge=0)] = 10,
        patience: Annotated[int, Field(ge=1)] = 20,
        starts: Annotated[int, Field(ge=1)] = 12,
        iterations: Annotated[int, Field(ge=1)] = 4000,
        fit_rate: Annotated[float, Field(gt=0)] = 0.1,
        strength: Annotated[float, Field(gt=0)] = 1.0,
        moment_weight: Annotated[float, Field(ge=0)] = 1.0,
        penalty: Annotated[float, Field(ge=0)] = 10.0,
        rows: Annotated[int, Field(ge=2, le=1024)] = 32,
        updates: Annotated[int, Field(ge=1, le=10)] = 1,
        pilot_learning_rate: Annotated[float, Field(gt=0)] = 1e-4,
        learning_rate: Annotated[float, Field(gt=0)] = 2e-3,
        critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-3,
    ) -> None:
        check_architecture(architecture)
        self.architecture = architecture
        self.epochs = epochs
        self.patience = patience
        self.starts = starts
        self.fit = MomentFit(iterations, FIT_BATCH, fit_rate)
        self.strength = strength
        self.moment_weight = moment_weight
        self.penalty = penalty
        self.rows = rows
        self.updates = updates
        self.pilot_learning_rate = pilot_learning_rate
        self.learning_rate = learning_rate
        self.critic_learning_rate = critic_learning_rate

    def check(self, smashed_shape: Sequence[int], image_shape: Sequence[int]) -> None:
        check_own_decoder(self.architecture, smashed_shape, image_shape)

    def attend(self, stream: StreamView, seed: int) -> ServerHooks:
        return Hijacker(self, stream)

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        hijacker = view.listener
        assert isinstance(hijacker, Hijacker), "GRADIENT_CHANNEL is granted, so this attack attended the training"
        pilot, inverse = hijacker.pilot.network, copy.deepcopy(hijacker.inverse.network)
        images, stream = view.auxiliary.images, hijacker.stream
        per_epoch = -(-len(images) // self.rows)
        optimiser = torch.optim.Adam(inverse.parameters(), lr=self.learning_rate)
        for _ in budget.iterate(self.epochs * per_epoch):
            batch = images[sample(len(images), self.rows, images.device)]
            batch = torch.where(torch.rand(len(batch), 1, 1, 1, device=batch.device) < 0.5, batch.flip(3), batch)
            with torch.no_grad():
                features = stream.protect(pilot(batch))
            optimiser.zero_grad(set_to_none=True)
            F.mse_loss(inverse(features), batch).backward()
            optimiser.step()
        with torch.no_grad():
            seen = MessageSample.of(view, hijacker.recent, _view)
            return believable(
                in_batches(pilot), stream.protect, in_batches(inverse), seen.draw(CALIBRATION_IMAGES), seen.smashed,
                view.smashed, budget.iterate(JUDGE_STEPS), torch.Generator().manual_seed(derive_seed(seed, "fsha")),
            )  # fmt: skip


class Hijacker:
    """Pilot, inverse and critic, trained along with the clients; implements `ServerHooks`.

    recent: smashed data of the last message, float (n, *smashed_shape); empty before the first.
    """

    def __init__(self, attack: FshaAttack, stream: StreamView) -> None:
        device = stream.compute.device
        self.stream = stream
        self._attack = attack
        self._images = stream.auxiliary.nearest_images
        inverse = build_decoder(attack.architecture, stream.smashed_shape, stream.image_shape)
        rate, critic_rate = attack.learning_rate, attack.critic_learning_rate
        self.pilot = Learner.with_adam(self._new_pilot(), attack.pilot_learning_rate)
        self.inverse = Learner.with_adam(inverse.to(device), rate)
        self.critic = Learner.with_adam(build_critic(stream.smashed_shape).to(device), critic_rate, momentum=0.0)
        self.recent = torch.empty(0, *stream.smashed_shape, device=device)
        nothing = torch.empty(0, stream.smashed_shape[0], device=device)
        self.heard = nothing  # moments of what clients sent before the hijack; empty before the first message
        self.target = nothing  # moments of the pilot's features; empty before the hijack
        self.waited = torch.zeros((), dtype=torch.long)  # messages
        self.honest_push = torch.zeros((), device=device)  # largest of the gradients that were passed on meanwhile

    def _new_pilot(self) -> nn.Module:
        """With weights of its own; of the client's architecture for who knows it."""
        if not self.stream.has(Capability.ARCHITECTURE):
            pilot = build_pilot(self.stream.image_shape, self.stream.smashed_shape)
        else:
            rng = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
            pilot = redrawn(self.stream.untrained_client(), rng)
        return pilot.requires_grad_(True).to(self.stream.compute.device)

    def received(self, message: Message) -> None:
        """Listen; then train pilot and inverse on auxiliary images, the critic on their features and the clients'."""
        rows = self._attack.rows
        patience = max(1, min(self._attack.patience, int(LISTENING_SHARE * message.steps)))
        if self.waited < patience:
            self._listen(message, last=int(self.waited) == patience - 1)
            return
        self.recent = message.queries[sample(len(message.queries), rows, message.queries.device)]
        for _ in range(self._attack.updates):
            chosen = self._images[sample(len(self._images), rows, self._images.device)]
            views = _view(chosen)
            images = torch.cat([views, chosen])
            features = self.stream.protect(self.pilot.network(images))
            loss = F.mse_loss(self.inverse.network(features), images)
            self.pilot.learn(loss)
            self.inverse.learn(loss)
            foreign = message.queries[sample(len(message.queries), len(views), message.queries.device)]
            own = features[: len(views)].detach()
            self.critic.learn(self._distance(own[: len(foreign)], foreign))
            self.target = moments(own) if not len(self.target) else self.target.lerp(moments(own), 0.1)

    def _listen(self, message: Message, last: bool) -> None:
        """Average the moments of messages; after the last one fit the pilot to them."""
        now = moments(message.queries)
        self.waited = self.waited + 1
        self.heard = now if not len(self.heard) else self.heard.lerp(now, max(1 / int(self.waited), NEWEST))
        if last:
            self._fit_pilot()

    def _fit_pilot(self) -> None:
        """Give the pilot the weights with which its features come nearest to what clients send."""
        device = self._images.device

        def draw(count: int) -> Tensor:
            chosen = self._images[sample(len(self._images), count, device)]
            return _view(chosen)

        pilots = [self._new_pilot() for _ in range(self._attack.starts)]
        fit = self._attack.fit
        best = fit_best(pilots, FitTarget(self.heard, draw, self.stream.protect), fit, Budget())
        self.pilot.network.load_state_dict(best.state_dict())

    def _distance(self, own: Tensor, foreign: Tensor) -> Tensor:
        """The critic's loss: Wasserstein distance with gradient penalty (Gulrajani et al., NeurIPS 2017)."""
        critic = self.critic.network
        share = torch.rand(len(own), *[1] * (own.dim() - 1), device=own.device)
        between = (share * own + (1 - share) * foreign).requires_grad_(True)
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return critic(foreign).mean() - critic(own).mean() + self._attack.penalty * penalty

    def returned(self, message: Message, gradient: Tensor) -> Tensor:
        """The gradient down which smashed data becomes like the pilot's features."""
        if not len(self.target):
            self.honest_push = torch.maximum(self.honest_push, _push(gradient))
            return gradient
        smashed = message.queries.requires_grad_(True)
        (ascent,) = torch.autograd.grad(self.critic.network(smashed).mean(), smashed)
        (descent,) = torch.autograd.grad(moment_distance(moments(smashed), self.target), smashed)
        wanted = self._attack.moment_weight * descent - ascent
        bound = self._attack.strength * self.honest_push
        return wanted * (bound / _push(wanted).clamp(min=1e-12)).clamp(max=1)

    def state(self) -> State:
        """Networks, their optimisers, the last message, and what was heard before the hijack."""
        return {
            **under("pilot", self.pilot.state()),
            **under("inverse", self.inverse.state()),
            **under("critic", self.critic.state()),
            "recent": self.recent,
            "target": self.target,
            "heard": self.heard,
            "waited": self.waited,
            "honest_push": self.honest_push,
        }

    def load_state(self, state: State) -> None:
        """Go on where :meth:`state` was taken."""
        self.pilot.load_state(within(state, "pilot"))
        self.inverse.load_state(within(state, "inverse"))
        self.critic.load_state(within(state, "critic"))
        self.recent = state["recent"].to(self.recent.device)
        self.target = state["target"].to(self.target.device)
        self.heard = state["heard"].to(self.heard.device)
        self.waited = state["waited"].cpu()
        self.honest_push = state["honest_push"].to(self.honest_push.device)


def _view(images: Tensor) -> Tensor:
    """What clients make of images in training."""
    return moco_v2_view(images, drawn_generator(images.device))


def _push(gradient: Tensor) -> Tensor:
    """How far a gradient (n, c, h, w) moves whole channels: one that has the same sign everywhere, as this attack's
    has and an honest one does not, moves biases by far more than its norm says.
    """
    return gradient.sum((0, 2, 3)).norm()
