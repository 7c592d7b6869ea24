"""SDAR: simulate the client beside the live server, passively, and decode (Zhu et al., NDSS 2025)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Protocol

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
    BATCH_FOR_INFERENCE,
    JUDGE_STEPS,
    FitTarget,
    Labelled,
    MessageSample,
    MomentFit,
    Unlabelled,
    believable,
    build_critic,
    check_architecture,
    check_own_decoder,
    fit_best,
    in_batches,
    info_nce,
    moco_v2_view,
    moment_distance,
    moments,
    redrawn,
    sample,
)
from mocosfl_priv.plugins import under, within

CALIBRATION_IMAGES = 512
FIT_BATCH = 64
FIT_SHARE = 0.5  # of a limited time
TEMPERATURE = 0.2


class SdarAttack(Attack):
    """Train a simulator of the client on auxiliary images against the live server, and a decoder of its output.

    At every message the simulator, of the client's architecture, learns the task of the training with the server's
    networks as they are at that moment, while a discriminator makes its output look like received smashed data. The
    decoder learns to invert the simulator, while a second discriminator makes *decoded smashed data of the clients*
    look like images. (A public port shows that discriminator decoded data of the simulator instead, and so loses what
    the term is for.) The clients are not disturbed.

    Where messages carry labels, the task is classification and everything but the simulator is conditioned on labels,
    as published. The victims' labels are then read from the server's logits. MocoSFL's clients send none: there the
    simulator learns the contrastive task through the server's trunk and projector, with received keys as further
    negatives. That unlabelled variant is our own contribution, not the paper's.

    feature_weight, image_weight: of the two adversarial terms, beside the task's loss and the MSE. moment_weight:
    of the distance to the second moments of received data, ours, which leads where a discriminator has no time to.
    rows: of a message and of the auxiliary images, for one step. updates: steps per message. architecture: of the
    decoder, in the decoder grammar. epochs: passes over the auxiliary images, in which the decoder alone goes on
    learning after the training. learning_rate: of simulator and decoder. critic_learning_rate: of both discriminators.

    Only images of the target distribution, where the attacker has enough of them, stand for the clients': output for
    others is not like smashed data of the clients even where the simulator is their client. After the training the
    decoder goes on learning from all.

    starts: simulators that are begun afresh after the training beside the one that went along, since training can take
    any of them to where it no longer comes nearer; ours, too. The one whose output has the moments of the victims'
    messages, or where these are few of what training sent last, in a running mean, goes on. iterations, fit_rate: steps
    and learning rate of all of them.
    """

    needs = frozenset({Capability.TRAINING_STREAM, Capability.AUXILIARY_DATA, Capability.ARCHITECTURE})

    def __init__(
        self,
        architecture: str = "res_normN1C32",
        epochs: Annotated[int, Field(ge=0)] = 10,
        feature_weight: Annotated[float, Field(ge=0)] = 0.1,
        moment_weight: Annotated[float, Field(ge=0)] = 1.0,
        image_weight: Annotated[float, Field(ge=0)] = 1e-3,
        rows: Annotated[int, Field(ge=2, le=1024)] = 32,
        updates: Annotated[int, Field(ge=1, le=10)] = 1,
        learning_rate: Annotated[float, Field(gt=0)] = 2e-3,
        critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-3,
        starts: Annotated[int, Field(ge=0)] = 12,
        iterations: Annotated[int, Field(ge=1)] = 4000,
        fit_rate: Annotated[float, Field(gt=0)] = 0.1,
    ) -> None:
        check_architecture(architecture)
        self.architecture = architecture
        self.epochs = epochs
        self.feature_weight = feature_weight
        self.moment_weight = moment_weight
        self.image_weight = image_weight
        self.rows = rows
        self.updates = updates
        self.learning_rate = learning_rate
        self.critic_learning_rate = critic_learning_rate
        self.starts = starts
        self.fit = MomentFit(iterations, FIT_BATCH, fit_rate)

    def check(self, smashed_shape: Sequence[int], image_shape: Sequence[int]) -> None:
        check_own_decoder(self.architecture, smashed_shape, image_shape)

    def attend(self, stream: StreamView, seed: int) -> ServerHooks:
        return Simulation(self, stream)

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        simulation = view.listener
        assert isinstance(simulation, Simulation), "TRAINING_STREAM is granted, so this attack attended the training"
        rng = torch.Generator().manual_seed(derive_seed(seed, "sdar"))
        decoder, stream = copy.deepcopy(simulation.decoder.network), simulation.stream
        images, labels = view.auxiliary.images, view.auxiliary.labels
        seen = MessageSample.of(view, simulation.recent, lambda images: simulation.task.views(images)[0])

        simulator = copy.deepcopy(simulation.simulator.network)
        afresh = [redrawn(stream.untrained_client().requires_grad_(True), rng) for _ in range(self.starts)]
        wanted = moments(seen.smashed) if seen.of_victims else simulation.target
        likeness = FitTarget(wanted, seen.draw, stream.protect)
        simulator = fit_best([simulator, *afresh], likeness, self.fit, budget.share(FIT_SHARE))
        per_epoch = -(-len(images) // self.rows)
        optimiser = torch.optim.Adam(decoder.parameters(), lr=self.learning_rate)
        for _ in budget.iterate(self.epochs * per_epoch):
            chosen = sample(len(images), self.rows, images.device)
            batch = _mirrored(images[chosen])
            with torch.no_grad():
                features = stream.protect(simulator(batch))
            optimiser.zero_grad(set_to_none=True)
            F.mse_loss(decoder(features, _at(labels, chosen)), batch).backward()
            optimiser.step()
        with torch.no_grad():
            decode = partial(simulation.decode, decoder)
            return believable(
                in_batches(simulator), stream.protect, decode, seen.draw(CALIBRATION_IMAGES), seen.smashed,
                view.smashed, budget.iterate(JUDGE_STEPS), rng,
            )  # fmt: skip


class Task(Protocol):
    """What the clients are trained for, as far as the simulator has to know it."""

    classes: int

    def views(self, images: Tensor) -> list[Tensor]:
        """Auxiliary images (n, 3, h, w) as clients would show them to their models, once or twice."""

    def loss(self, stream: StreamView, simulated: list[Tensor], labels: Tensor | None, message: Message) -> Tensor:
        """The simulator's loss for its output on those views, through the live server."""


class Contrastive:
    """MoCo's task, without labels: two views of an image shall meet behind the server's networks."""

    classes = 0

    def views(self, images: Tensor) -> list[Tensor]:
        rng = drawn_generator(images.device)
        return [moco_v2_view(images, rng), moco_v2_view(images, rng)]

    def loss(self, stream: StreamView, simulated: list[Tensor], labels: Tensor | None, message: Message) -> Tensor:
        first, second = (F.normalize(stream.server(smashed), dim=1) for smashed in simulated)
        with torch.no_grad():
            received = F.normalize(stream.server(message.keys[: len(first)]), dim=1)
        return info_nce(first, second, received, TEMPERATURE) + info_nce(second, first, received, TEMPERATURE)


class Supervised:
    """Classification, with labels at the server: what SDAR was published for."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def views(self, images: Tensor) -> list[Tensor]:
        return [_mirrored(images)]

    def loss(self, stream: StreamView, simulated: list[Tensor], labels: Tensor | None, message: Message) -> Tensor:
        assert labels is not None
        return F.cross_entropy(stream.server(simulated[0]), labels)


class Simulation:
    """Simulator, decoder and their discriminators, trained beside the clients; implements `ServerHooks`.

    recent: smashed data of the last message, float (n, *smashed_shape); empty before the first.
    """

    def __init__(self, attack: SdarAttack, stream: StreamView) -> None:
        device = stream.compute.device
        self.stream = stream
        self._attack = attack
        nearest = stream.auxiliary.nearest
        self._images, self._labels = nearest.images, nearest.labels
        self.recent = torch.empty(0, *stream.smashed_shape, device=device)
        self.target = torch.empty(0, stream.smashed_shape[0], device=device)  # moments; empty before the first message
        if self._labels is None:
            self.task: Task = Contrastive()
        else:
            with torch.no_grad():
                self.task = Supervised(stream.server(torch.zeros(1, *stream.smashed_shape, device=device)).shape[1])
        smashed, image = stream.smashed_shape, stream.image_shape
        rate, critic_rate = attack.learning_rate, attack.critic_learning_rate
        self.simulator = Learner.with_adam(stream.untrained_client().requires_grad_(True).to(device), rate)
        decoder = build_decoder(attack.architecture, self._judged(smashed), image)
        self.decoder = Learner.with_adam(self._with_labels(decoder, smashed).to(device), rate)
        critics = [self._with_labels(build_critic(self._judged(shape)), shape).to(device) for shape in (smashed, image)]
        self.feature_critic, self.image_critic = (
            Learner.with_adam(critic, critic_rate, momentum=0.5) for critic in critics
        )

    def _judged(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of maps with the channel that labels take, where there are labels."""
        return (shape[0] + 1, *shape[1:]) if self.task.classes else shape

    def _with_labels(self, network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
        return Labelled(network, self.task.classes, shape[1:]) if self.task.classes else Unlabelled(network)

    def received(self, message: Message) -> None:
        """One round of all four networks, or as many as `updates` says."""
        now = moments(message.queries)
        self.target = now if not len(self.target) else self.target.lerp(now, 0.1)
        for _ in range(self._attack.updates):
            rows = sample(len(message.queries), self._attack.rows, message.queries.device)
            self._update(message, message.queries[rows], _at(message.labels, rows))
        self.recent = message.queries[rows]

    def _update(self, message: Message, foreign: Tensor, foreign_labels: Tensor | None) -> None:
        chosen = sample(len(self._images), self._attack.rows, self._images.device)
        plain, labels = self._images[chosen], _at(self._labels, chosen)
        views = self.task.views(plain)
        simulator, decoder = self.simulator.network, self.decoder.network
        judge, image_judge = self.feature_critic.network, self.image_critic.network

        simulated = [self.stream.protect(simulator(view)) for view in views]
        verdict = judge(simulated[0], labels)
        task = self.task.loss(self.stream, simulated, labels, message)
        distance = moment_distance(moments(torch.cat(simulated)), self.target)
        likeness = self._attack.feature_weight * _taken_for_real(verdict) + self._attack.moment_weight * distance
        self.simulator.learn(task + likeness)
        told = judge(simulated[0].detach(), labels)
        self.feature_critic.learn(_taken_for_real(judge(foreign, foreign_labels)) + _taken_for_fake(told))

        images = torch.cat([views[0], plain])
        with torch.no_grad():
            features = self.stream.protect(simulator(images))
        known = None if labels is None else torch.cat([labels, labels])
        decoded = decoder(foreign, foreign_labels)  # of the clients: the discriminator's fakes
        adversarial = _taken_for_real(image_judge(decoded, foreign_labels))
        error = F.mse_loss(decoder(features, known), images)
        self.decoder.learn(error + self._attack.image_weight * adversarial)
        told = image_judge(decoded.detach(), foreign_labels)
        self.image_critic.learn(_taken_for_real(image_judge(views[0], labels)) + _taken_for_fake(told))

    def returned(self, message: Message, gradient: Tensor) -> Tensor:
        """Unchanged: the attack is passive."""
        return gradient

    def decode(self, decoder: nn.Module, smashed: Tensor) -> Tensor:
        """Images for smashed data; labels, where the decoder wants them, are those that the server gives."""
        images = [
            decoder(batch, self.stream.server(batch).argmax(1) if self.task.classes else None)
            for batch in smashed.split(BATCH_FOR_INFERENCE)
        ]
        return torch.cat(images).float()

    def state(self) -> State:
        """Networks, their optimisers, and the last message."""
        kept: State = {"recent": self.recent, "target": self.target}
        for name, learner in self._learners().items():
            kept |= under(name, learner.state())
        return kept

    def load_state(self, state: State) -> None:
        """Go on where :meth:`state` was taken."""
        self.recent = state["recent"].to(self.recent.device)
        self.target = state["target"].to(self.target.device)
        for name, learner in self._learners().items():
            learner.load_state(within(state, name))

    def _learners(self) -> dict[str, Learner]:
        return {
            "simulator": self.simulator,
            "decoder": self.decoder,
            "feature_critic": self.feature_critic,
            "image_critic": self.image_critic,
        }


def _taken_for_real(score: Tensor) -> Tensor:
    return F.softplus(-score).mean()


def _taken_for_fake(score: Tensor) -> Tensor:
    return F.softplus(score).mean()


def _mirrored(images: Tensor) -> Tensor:
    flips = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(flips.to(images.device), images.flip(3), images)


def _at(labels: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if labels is None else labels[rows.to(labels.device)]
