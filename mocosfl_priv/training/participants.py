"""Participants: the clients as the training engine uses them.

They turn images into messages, and returned gradients into updates. The engine uses only the interface
:class:`Participants`. :class:`Simulated` implements it in this process, `mocosfl_priv.deployment` for real devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.data.augmentation import moco_v2_view
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.clients import Clients
from mocosfl_priv.training.codecs import as_received
from mocosfl_priv.training.hooks import ClientHooks, KeyHooks, MessageKind
from mocosfl_priv.training.message_count import rows_per_image
from mocosfl_priv.training.sampling import ClientBatch
from mocosfl_priv.training.state import State, under, within


@dataclass(frozen=True)
class Sent:
    """What the server received from the clients in one pass, grouped by client in the order of the pool.

    queries, keys: float (rows, *smashed_shape), detached. Normally queries encode the first views and keys the second.
        With a symmetric loss and both models of each client in use (see :mod:`mocosfl_priv.training.message_count`),
        each view is encoded by both models: for each client, `queries` holds its first views and then its second ones,
        `keys` its second views and then its first ones.
    """

    queries: Tensor
    keys: Tensor


class Participants(Protocol):
    """The clients of a training, as its engine uses them.

    In each step the engine calls :meth:`present`; then, for every part of the batch, :meth:`send` and, where clients
    learn, :meth:`receive`; then, where clients learn, :meth:`end_step`.
    """

    def present(self, batch: ClientBatch, step: int, learning: bool) -> ClientBatch:
        """Return the part of `batch` whose clients are available in `step`, never empty; all of it in a simulation."""

    def send(self, part: ClientBatch, step: int, learning: bool) -> Sent:
        """Encode the images of `part` and return the messages as the server receives them.

        learning: whether a call of :meth:`receive` will follow, with the gradient for the queries.
        """

    def receive(self, part: ClientBatch, gradient: Tensor, share: float, rates: Tensor) -> None:
        """Update the clients of `part` with the server's gradient, after rounding it as its codec does.

        gradient: float (rows, *smashed_shape), for the queries that the last call of :meth:`send` returned.
        share: the fraction of the step's images that are in `part`.
        rates: float64 (P,), the clients' learning rates.
        """

    def end_step(self) -> None:
        """End a step; called after :meth:`receive` was called for all parts of the batch."""

    def average(self, pool: Tensor) -> None:
        """FedAvg: set the models of all clients to the mean of the pool's models."""

    def consensus(self, pool: Tensor) -> State:
        """Return the mean of the pool's online models; changes no client."""

    def individual(self, client: int) -> State:
        """Return a copy of one client's online model."""

    def finish(self) -> None:
        """End the training; remote devices send a last report and disconnect."""

    def state(self) -> State:
        """Return all state except the configuration and the hooks' state, as named tensors."""

    def load_state(self, state: State) -> None:
        """Restore what :meth:`state` returned."""


@dataclass(frozen=True)
class _Pass:
    """What the backward pass of the clients needs: the views, their smashed data, and what was sent after the defense.

    rows: how many rows each client has, in their order.
    """

    rows: list[int]
    views: Tensor
    smashed: Tensor
    sent: Tensor


class Simulated:
    """Clients simulated in this process: they augment images, encode them, and apply the defense.

    views_rng: draws the augmentations. noise_rng: draws the defense's randomness.
    """

    def __init__(
        self, clients: Clients, hooks: ClientHooks, training: TrainingConfig, compute: Compute,
        views_rng: torch.Generator, noise_rng: torch.Generator,
    ) -> None:  # fmt: skip
        self.clients = clients
        self.hooks = hooks
        self.training = training
        self._compute = compute
        self._views_rng = views_rng
        self._noise_rng = noise_rng
        self._pass: _Pass | None = None

    @property
    def device(self) -> torch.device:
        """The device on which messages are computed."""
        return self._compute.device

    def present(self, batch: ClientBatch, step: int, learning: bool) -> ClientBatch:
        """Return `batch`: simulated clients are always available."""
        return batch

    def send(self, part: ClientBatch, step: int, learning: bool) -> Sent:
        """See :class:`Participants`."""
        self._pass = None
        images = part.images.to(self._compute.device)
        first, second = moco_v2_view(images, self._views_rng), moco_v2_view(images, self._views_rng)
        return self.send_views(part, first, second, step, learning)

    def send_views(self, part: ClientBatch, first: Tensor, second: Tensor, step: int, learning: bool) -> Sent:
        """Do the same as :meth:`send`, with given views of the images of `part`: float (B, 3, h, w) in [0, 1]."""
        if rows_per_image(self.training, not self.clients.trainable) == 2:
            order = client_by_client(part.sizes, first.device)
            rows = [2 * size for size in part.sizes]
            query_views, key_views = torch.cat([first, second])[order], torch.cat([second, first])[order]
        else:
            rows, query_views, key_views = list(part.sizes), first, second
        with self._compute.autocast():
            smashed = self.clients.encode_queries(part.pool, rows, query_views)
            key_smashed = self.clients.encode_keys(part.pool, rows, key_views)
        smashed, key_smashed = smashed.to(first.dtype), key_smashed.to(first.dtype)
        sent = self.hooks.protect(smashed, self._noise_rng, MessageKind.QUERY)
        with torch.no_grad():
            sent_keys = self.hooks.protect(key_smashed, self._noise_rng, MessageKind.KEY)
            if learning and isinstance(self.hooks, KeyHooks):
                senders = part.pool.repeat_interleave(torch.tensor(rows))
                sent_keys = self.hooks.replace_keys(sent_keys, senders, step, self._noise_rng)
        if learning:
            self._pass = _Pass(rows, query_views, smashed, sent)
        codec = self.training.codec
        return Sent(as_received(sent.detach(), codec), as_received(sent_keys, codec))

    def receive(self, part: ClientBatch, gradient: Tensor, share: float, rates: Tensor) -> None:
        """See :class:`Participants`."""
        assert self._pass is not None, "receive() before the clients of the pass have sent"
        received = as_received(gradient, self.training.gradient_codec)
        returned = self.hooks.filter_gradient(received, self._noise_rng)
        outputs, gradients = [self._pass.sent], [returned]
        extra = self._own_loss(self._pass)
        if extra is not None:  # a mean over this part of the batch, so it is weighted by the part's share
            outputs.append(extra)
            gradients.append(torch.full_like(extra, share))
        torch.autograd.backward(outputs, gradients)
        self._pass = None
        self.clients.learn(part.pool, rates)

    def _own_loss(self, done: _Pass) -> Tensor | None:
        """Return what the defense adds to the clients' loss, a mean over the rows of the pass; None if nothing.

        `client_loss` sees one client at a time: a real client has no other client's images.
        """
        joint = self.hooks.joint_loss(done.views, done.smashed)
        losses = [] if joint is None else [joint]
        apart = zip(done.views.split(done.rows), done.smashed.split(done.rows), strict=True)
        for views, smashed in apart:
            loss = self.hooks.client_loss(views, smashed)
            if loss is not None:
                losses.append(len(views) / len(done.views) * loss)
        return torch.stack(losses).sum() if losses else None

    def end_step(self) -> None:
        """See :class:`Participants`."""
        self.clients.end_step()

    def average(self, pool: Tensor) -> None:
        """See :class:`Participants`."""
        self.clients.average(pool)

    def consensus(self, pool: Tensor) -> State:
        """See :class:`Participants`."""
        return self.clients.consensus(pool)

    def individual(self, client: int) -> State:
        """See :class:`Participants`."""
        return self.clients.individual(client)

    def finish(self) -> None:
        """Do nothing."""

    def state(self) -> State:
        """See :class:`Participants`."""
        return {
            **under("clients", self.clients.state()),
            "rng.views": self._views_rng.get_state(),
            "rng.noise": self._noise_rng.get_state(),
        }

    def load_state(self, state: State) -> None:
        """See :class:`Participants`."""
        self.clients.load_state(within(state, "clients"))
        self._views_rng.set_state(state["rng.views"])
        self._noise_rng.set_state(state["rng.noise"])


# makes the participants that a training uses, from its model and its simulated clients
RemoteParticipants = Callable[[SplitModel, Simulated], Participants]


def client_by_client(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the order that groups two views of B images by client: each client's first views, then its second ones.

    sizes: the number of images of each client; B is their sum. The result, int64 (2 B,), indexes cat([first, second]);
    applied to cat([second, first]), it gives the other view of each image.
    """
    images = sum(sizes)
    if len(set(sizes)) == 1:
        pairs = torch.arange(2 * images, device=device).view(2, len(sizes), -1)
        return pairs.transpose(0, 1).flatten()
    index, pieces, start = torch.arange(images, device=device), [], 0
    for size in sizes:
        mine = index[start : start + size]
        pieces += [mine, mine + images]
        start += size
    return torch.cat(pieces)
