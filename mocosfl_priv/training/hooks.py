"""Hooks into a training step: one interface for a defense at the clients, one for observers at the server.

:class:`mocosfl_priv.Defense` implements :class:`ClientHooks`. `experiment.observers` connects attacks to
:class:`ServerHooks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class ClientHooks(Protocol):
    """What a defense may do at the clients in a training step, and its state for checkpoints.

    For each pass of a step, :meth:`protect` is called for the queries and for the keys. Where clients learn, it is
    followed by :meth:`replace_keys` and, when the server's gradient has arrived, :meth:`filter_gradient` and
    :meth:`client_loss`. Smashed data, keys and gradients are float (n, *smashed_shape). rng: the source of randomness,
    whose state is saved in checkpoints.
    """

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        """Return a loss to add to the clients' loss: a scalar, averaged over the batch; None for no extra loss.

        images: float (n, 3, h, w) in [0, 1], the encoded views. smashed: their smashed data before :meth:`protect`.
        """

    def protect(self, smashed: Tensor, rng: torch.Generator) -> Tensor:
        """Return what is sent to the server in place of `smashed`: same shape, differentiable."""

    def replace_keys(self, keys: Tensor, owners: Tensor, step: int, rng: torch.Generator) -> Tensor:
        """Return the keys that are sent in place of `keys`, which are protected already; same shape.

        owners: int64 (n,) on the CPU, the client of each row. Not called where clients receive no gradient.
        """

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        """Return the gradient that the clients use in place of the server's, in the same shape."""

    def state(self) -> dict[str, Tensor]:
        """Return everything that changes during training, for a checkpoint."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""


class NoHooks:
    """No-op client hooks: clients without a defense."""

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        """Add no loss."""
        return None

    def protect(self, smashed: Tensor, rng: torch.Generator) -> Tensor:
        """Return `smashed` unchanged."""
        return smashed

    def replace_keys(self, keys: Tensor, owners: Tensor, step: int, rng: torch.Generator) -> Tensor:
        """Return `keys` unchanged."""
        return keys

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

    step, steps: the number of the step, from 0, and the number of planned steps.
    owners: int64 (n,) on the CPU, the client that sent each row.
    queries, keys: float (n, *smashed_shape), detached; queries[i] and keys[i] encode two views of the same image.
    labels: int64 (n,) in supervised split learning; None in self-supervised training, where no labels are sent.
    """

    step: int
    steps: int
    owners: Tensor
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
