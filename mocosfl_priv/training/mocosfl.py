"""The training engine of MocoSFL (Li et al., ICLR 2023): one step of all clients and of the server.

Forward: images -> client layers -> defense -> message (smashed data) -> server trunk -> loss. The gradient returns
along the same path.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.models.split import SplitModel, count_parameters
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.seeding import generator
from mocosfl_priv.training.client_signature import (
    COMPARED_CLIENTS,
    COMPARED_IMAGES,
    ClientCopies,
    client_signature,
)
from mocosfl_priv.training.clients import ClientBank, Clients, EqualClients, FrozenClients, Kernel, fastest_kernel
from mocosfl_priv.training.codecs import message_bytes
from mocosfl_priv.training.hooks import ClientHooks, Message, NoHooks, ServerHooks, Unattended
from mocosfl_priv.training.message_count import encodes_once
from mocosfl_priv.training.participants import Participants, RemoteParticipants, Simulated, client_by_client
from mocosfl_priv.training.replay import Replay
from mocosfl_priv.training.sampling import Batches, ClientBatch, PoolShape
from mocosfl_priv.training.schedule import client_rates, server_rate
from mocosfl_priv.training.server import MocoServer
from mocosfl_priv.training.state import State, counted, numbered, under, within

PARTICIPANTS = 2  # clients whose own parameters a trained model keeps: a victim, and a client that colludes against it


@dataclass
class Traffic:
    """Payload bytes sent so far, by kind and direction.

    Smashed data and gradients are counted message by message as their codec encodes them, weights as float32.
    """

    smashed_up: int = 0
    gradient_down: int = 0
    weights_up: int = 0
    weights_down: int = 0

    @property
    def total(self) -> int:
        """Bytes of all kinds, in both directions."""
        return self.smashed_up + self.gradient_down + self.weights_up + self.weights_down


class MocoSFL:
    """A training in progress: clients, server, and all state that determines the next step.

    The arguments are those of :func:`mocosfl_priv.training.loop.train_mocosfl`. replay_folder: where replay stores
    smashed data; a temporary folder if None.
    """

    def __init__(
        self,
        model: SplitModel,
        batches: Batches,
        training: TrainingConfig,
        *,
        steps: int,
        compute: Compute,
        seed: int,
        hooks: ClientHooks | None = None,
        server_hooks: ServerHooks | None = None,
        frozen_client: bool = False,
        learning_rate: float | None = None,
        replay_folder: Path | None = None,
        remote: RemoteParticipants | None = None,
    ) -> None:
        self.model = model.to(compute.device)
        self.training = training
        self.steps = steps
        self.step_count = 0
        self.traffic = Traffic()
        self._batches = batches
        self._compute = compute
        self.hooks = hooks or NoHooks()
        self.server_hooks = server_hooks or Unattended()
        self._rate = training.learning_rate if learning_rate is None else learning_rate
        self._replay_rng = generator(seed, "replay")
        self.clients = self._make_clients(frozen_client, may_be_one=remote is None)
        simulated = Simulated(
            self.clients, self.hooks, training, compute,
            generator(seed, "augmentation", device=compute.device), generator(seed, "defense", device=compute.device),
        )  # fmt: skip
        self.participants: Participants = simulated if remote is None else remote(model, simulated)
        self.server = MocoServer(
            model.trunk, model.projector, training, compute, generator(seed, "feature memory", device=compute.device)
        )
        settings = training.replay
        self.replay = Replay(settings.threshold, settings.warmup_epochs, replay_folder) if settings else None
        self._replay_order: list[int] = []
        self._epoch_losses: list[Tensor] = []
        self._pool = torch.arange(batches.clients)
        self._unsynchronised = False  # whether a client has learned since the last synchronisation
        # both copied just before the last averaging, which removes or reduces the differences between clients
        self._before_averaging: tuple[State, ...] = ()  # parameters of the pool's first clients
        self._compared: ClientCopies | None = None  # what the client signature is computed from
        self._client_bytes = 4 * count_parameters(model.client)

    def _make_clients(self, frozen: bool, may_be_one: bool) -> Clients:
        if frozen:
            return FrozenClients(self.model.client, self._batches.clients)
        shape = PoolShape.of(self.training)
        everybody = self.training.clients == self._batches.clients
        if may_be_one and everybody and EqualClients.fits(self.training, shape.pool):
            return EqualClients(self.model.client, self._batches.clients, self.training)
        kernel: Kernel
        if self._compute.client_kernel == "measure":
            single = self.training.paper_gradient == "one_sided"
            rows = shape.micro_batch * (1 if single else self._views)
            together = min(shape.pool, max(1, self._compute.rows_per_pass // rows))
            kernel = fastest_kernel(self.model.client, together, rows, self.model.image_shape, self._compute)
        else:
            kernel = self._compute.client_kernel
        return ClientBank(self.model.client, self._batches.clients, self.training, kernel)

    @property
    def kernel(self) -> str:
        """The kernel of the client bank, or "shared" where a single model stands for all clients."""
        return self.clients.kernel if type(self.clients) is ClientBank else "shared"

    def step(self) -> Tensor:
        """Run one training step and return its loss, a detached scalar.

        The pool's clients and the server take part; in state C of replay, only the server.
        """
        replay = self.replay
        if replay is not None and replay.status == "C" and replay.available:
            loss = self._replayed_step(replay)
        else:
            loss = self._full_step()
        self.step_count += 1
        self._end_epoch(loss)
        return loss

    def _full_step(self) -> Tensor:
        learning = self.clients.trainable and (self.replay is None or self.replay.status == "A")
        batch = self.participants.present(self._batches.next(), self.step_count, learning)
        self._pool = batch.pool
        parts: list[State] = []
        images_per_pass = max(1, self._compute.rows_per_pass // self._views)
        losses = [self._exchange(part, sum(batch.sizes), learning, parts) for part in batch.chunks(images_per_pass)]
        if learning:
            self.participants.end_step()
        self.server.learn(server_rate(self.training, self._rate, self.step_count, self.steps))
        if self.replay is not None and self.replay.status == "B":
            self.replay.store(parts)
        self._unsynchronised |= learning
        due = (self.step_count + 1) % self.training.sync_period == 0 or batch.pool_changes
        if self._unsynchronised and due:
            self._synchronise(batch)
            self._unsynchronised = False
        return torch.stack(losses).sum()

    @property
    def _views(self) -> int:
        return 2 if self.training.symmetric else 1

    def _exchange(self, part: ClientBatch, batch_images: int, learning: bool, parts: list[State]) -> Tensor:
        """Run the step for the clients of `part`, from images to update, and return their share of the loss.

        In state B of replay, what the clients sent is appended to `parts`.
        """
        images = sum(part.sizes)
        sent = self.participants.send(part, self.step_count, learning)
        for rows in (sent.queries, sent.keys):
            self.traffic.smashed_up += message_bytes(rows, self.training.codec)
        queries, keys, own = sent.queries, sent.keys, None
        if self.training.symmetric and encodes_once(self.training, not self.clients.trainable):
            order = client_by_client(part.sizes, queries.device)
            queries, keys = torch.cat([queries, keys])[order], torch.cat([keys, queries])[order]
            own = order < images  # rows that the clients' online models encoded; only these get a gradient
        client_ids = part.pool.repeat_interleave(self._views * torch.tensor(part.sizes))
        if self.replay is not None and self.replay.status == "B":
            scale = torch.tensor(1 / batch_images, dtype=torch.float64)
            parts.append({"queries": queries, "keys": keys, "client_ids": client_ids, "scale": scale})
        message = Message(self.step_count, self.steps, client_ids, queries, keys)
        self.server_hooks.received(message)
        loss, gradient = self.server.score(queries, keys, client_ids, 1 / batch_images, learning)
        if learning:
            assert gradient is not None
            gradient = self.server_hooks.returned(message, gradient)
            returned = gradient if own is None else gradient[own]
            self.traffic.gradient_down += message_bytes(returned, self.training.gradient_codec)
            taken = self.clients.steps_taken[part.pool]
            rates = client_rates(self.training, self._rate, self.step_count, self.steps, taken)
            self.participants.receive(part, returned, images / batch_images, rates)
        return loss

    def _replayed_step(self, replay: Replay) -> Tensor:
        """Train the server on smashed data stored in an earlier epoch; no client takes part."""
        if not self._replay_order:
            self._replay_order = replay.order(self._replay_rng)
        losses = []
        for part in replay.load(self._replay_order.pop(), self._compute.device):
            client_ids, scale = part["client_ids"].cpu(), float(part["scale"])
            loss, _ = self.server.score(part["queries"], part["keys"], client_ids, scale, False)
            losses.append(loss)
        self.server.learn(server_rate(self.training, self._rate, self.step_count, self.steps))
        return torch.stack(losses).sum()

    def _synchronise(self, batch: ClientBatch) -> None:
        self._before_averaging = self._own_copies()
        self._compared = self._copies_to_compare(batch.images)
        self.participants.average(batch.pool)
        models = 2 if self.training.average_momentum_models else 1
        self.traffic.weights_up += models * len(batch.pool) * self._client_bytes
        self.traffic.weights_down += models * self._batches.clients * self._client_bytes

    def _own_copies(self) -> tuple[State, ...]:
        return tuple(self.participants.individual(client) for client in self._pool[:PARTICIPANTS].tolist())

    def _copies_to_compare(self, images: Tensor) -> ClientCopies | None:
        """Copy what the client signature is computed from: some clients' models and some of the step's images.

        None where all clients share one model, run outside this process, or are too few to compare.
        """
        if type(self.clients) is not ClientBank or not isinstance(self.participants, Simulated):
            return None
        online, key = self.clients.copies(self._pool[:COMPARED_CLIENTS])
        copies = ClientCopies(online, key, images[:COMPARED_IMAGES].clone())
        return copies if copies.enough else None

    def client_signature(self) -> float | None:
        """Measure the client signature, in nats, of the clients as they were just before the last averaging.

        See :func:`mocosfl_priv.training.client_signature.client_signature`. None where all clients share one model, run
        on devices, or have not been averaged yet.
        """
        if self._compared is None:
            return None
        server = self.server
        return client_signature(
            self._compared, self.model.client, server.online, server.key, self.training.temperature, self._compute
        )

    def _end_epoch(self, loss: Tensor) -> None:
        if self.replay is None:
            return
        self._epoch_losses.append(loss)
        epoch = self.step_count * self.training.epochs // self.steps
        if epoch > (self.step_count - 1) * self.training.epochs // self.steps:
            self.replay.end_epoch(epoch, float(torch.stack(self._epoch_losses).mean()))
            self._epoch_losses = []
            self._replay_order = []

    def assemble(self) -> SplitModel:
        """Return the current model: the server's trunk and projector, and the mean of the last pool as the client.

        Its `participants` are parameters of single clients. If a client has learned since the last averaging, or there
        was none, these are the current ones; otherwise those from just before it, since averaging removes or reduces
        the differences between clients.
        """
        if self.clients.trainable:
            # not strict: the mean holds parameters only, since buffers are constants of the architecture
            self.model.client.load_state_dict(self.participants.consensus(self._pool), strict=False)
        apart = self._unsynchronised or not self._before_averaging
        self.model.participants = self._own_copies() if apart else self._before_averaging
        return self.model

    def state(self) -> tuple[State, dict[str, Any]]:
        """Return everything that :meth:`load_state` needs to continue exactly: tensors, and facts that fit JSON."""
        tensors = {
            **self.participants.state(),
            **under("server", self.server.state()),
            **under("batches", self._batches.state()),
            **under("hooks", self.hooks.state()),
            **under("server_hooks", self.server_hooks.state()),
            "pool": self._pool,
            **numbered("before_averaging", self._before_averaging),
            **under("compared", self._compared.state() if self._compared else {}),
            "epoch_losses": torch.stack(self._epoch_losses) if self._epoch_losses else torch.empty(0),
            "rng.replay": self._replay_rng.get_state(),
            "rng.global": torch.get_rng_state(),  # Dropout in a user's own backbone draws from it
        }
        facts = {
            "traffic": vars(self.traffic).copy(),
            "replay": self.replay.state() if self.replay else None,
            "replay_order": self._replay_order,
            "unsynchronised": self._unsynchronised,
            "kernel": self.kernel,
        }
        return tensors, facts

    def load_state(self, step: int, tensors: State, facts: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned after `step` steps."""
        self.step_count = step
        self.participants.load_state(tensors)
        self.server.load_state(within(tensors, "server"))
        self._batches.load_state(within(tensors, "batches"))
        self.hooks.load_state(within(tensors, "hooks"))
        self.server_hooks.load_state(within(tensors, "server_hooks"))
        self._pool = tensors["pool"]
        self._before_averaging = counted(tensors, "before_averaging", self._compute.device)
        self._compared = ClientCopies.of_state(within(tensors, "compared"), self._compute.device)
        self._epoch_losses = list(tensors["epoch_losses"].to(self._compute.device).unbind())
        self._replay_rng.set_state(tensors["rng.replay"])
        torch.set_rng_state(tensors["rng.global"])
        self.traffic = Traffic(**facts["traffic"])
        self._replay_order = facts["replay_order"]
        self._unsynchronised = facts["unsynchronised"]
        if self.replay is not None:
            self.replay.load_state(facts["replay"])
        if type(self.clients) is ClientBank:  # another kernel than before would round differently
            self.clients.kernel = facts["kernel"]
