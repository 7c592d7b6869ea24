"""Those who take part in a step: they turn images into messages, and returned gradients into updates.

The engine knows them by this interface only. Here they are simulated, in this process; `mocosfl_priv.deployment` has
some that are devices of their own.
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
    """What the clients of a pass sent, as it was received, client by client in the order of its pool.

    queries, keys: float (rows, *smashed_shape), detached. Symmetric losses with two models per client need both views
    of both: then each client's first views stand before its second ones in `queries`, and behind them in `keys`. Else
    queries are of the first views, keys of the second.
    """

    queries: Tensor
    keys: Tensor


class Participants(Protocol):
    """The clients of a training as its engine meets them. A step is `present`; for every part of the batch `send` and,
    where clients learn, `receive`; then `end_step`.
    """

    def present(self, batch: ClientBatch, step: int, learning: bool) -> ClientBatch:
        """What of `batch` can be had in `step`: all of it, or that of the clients that are there; never nothing."""

    def send(self, part: ClientBatch, step: int, learning: bool) -> Sent:
        """Some clients' messages; `learning`: a gradient for the queries will be given to :meth:`receive`."""

    def receive(self, part: ClientBatch, gradient: Tensor, share: float, rates: Tensor) -> None:
        """The gradient (rows, *smashed_shape) for the queries that :meth:`send` returned last; the clients learn by
        what its codec leaves of it.

        share: what part of the step's images these are. rates: float64 (P,), the clients' learning rates.
        """

    def end_step(self) -> None:
        """All clients of this step have learned."""

    def average(self, pool: Tensor) -> None:
        """FedAvg: the mean of the pool's models becomes everybody's."""

    def consensus(self, pool: Tensor) -> State:
        """What :meth:`average` would hand out, without handing it out."""

    def individual(self, client: int) -> State:
        """A copy of one client's own model."""

    def finish(self) -> None:
        """The training is over."""

    def state(self) -> State:
        """Everything but the configuration and the hooks' state, by name."""

    def load_state(self, state: State) -> None:
        """Go on where :meth:`state` was taken."""


@dataclass(frozen=True)
class _Pass:
    """What a returned gradient will be used with: views, what was made of them, and what was sent."""

    views: Tensor
    smashed: Tensor
    sent: Tensor


class Simulated:
    """Clients in this process: a bank, the augmentation in front of it, the defense behind it."""

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
        """Where messages are computed."""
        return self._compute.device

    def present(self, batch: ClientBatch, step: int, learning: bool) -> ClientBatch:
        """Everybody is always there."""
        return batch

    def send(self, part: ClientBatch, step: int, learning: bool) -> Sent:
        """See :class:`Participants`."""
        self._pass = None
        images = part.images.to(self._compute.device)
        first, second = moco_v2_view(images, self._views_rng), moco_v2_view(images, self._views_rng)
        return self.send_views(part, first, second, step, learning)

    def send_views(self, part: ClientBatch, first: Tensor, second: Tensor, step: int, learning: bool) -> Sent:
        """The same for given views, float (B, 3, h, w) in [0, 1], of the images of `part`."""
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
            self._pass = _Pass(query_views, smashed, sent)
        codec = self.training.codec
        return Sent(as_received(sent.detach(), codec), as_received(sent_keys, codec))

    def receive(self, part: ClientBatch, gradient: Tensor, share: float, rates: Tensor) -> None:
        """See :class:`Participants`."""
        assert self._pass is not None, "receive() before the clients of the pass have sent"
        received = as_received(gradient, self.training.gradient_codec)
        returned = self.hooks.filter_gradient(received, self._noise_rng)
        outputs, gradients = [self._pass.sent], [returned]
        extra = self.hooks.client_loss(self._pass.views, self._pass.smashed)
        if extra is not None:  # a mean over this part of the batch
            outputs.append(extra)
            gradients.append(torch.full_like(extra, share))
        torch.autograd.backward(outputs, gradients)
        self._pass = None
        self.clients.learn(part.pool, rates)

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
        """Nothing is left to do."""

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


RemoteParticipants = Callable[[SplitModel, Simulated], Participants]  # before the simulated ones of a training


def client_by_client(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """The order that puts each client's second views behind its first ones.

    Indices into cat([first, second]) of B images each; for cat([second, first]) the same order gives the other view.
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
