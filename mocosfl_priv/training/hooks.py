"""Where others touch a training step: a defense at the client, somebody who attends at the server.

:class:`mocosfl_priv.Defense` implements the client's side; `experiment.observers` attaches attacks to the server's.
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
    filters the gradient that comes back for the queries, and asks for the loss.
    """

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        """A scalar, averaged over the batch, that is added to the clients' loss; None for none."""

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        """The smashed data on its way out, same shape; gradients flow back through it."""

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        """The server's gradient on its way in, same shape."""

    def state(self) -> dict[str, Tensor]:
        """What changes while training goes on, for a checkpoint."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state` was taken."""


@runtime_checkable
class KeyHooks(Protocol):
    """What hooks have besides :class:`ClientHooks` where they may replace keys."""

    def replace_keys(self, keys: Tensor, owners: Tensor, step: int, rng: torch.Generator) -> Tensor:
        """The keys that really go out beside the queries of the same rows, same shape; owners: int64 (n,) on the CPU,
        the clients of the rows. Not called where no gradient will come in.
        """


class NoHooks:
    """A client that sends what it computes."""

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        """No extra loss."""
        return None

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        """Unchanged."""
        return smashed

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        """Unchanged."""
        return gradient

    def state(self) -> dict[str, Tensor]:
        """Nothing changes."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing changes."""


@dataclass(frozen=True)
class Message:
    """What one pass of a training step brings to the server, after the clients' defense.

    Args:
        step: from 0.
        steps: how many are planned.
        owners: int64 (n,) on the CPU, the clients that sent.
        queries: float (n, *smashed_shape), detached.
        keys: the same shape; keys[i] belongs to the other view of queries[i]'s image.
        labels: int64 (n,) in supervised split learning; None in self-supervised training, where nobody sends any.
    """

    step: int
    steps: int
    owners: Tensor
    queries: Tensor
    keys: Tensor
    labels: Tensor | None = None


class ServerHooks(Protocol):
    """What somebody at the server sees and may change, in the order of a pass, and what a checkpoint keeps.

    Nothing here may draw from the training's generators, or change a message or the server's networks.
    """

    def received(self, message: Message) -> None:
        """A message has arrived; the server has not scored it yet."""

    def returned(self, message: Message, gradient: Tensor) -> Tensor:
        """The gradient (n, *smashed_shape) on its way back for `message`; what is returned goes to the clients.

        Not called for clients that take no gradient.
        """

    def state(self) -> dict[str, Tensor]:
        """What changes while training goes on, for checkpoints."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state` was taken."""


class Unattended:
    """A server at which nobody sits but the server."""

    def received(self, message: Message) -> None:
        """Nobody listens."""

    def returned(self, message: Message, gradient: Tensor) -> Tensor:
        """Unchanged."""
        return gradient

    def state(self) -> dict[str, Tensor]:
        """Nothing changes."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing changes."""
