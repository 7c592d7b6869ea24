"""Hooks into a training step: one interface for a defense at the clients, one for observers at the server.

:class:`mocosfl_priv.Defense` implements :class:`ClientHooks`. `experiment.observers` connects attacks to
:class:`ServerHooks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class MessageKind(StrEnum):
    """What a defense protects: a message of training that a gradient comes back for, one without, or neither.

    QUERY: of training; where clients learn, the next gradient is for these messages.
    KEY: of training; no gradient comes back.
    INFERENCE: outside of training, such as features for use, or images that an attacker sends.

    >>> MessageKind("query") is MessageKind.QUERY
    True
    """

    QUERY = "query"
    KEY = "key"
    INFERENCE = "inference"


class ClientHooks(Protocol):
    """Where a defense touches a step, and what a checkpoint keeps.

    A pass of a step protects its queries, then its keys, which a detector may replace. Where clients learn, it then
    filters the gradient that comes back for the queries, and asks for the losses.
    """

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        """Return a loss to add to the loss of one client: a scalar, averaged over its rows; None for no extra loss.

        Called for each client of the pass, with the rows of this client only.
        images: float (n, 3, h, w) in [0, 1], the encoded views. smashed: their smashed data before :meth:`protect`.
        """

    def joint_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        """Return a loss like :meth:`client_loss`, but computed once per pass from the rows of all its clients.

        No real client can compute it; it is for simulations that share one model between clients.
        """

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        """The smashed data on its way out, same shape; gradients flow back through it."""

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        """Return the gradient that the clients use in place of the server's, in the same shape."""

    def state(self) -> dict[str, Tensor]:
        """Return everything that changes during training, for a checkpoint."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""


@runtime_checkable
class KeyHooks(Protocol):
    """What hooks have besides :class:`ClientHooks` where they may replace keys."""

    def replace_keys(self, keys: Tensor, client_ids: Tensor, step: int, rng: torch.Generator) -> Tensor:
        """The keys that really go out beside the queries of the same rows, same shape; client_ids: int64 (n,) on the
        CPU, the clients of the rows. Not called where no gradient will come in.
        """


class NoHooks:
    """No-op client hooks: clients without a defense."""

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        """Add no loss."""
        return None

    def joint_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        """Add no loss."""
        return None

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        """Unchanged."""
        return smashed

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        """Return `gradient` unchanged."""
        return gradient

    def state(self) -> dict[str, Tensor]:
        """Return no tensors: there is no state."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Do nothing: there is no state."""


@dataclass(frozen=True)
class Message:
    """What the server receives in one pass of a training step, after the clients' defense.

    Args:
        step: from 0.
        steps: how many are planned.
        client_ids: int64 (n,) on the CPU, the clients that sent.
        queries: float (n, *smashed_shape), detached.
        keys: the same shape; keys[i] belongs to the other view of queries[i]'s image.
        labels: int64 (n,) in supervised split learning; None in self-supervised training, where nobody sends any.
    """

    step: int
    steps: int
    client_ids: Tensor
    queries: Tensor
    keys: Tensor
    labels: Tensor | None = None


class ServerHooks(Protocol):
    """What an observer or attacker at the server sees and may change in a training step, and its state for checkpoints.

    In each pass :meth:`received` is called first, then :meth:`returned`. An implementation must not draw from the
    training's random generators, and must not change a message or the server's networks.
    """

    def received(self, message: Message) -> None:
        """Receive `message`; called before the server computes its loss."""

    def returned(self, message: Message, gradient: Tensor) -> Tensor:
        """Return the gradient that the clients get for `message`, in place of the server's `gradient`.

        gradient: float (n, *smashed_shape), with respect to the queries. Not called where clients get no gradient.
        """

    def state(self) -> dict[str, Tensor]:
        """Return everything that changes during training, for a checkpoint."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""


class Unattended:
    """No-op server hooks: a server without observers."""

    def received(self, message: Message) -> None:
        """Do nothing."""

    def returned(self, message: Message, gradient: Tensor) -> Tensor:
        """Return `gradient` unchanged."""
        return gradient

    def state(self) -> dict[str, Tensor]:
        """Return no tensors: there is no state."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Do nothing: there is no state."""
